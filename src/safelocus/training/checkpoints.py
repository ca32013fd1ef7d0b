"""Where an unfinished training run is kept, and whether it may be resumed.

The trainer writes `checkpoint-N` folders; one is complete when it is sealed (see `run.files`), which is done last.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safelocus import distributed
from safelocus.errors import RunError
from safelocus.run.checking import require_checked
from safelocus.run.files import DIGESTS
from safelocus.run.resume import claim, newest


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """Checkpoints of one training run.

    Attributes:
        folder: where they are; the caller removes it when the run's result is saved. Of several processes each has its
            own.
        inputs: what makes it this run and no other, as far as the folder it lies in does not say so; see `Identity.of`.
        every_seconds: how often to save, at most.
    """

    folder: Path
    inputs: Mapping[str, Any] = field(default_factory=dict)
    every_seconds: float = 300.0

    def check(self) -> None:
        """Raise RunError where another run's work lies; make the folder, and say whose it is."""
        claim(self.folder, self.inputs)

    def shared(self) -> Path:
        """The first process's folder: what is the same in all processes is kept once."""
        return distributed.gather_objects(self.folder)[0]

    def latest(self, *, of_parts: bool = False) -> Path | None:
        """The newest complete checkpoint; None where the run has to begin.

        Args:
            of_parts: every process has its own part of each, in its own folder; else the first one has all.

        Raises:
            RunError: another run's work lies here; the newest was changed since it was written; the first process's
                files cannot be seen by all.
        """
        self.check()
        folder = self.folder if of_parts else self.shared()
        steps = steps_of(folder)
        if not of_parts and not distributed.in_all(steps == distributed.gather_objects(steps)[0]):
            raise RunError(
                f"{folder}: holds an interrupted training, which not every process can see. Put the output where all "
                "machines see it, or --overwrite to begin anew"
            )
        step = newest(steps)
        if step is None:
            return None
        require_checked(folder / f"checkpoint-{step}", "this checkpoint")
        return folder / f"checkpoint-{step}"


def steps_of(folder: Path) -> set[int]:
    """Of the complete checkpoints in a folder."""
    return {int(file.parent.name.rpartition("-")[2]) for file in folder.glob(f"checkpoint-*/{DIGESTS}")}
