"""What becomes of a command that is killed, finds no space, or meets itself, at any moment?

    python benchmarks/faults/killing.py [--number 100] [--rare 25] [--seed 0] [--only NAME] [--kept FOLDER]

Commands run in copies of this process (forked when it has imported what they import). Each first runs undisturbed: its
files are what counts, but for times, paths and versions in them. Then, so many times, the last three as often as
--rare says:

    kill    SIGKILL, half of the times after a random time, half of them just before a random change of the file system
    full    from a random change on, every file that is opened to be written finds no space
    frozen  from a random change on, nothing can be written, renamed or removed: a folder that is read-only now
    twice   the command started twice at once, into one place

and then the same command again, undisturbed. Faults: it fails, or its files have other bits; a traceback of the one
that found no space; two that both claim the place and leave other bits; files that nobody needs. A campaign that was
stopped goes on where its outcomes are kept.
"""

import argparse
import errno
import gc
import importlib
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safelocus.errors import PlanError
from safelocus.run.files import digest_of
from safelocus.run.resume import Journal, claim

sys.path.insert(0, str(Path(__file__).parent))

from page import record

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")
_SMALL = ["--max-new-tokens", "6", "--batch-size", "4", "--json"]
_MEASURED = ["--harmful", "organism:harmful-heldout", "--harmless", "organism:harmless", "--limit", "3"]


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command of safelocus that writes into a folder.

    Attributes:
        name: of the command.
        arguments: all of it, but where it writes; {work} is a folder of its own.
        place: where it writes, within that folder.
        prepare: makes the place what it is before.
        within: only changes of files with this in their path are moments to disturb it at.
    """

    name: str
    arguments: list[str]
    place: str = "out"
    prepare: Callable[[Path], None] = lambda work: None
    within: str = ""


def commands(folder: Path) -> list[Command]:
    """Made of a run of `score` and a patch, in a folder."""
    from safelocus.cli import main

    scored, patch = folder / "scored", folder / "p.safetensors"
    score = ["score", "organism:dense", "--prompts", "organism:harmful", "--refusal", "--ratio", "0.01", "--batch-size",
             "2", "--limit", "6", "--checkpoint-seconds", "0.001", "--json"]  # fmt: skip
    for arguments in (
        [*score, "-o", str(scored)],
        [
            "patch",
            "diff",
            "organism:dense",
            "organism:dense-unaligned",
            "-o",
            str(patch),
            "--largest",
            "5000",
            "--json",
        ],
    ):
        assert run_copy(lambda arguments=arguments: main(arguments), folder / "log") == 0, (folder / "log").read_text()
    trained = ["--selection", str(scored), "--steps", "4", "--seed", "1", "--allow-mismatch"]
    model = ["organism:dense-unaligned", *trained]
    apply = ["patch", "apply", str(patch), "organism:dense", "--json"]

    preserve = ["preserve", *model, "--data", small_data("task", folder, 60), "--judge", "refusal",
                "--calibrate", "none", *_MEASURED, *_SMALL, "-o", "{work}/out"]  # fmt: skip

    def with_model(work: Path) -> None:
        from safelocus.organism import resolve_model

        shutil.copytree(resolve_model("dense"), work / "model")

    return [
        Command(name="score", arguments=[*score, "-o", "{work}/out"]),
        Command(
            name="score --overwrite", arguments=[*score, "-o", "{work}/out", "--overwrite"],
            prepare=lambda work: shutil.copytree(scored, work / "out"),
        ),
        Command(
            name="verify",
            arguments=["verify", "organism:dense", "--scores", str(scored), "--prompts", "organism:harmful-heldout",
                       "--judge", "refusal", "--limit", "4", "--ratios", "0.01", "--noise", "3", "--seeds", "1",
                       *_SMALL, "-o", "{work}/out"],
        ),
        Command(
            name="enhance",
            arguments=["enhance", *model, "--data", small_data("refusals", folder), "--retain", "none",
                       "--judge", "refusal", "--validation", "0", *_MEASURED, *_SMALL, "-o", "{work}/out"],
        ),
        Command(name="preserve", arguments=preserve),
        Command(name="preserve, saving the model", arguments=preserve, within="model"),
        Command(name="preserve --lora, saving it", arguments=[*preserve, "--lora"], within="adapter"),
        Command(name="patch apply -o", arguments=[*apply, "-o", "{work}/out"]),
        Command(
            name="patch apply --in-place", place="model", prepare=with_model,
            arguments=["patch", "apply", str(patch), "{work}/model", "--in-place", "--json"],
        ),
    ]  # fmt: skip


def run_copy(function: Callable[[], object], log: Path, disturb: Callable[[int], None] | None = None) -> int:
    """Exit code of a function in a copy of this process; that of a kill is negative."""
    child = os.fork()
    if child == 0:
        code = 1
        with log.open("w") as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
            try:
                function()
                code = 0
            except SystemExit as stop:
                code = stop.code if isinstance(stop.code, int) else 0
            except BaseException as error:  # noqa: BLE001 (told by the exit code)
                print(repr(error), flush=True)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
    if disturb is not None:
        disturb(child)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def import_what_runs(function: Callable[[], object], folder: Path) -> None:
    """Import here whatever a function imports: its next copies need not. Its own state stays in its copy."""
    found = folder / "imported"

    def run() -> None:
        try:
            function()
        finally:
            found.write_text("\n".join(sys.modules))

    run_copy(run, folder / "log")
    for name in found.read_text().splitlines():
        if name not in sys.modules and importlib.util.find_spec(name) is not None:
            importlib.import_module(name)
    gc.freeze()  # a collection, of which every training has several, would search through all that was imported


class Changes:
    """Counts the changes of the file system below a folder, by this process, and does something at one of them."""

    def __init__(
        self, below: Path, within: str = "", *, at: int = -1, then: Callable[[str], None] = lambda _: None
    ) -> None:
        self.count, self._below, self._within, self._at, self._then = 0, str(below), within, at, then
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        is_open = event == "open" and isinstance(arguments[2], int) and bool(arguments[2] & _WRITES)
        if not (is_open or event in _CHANGES):
            return
        before, below, path = str(arguments[0]).partition(self._below)
        if before or not below or self._within not in path:
            return
        self.count += 1
        if self.count > self._at >= 0:
            self._then("open" if is_open or event == "os.mkdir" else event)


def _kill(_: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _full(event: str) -> None:
    if event == "open":
        raise OSError(errno.ENOSPC, "No space left on device")


def _frozen(_: str) -> None:
    raise OSError(errno.EROFS, "Read-only file system")


def files_of(place: Path) -> dict[str, str]:
    """Name -> digest of all below a folder, without what differs from run to run: times, and names of the place."""
    found = {}
    for file in sorted(place.rglob("*")):
        name = str(file.relative_to(place))
        if file.is_file() and file.name != "digests.json":
            if file.suffix in (".json", ".html", ".svg", ".toml", ".md"):
                text = file.read_text(encoding="utf-8").replace(str(place), "PLACE")
                text = re.sub(r'"seconds":\s*[0-9.e-]+', '"seconds": 0', text)
                found[name] = str(hash(text)) if file.suffix != ".html" else ""
            else:
                found[name] = digest_of(file)
    return found


class Trial:
    """One command, in a folder of its own, again and again."""

    def __init__(self, command: Command, folder: Path) -> None:
        self.command, self.folder = command, folder
        self.work = folder / "work"
        self.anew()
        import_what_runs(self.call, folder)
        self.anew()
        began = time.monotonic()
        counted = folder / "count"

        def count() -> None:
            changes = Changes(self.work, self.command.within)
            try:
                self.call()
            finally:
                counted.write_text(str(changes.count))

        code = run_copy(count, folder / "log")
        assert code == 0, f"{command.name}: {(folder / 'log').read_text()[-2000:]}"
        self.seconds, self.changes = time.monotonic() - began, int(counted.read_text())
        self.expected = files_of(self.place)

    @property
    def place(self) -> Path:
        return self.work / self.command.place

    def anew(self) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir()
        self.command.prepare(self.work)

    def call(self) -> None:
        from safelocus.cli import main

        main([argument.format(work=self.work) for argument in self.command.arguments])

    def disturbed(self, at: int, then: Callable[[str], None]) -> int:
        def run() -> None:
            Changes(self.work, self.command.within, at=at, then=then)
            self.call()

        return run_copy(run, self.folder / "log")

    def again(self) -> tuple[str, str]:
        """(what the second command came to, more about a fault)."""
        unfinished = (self.work / ".out.partial" / "checkpoint").is_dir()
        arguments = self.command.arguments
        done = "--overwrite" not in arguments and (self.work / "out" / "run.toml").is_file()
        copied = "apply" in arguments and (self.work / "out").is_dir()
        if not done and not copied:
            code = run_copy(self.call, self.folder / "log")
            if code:
                return "not resumable", (self.folder / "log").read_text()[-2000:]
        found = files_of(self.place)
        if found != self.expected:
            names = sorted({n for n in found | self.expected if found.get(n) != self.expected.get(n)})
            return "other bits", ", ".join(names)
        litter = sorted(p.name for p in self.work.iterdir() if p != self.place and not p.name.endswith(".lock"))
        litter += [p.name for p in self.place.rglob("*.tmp")] + [p.name for p in self.place.rglob("*.gone")]
        if litter:
            return "litter", ", ".join(litter)
        return ("finished" if done or copied else "resumed" if unfinished else "before it began"), ""


def disturb(trial: Trial, kind: str, rng: random.Random) -> tuple[str, str]:
    """One disturbance and the command again."""
    trial.anew()
    at = rng.randrange(trial.changes)
    if kind == "kill" and not trial.command.within and rng.random() < 0.5:
        moment = rng.random() * trial.seconds

        def kill(child: int) -> None:
            time.sleep(moment)
            os.kill(child, signal.SIGKILL)

        run_copy(trial.call, trial.folder / "log", kill)
    elif kind == "kill":
        trial.disturbed(at, _kill)
    elif kind == "twice":
        return _twice(trial)
    else:
        code = trial.disturbed(at, _full if kind == "full" else _frozen)
        if code not in (0, 2):
            return "traceback", (trial.folder / "log").read_text()[-2000:]
    return trial.again()


def _twice(trial: Trial) -> tuple[str, str]:
    other: list[int] = []

    def start(_: int) -> None:
        other.append(run_copy(trial.call, trial.folder / "log-of-second"))

    codes = [run_copy(trial.call, trial.folder / "log", start), *other]
    told = [(trial.folder / name).read_text()[-1500:] for name in ("log", "log-of-second")]
    if sorted(codes) not in ([0, 0], [0, 2]):
        return "traceback", "\n".join(told)
    found = files_of(trial.place)
    return (
        ("other bits", "\n".join(told))
        if found != trial.expected
        else ("one of two" if sorted(codes) == [0, 2] else "one after the other", "")
    )


def campaign(folder: Path, numbers: dict[str, int], *, seed: int, only: str, kept: Path | None) -> dict[str, Any]:
    """Disturb every command so many times in each way; counts, and the faults."""
    found: dict[str, Any] = {kind: {} for kind in numbers}
    claim(kept, {"seed": seed})
    journal = Journal(kept, "outcomes")
    for command in commands(folder):
        if only not in command.name:
            continue
        asked = [(command.name, kind, n) for kind, times in numbers.items() for n in range(times)]
        trial = None
        for key in asked:
            if key not in journal:
                trial = trial or _trial(command, folder)
                outcome, why = disturb(trial, key[1], random.Random(f"{seed} {key}"))
                journal.add([(key, outcome)])
                if why:
                    print(f"\n{outcome} {key}\n{why}\n", flush=True)
        for kind in numbers:
            found[kind][command.name] = dict(Counter(journal[key] for key in asked if key[1] == kind))
            print(f"    {kind:8} {found[kind][command.name]}", flush=True)
    return found


def _no_plan(*_: object, **__: object) -> None:
    raise PlanError("not planned here")


def _trial(command: Command, folder: Path) -> Trial:
    place = Path(tempfile.mkdtemp(dir=folder))
    trial = Trial(command, place)
    print(f"{command.name}: {trial.seconds:.1f} s, {trial.changes} changes of the file system", flush=True)
    return trial


def prepare() -> None:
    """Make this process one whose copies are quick: what is read and parsed first is there, and nothing is planned."""
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    import safelocus.enhancement.run
    import safelocus.preservation.run  # noqa: F401 (imported before the copies)
    from safelocus import resources
    from safelocus.model.layout.rules import families
    from safelocus.prompts import read_prompts
    from safelocus.report import page
    from safelocus.training.fitting import Checkpoints

    Checkpoints.__init__.__kwdefaults__["every_seconds"] = 0.001  # a checkpoint of every step
    for choose in ("choose", "choose_training"):  # half the time, in which nothing is written
        setattr(resources, choose, _no_plan)
    for name in ("harmful", "harmful-heldout", "harmless", "harmless-heldout", "refusals", "task"):
        read_prompts(f"organism:{name}")
    families()
    get_checkpoint_conversion_mapping("llama")
    page._template()


def small_data(name: str, folder: Path, number: int = 24) -> str:
    """The first rows of an embedded set, in a file."""
    from safelocus.prompts import read_prompts

    rows = [
        {"prompt": each.prompt, "response": each.response} for each in read_prompts(f"organism:{name}").limit(number)
    ]
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=100)
    parser.add_argument("--rare", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="commands whose name has this; nothing is recorded then")
    parser.add_argument("--kinds", default="kill,full,frozen,twice")
    parser.add_argument("--kept", type=Path, help="folder for outcomes, from which a stopped campaign goes on")
    options = parser.parse_args()
    prepare()
    with tempfile.TemporaryDirectory() as folder:
        numbers = {kind: options.number if kind == "kill" else options.rare for kind in options.kinds.split(",")}
        found = campaign(Path(folder), numbers, seed=options.seed, only=options.only, kept=options.kept)
    print(json.dumps(found, indent=1))
    if not options.only:
        record("disturbances", found)


if __name__ == "__main__":
    main()
