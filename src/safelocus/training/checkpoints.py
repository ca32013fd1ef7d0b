"""Where an unfinished training run is kept, and whether it may be resumed.

The trainer writes `checkpoint-N` folders; one is complete when it holds `trainer_state.json`, which is
written last. `identity.json` beside them says what was trained on what: another run never resumes there.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safelocus import distributed
from safelocus.errors import RunError
from safelocus.run import write_json


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """Checkpoints of one training run.

    Attributes:
        folder: where they are; the caller removes it when the run's result is saved. Of several processes each has its
            own.
        identity: what makes it this run and no other; JSON.
        every_seconds: how often to save, at most.
    """

    folder: Path
    identity: Mapping[str, Any] = field(default_factory=dict)
    every_seconds: float = 300.0

    def check(self) -> None:
        """Raise RunError where a run with another identity lies; make the folder, and say whose it is."""
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

    def shared(self) -> Path:
        """The first process's folder: what is the same in all processes is kept once."""
        return distributed.gather_objects(self.folder)[0]

    def latest(self, *, of_parts: bool = False) -> Path | None:
        """The newest complete checkpoint; None where the run has to begin.

        Args:
            of_parts: every process has its own part of each, in its own folder; else the first one has all.

        Raises:
            RunError: a run with another identity lies here; the first process's files cannot be seen by all.
        """
        self.check()
        folder = self.folder if of_parts else self.shared()
        complete = (path.parent for path in folder.glob("checkpoint-*/trainer_state.json"))
        seen = distributed.gather_objects({int(path.name.rpartition("-")[2]) for path in complete})
        if not of_parts and any(steps != seen[0] for steps in seen):
            raise RunError(
                f"{folder}: holds an interrupted training, which not every process can see. Put the output where all "
                "machines see it, or --overwrite to begin anew"
            )
        step = max(set.intersection(*seen), default=None)
        return None if step is None else folder / f"checkpoint-{step}"
