"""What becomes of NaN and infinity, wherever they turn up?

    python benchmarks/faults/poisoning.py [--number 12] [--seed 0] [--only NAME] [--kept FOLDER]

Commands run in copies of this process, as in killing.py. One value of a random tensor at a random moment becomes NaN,
infinite or negatively infinite, so many times for each command and each place:

    logits        of a pass through a model or a guard, for a token or for all; -inf for all alone, since models have
                  it for tokens that they are never to say
    activations   what the embedding gives
    weights       from a pass on, and for good
    gradients     of a matrix, in a backward pass
    losses        of a training
    guard scores  a guard's log-odds

Right is an error in words that speaks of it (*refused*), a failure that is counted where it was not before (*counted*),
or the same files, to the bit, as without it (*no effect*). Faults: a *traceback*; *silent*: other files, and nothing
that says why.
"""

import argparse
import json
import random
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from safelocus.model import forcing
from safelocus.model.generation import NO_NUMBER
from safelocus.objective.guard import Guard
from safelocus.run.resume import Journal, claim
from safelocus.training.sharing import SharingTrainer

sys.path.insert(0, str(Path(__file__).parent))

from killing import Command, Trial, files_of, prepare, run_copy, small_data
from page import record

PLACES = ("logits", "activations", "weights", "gradients", "losses", "guard scores")
FAULTS = ("traceback", "silent")
VALUES = (float("nan"), float("inf"), float("-inf"))
_SAID = re.compile(r"NaN|\bnan\b|infinit|\binf\b|diverged|finite|did not come back as it was", re.IGNORECASE)
_SMALL = ["--max-new-tokens", "6", "--batch-size", "2", "--json"]
_ASKED = ["--harmful", "organism:harmful-heldout", "--harmless", "organism:harmless", "--limit", "3"]


def commands(folder: Path) -> list[Command]:
    """Each stage, with as much of what it can measure as it can."""
    from safelocus.cli import main

    scored = folder / "scored"
    score = ["score", "organism:dense", "--prompts", "organism:harmful", "--ratio", "0.01", "--limit", "4", *_SMALL]
    assert run_copy(lambda: main([*score, "--refusal", "-o", str(scored)]), folder / "log") == 0
    trained = ["organism:dense-unaligned", "--selection", str(scored), "--steps", "3", "--seed", "1",
               "--allow-mismatch", "--judge", "guard:organism:guard", *_ASKED, *_SMALL, "-o", "{work}/out"]  # fmt: skip
    return [
        Command(name="score", arguments=[*score, "--refusal", "-o", "{work}/out"]),
        Command(name="score --guard", arguments=[*score, "--guard", "organism:guard", "-o", "{work}/out"]),
        Command(
            name="verify",
            arguments=["verify", "organism:dense", "--scores", str(scored), "--prompts", "organism:harmful-heldout",
                       "--judge", "guard:organism:guard", "--limit", "3", "--ratios", "0.01", "--noise", "3",
                       "--seeds", "1", *_SMALL, "-o", "{work}/out"],
        ),
        Command(
            name="enhance",
            arguments=["enhance", *trained, "--data", small_data("refusals", folder),
                       "--retain", small_data("harmless-heldout", folder, 8),
                       "--retain-rows", "1", "--validation", "0"],
        ),
        Command(
            name="preserve",
            arguments=["preserve", *trained, "--data", small_data("task", folder, 60), "--calibrate", "none"],
        ),
        Command(
            name="evaluate",
            arguments=["evaluate", "organism:dense", "--prompts", "organism:harmful-heldout", "--harmless",
                       "organism:harmless", "--judge", "guard:organism:guard", "--kl-to", "organism:dense-unaligned",
                       "--perplexity", "organism:refusals", "--limit", "3", *_SMALL, "-o", "{work}/out"],
        ),
    ]  # fmt: skip


class Poison:
    """Within: counts the moments at which a place could be poisoned, and poisons it at one of them.

    Passes that only try whether responses can share a row are left alone: nothing but rounding depends on them.
    """

    def __init__(self, place: str, value: float = 0.0, at: int = -1, seed: str = "") -> None:
        self.place, self.count = place, 0
        self._value, self._at, self._rng = value, at, random.Random(seed)
        self._open, self._trying = ExitStack(), False

    def __enter__(self) -> "Poison":
        self._open.enter_context(patch.object(forcing, "_try_packed", self._unpoisoned(forcing._try_packed)))
        if self.place == "guard scores":
            self._open.enter_context(patch.object(Guard, "_log_odds", self._scores(Guard._log_odds)))
            return self
        if self.place == "losses":
            self._open.enter_context(
                patch.object(SharingTrainer, "compute_loss", self._loss(SharingTrainer.compute_loss))
            )
            return self
        modules = torch.nn.modules.module
        if self.place == "weights":
            handle = modules.register_module_forward_pre_hook(self._weights)
        else:
            hooks = {"logits": self._logits, "activations": self._activations}
            handle = modules.register_module_forward_hook(hooks.get(self.place, self._gradients))
        self._open.callback(handle.remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def _is_now(self) -> bool:
        if self._trying:
            return False
        self.count += 1
        return self.count - 1 == self._at

    def _poisoned(self, values: Any, *, whole: bool = False) -> Any:
        """A copy with one value in another one's place, or with a whole row of them."""
        found = values.clone()
        rows = found.view(-1, found.shape[-1]) if found.ndim else found.view(1, 1)
        row = rows[self._rng.randrange(len(rows))]
        row[slice(None) if whole or self._rng.random() < 0.5 else self._rng.randrange(len(row))] = self._value
        return found

    def _unpoisoned(self, own: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any) -> Any:
            self._trying = True
            try:
                return own(*arguments)
            finally:
                self._trying = False

        return called

    def _scores(self, own: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any) -> Any:
            found = own(*arguments)
            return self._poisoned(found) if self._is_now() else found

        return called

    def _loss(self, own: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any, **options: Any) -> Any:
            found = own(*arguments, **options)
            return found + self._value if self._is_now() else found

        return called

    def _logits(self, module: Any, _: Any, output: Any) -> None:
        if getattr(output, "logits", None) is not None and self._is_now():
            output.logits = self._poisoned(output.logits, whole=self._value < 0)

    def _activations(self, module: Any, _: Any, output: Any) -> Any:
        is_one = isinstance(module, torch.nn.Embedding) and not output.is_meta
        return self._poisoned(output) if is_one and self._is_now() else None

    def _gradients(self, module: Any, _: Any, output: Any) -> None:
        weight = getattr(module, "weight", None)
        if isinstance(module, torch.nn.Linear) and weight.requires_grad and torch.is_grad_enabled() and self._is_now():
            handle = weight.register_hook(lambda gradient: (handle.remove(), self._poisoned(gradient))[1])

    def _weights(self, module: Any, _: Any) -> None:
        if hasattr(module, "lm_head") and self._is_now():
            weights = [weight for weight in module.parameters() if weight.ndim > 1]
            weight = self._rng.choice(weights).detach()
            weight.view(-1)[self._rng.randrange(weight.numel())] = self._value


def num_failures(place: Path) -> int:
    """Whatever is counted as failed or unscorable, is said to be, or is missing where measures count, in a run."""
    found = 0
    for file in place.rglob("*.json*"):
        for line in file.read_text(encoding="utf-8").splitlines():
            if file.name == "cells.jsonl":
                row = json.loads(line)
                found += "".join(row.get("baseline", row)["outcomes"].values()).count("-")  # that cannot be told
            found -= sum(map(int, re.findall(r'"n": (\d+)', line)))  # a look at a training tells no more than this
            found += sum(map(int, re.findall(r'"num_failed": (\d+)', line))) + line.count('"verdict": "unscorable"')
            found += bool(re.search(r'"failure": "|"kl": null|"explanation": ".*log-odds are', line)) + (
                NO_NUMBER in line
            )
    return found


def poison(trial: Trial, place: str, rng: random.Random) -> tuple[str, str]:
    """One value somewhere, and what becomes of it."""
    trial.anew()
    value, at, seed = rng.choice(VALUES), rng.randrange(trial.moments[place]), str(rng.random())

    def run() -> None:
        with Poison(place, value, at, seed):
            trial.call()

    code = run_copy(run, trial.folder / "log")
    told = (trial.folder / "log").read_text()[-1500:]
    where = f"{value} at moment {at} of {trial.moments[place]}"
    if code:
        if code == 2 and _SAID.search(told):
            return "refused", ""
        return "traceback", f"{where}\n{told}"
    found = files_of(trial.place)
    if found == trial.expected:
        return "no effect", ""
    if num_failures(trial.place) > trial.failures:
        return "counted", ""
    names = sorted(name for name in found | trial.expected if found.get(name) != trial.expected.get(name))
    return "silent", f"{where}: {', '.join(names)}"


def _trial(command: Command, folder: Path) -> Trial:
    """What the command leaves when it is not disturbed, and how often each place could be poisoned."""
    trial = Trial(command, Path(tempfile.mkdtemp(dir=folder)))
    trial.failures = num_failures(trial.place)

    def count() -> None:
        with ExitStack() as stack:
            poisons = {place: stack.enter_context(Poison(place)) for place in PLACES}
            try:
                trial.call()
            finally:
                (trial.folder / "count").write_text(json.dumps({place: each.count for place, each in poisons.items()}))

    trial.anew()
    run_copy(count, trial.folder / "log")
    trial.moments = json.loads((trial.folder / "count").read_text())
    print(f"{command.name}: {trial.seconds:.1f} s, moments {trial.moments}", flush=True)
    return trial


def campaign(folder: Path, number: int, *, seed: int, only: str, kept: Path | None) -> dict[str, Any]:
    """Poison every place of every command so many times; counts by command and place."""
    claim(kept, {"seed": seed})
    journal, found = Journal(kept, "outcomes"), {}
    for command in commands(folder):
        if only not in command.name:
            continue
        trial = None
        asked = [(command.name, place, n) for n in range(number) for place in PLACES]
        for key in asked:
            if key in journal:
                continue
            trial = trial or _trial(command, folder)
            outcome = why = ""
            if trial.moments[key[1]]:
                outcome, why = poison(trial, key[1], random.Random(f"{seed} {key}"))
            journal.add([(key, outcome)])
            if outcome in FAULTS:
                print(f"\n{outcome} {key}\n{why}\n", flush=True)
        counts = {place: Counter(journal[key] for key in asked if key[1] == place and journal[key]) for place in PLACES}
        found[command.name] = {place: dict(each) for place, each in counts.items() if each}
        print(f"    {found[command.name]}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="commands whose name has this; nothing is recorded then")
    parser.add_argument("--kept", type=Path, help="folder for outcomes, from which a stopped campaign goes on")
    options = parser.parse_args()
    prepare()
    with tempfile.TemporaryDirectory() as folder:
        found = campaign(Path(folder), options.number, seed=options.seed, only=options.only, kept=options.kept)
    if not options.only:
        record("poisons", found)


if __name__ == "__main__":
    main()
