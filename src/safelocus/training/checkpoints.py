"""Where an unfinished training run is kept, and whether it may be resumed.

The trainer writes `checkpoint-N` folders; one is complete when it holds `trainer_state.json`, which is
written last. `identity.json` beside them says what was trained on what: another run never resumes there.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safelocus.errors import RunError
from safelocus.run import write_json


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """Checkpoints of one training run.

    Attributes:
        folder: where they are; the caller removes it when the run's result is saved.
        identity: what makes it this run and no other; JSON.
        every_seconds: how often to save, at most.
    """

    folder: Path
    identity: Mapping[str, Any] = field(default_factory=dict)
    every_seconds: float = 300.0

    def latest(self) -> Path | None:
        """The newest complete checkpoint; None where the run has to begin.

        Raises:
            RunError: a run with another identity lies here.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        known, own = self.folder / "identity.json", json.loads(json.dumps(self.identity))
        if known.is_file():
            other = json.loads(known.read_text(encoding="utf-8"))
            if differing := sorted(key for key in {*own, *other} if own.get(key) != other.get(key)):
                raise RunError(
                    f"{self.folder}: an interrupted run with another {', '.join(differing)} lies here; "
                    "give the same inputs to resume it, or --overwrite to begin anew"
                )
        write_json(known, own)
        complete = [path.parent for path in self.folder.glob("checkpoint-*/trainer_state.json")]
        return max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
