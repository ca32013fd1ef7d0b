"""A dataclass is a command: its fields are options in help, in run.toml and in the call of the library."""

from dataclasses import dataclass, fields
from inspect import signature
from pathlib import Path
from typing import Literal

import pytest
import tomli_w
import typer
from typer.testing import CliRunner

import safelocus as sl
from safelocus.cli import app, enhance, evaluate, options, patch, preserve, score, select, stability, verify
from safelocus.cli.command import Options, RunOptions, argument, command, flag, option
from safelocus.enhancement.run import enhancer, run_enhancement
from safelocus.errors import RunError
from safelocus.patch import diff
from safelocus.preservation.run import run_preservation
from safelocus.scoring.scores import Scores
from safelocus.training import TrainingSettings


@dataclass(frozen=True, kw_only=True)
class CutOptions(Options):
    share: float = option("What to keep.", "-s", default=0.5, max=1)
    kind: Literal["top", "bottom"] = option("Which end.", default="top")


@dataclass(frozen=True, kw_only=True)
class Cut(CutOptions, RunOptions):
    pages: list[Path] = argument("To cut.")
    scissors: str = option("With what.")
    glue: str | None = option("To mend with.", shown="spit")
    gently: bool = flag("Slowly.")
    kind: Literal["top", "bottom"] = "bottom"


@pytest.fixture
def cut():
    """Cut by a command line; returns what was given, or what was said."""
    app, found = typer.Typer(), []

    @app.command()
    @command
    def cut(given: Cut) -> None:
        """Cut pages."""
        found.append(given)

    def run(*words):
        result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
        return found.pop() if found else result.output

    return run


def test_fields_are_options(cut, tmp_path):
    given = cut("a", "b", "--scissors", "blunt", "-s", "0.25", "-o", tmp_path)
    assert (given.pages, given.scissors, given.glue, given.gently) == ([Path("a"), Path("b")], "blunt", None, False)
    assert given.part(CutOptions) == {"share": 0.25, "kind": "bottom"}


def test_help_has_them_in_order(cut):
    said = cut("--help")
    words = "Cut pages.", "--scissors", "--output", "--glue", "(spit)", "--gently", "--share", "bottom", "--seed"
    places = [said.index(word) for word in words]
    assert places == sorted(places)
    assert "--no-gently" in said
    assert "--no-overwrite" not in said  # which no run.toml says
    assert "Which end." in said  # a default of one's own keeps the help


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a", "-o", "x"], "Missing option '--scissors'"),
        (["a", "-o", "x", "--scissors", "s", "--share", "2"], "less than or equal to 1"),
        (["a", "-o", "x", "--scissors", "s", "--kind", "left"], "'left' is not one of 'top', 'bottom'"),
    ],
)
def test_wrong_ones_are_refused(cut, words, message):
    assert message in cut(*words)


def test_what_is_resolved_repeats_the_run(cut, tmp_path):
    given = cut("a", "--scissors", "blunt", "--gently", "--seed", "3", "-o", tmp_path)
    resolved = given.resolved()
    assert list(resolved)[:3] == ["command", "pages", "scissors"]
    assert resolved["pages"] == ["a"]
    assert {"output", "overwrite", "json", "config"}.isdisjoint(resolved)
    file = tmp_path / "run.toml"
    file.write_text(tomli_w.dumps({name: value for name, value in resolved.items() if value is not None}))
    again = cut("--config", file, "--share", "0.1", "-o", tmp_path)
    assert again.resolved() == resolved | {"share": 0.1}


def test_only_addresses_of_servers_are_cut_where_a_secret_may_be():
    nothing = dict.fromkeys(field.name for field in fields(evaluate.Evaluate))
    told = {"prompts": ["//data/my#set.jsonl"], "endpoint": "https://user:word@host/v1?token=abc"}
    found = evaluate.Evaluate(**nothing | told).resolved()
    assert (found["prompts"], found["endpoint"]) == (["//data/my#set.jsonl"], "https://host/v1")


def test_what_a_run_toml_says_is_taken_back_and_its_paths_are_read(cut, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (file := tmp_path / "run.toml").write_text('pages = ["~/a"]\nscissors = "~"\ngently = true\n')
    given = cut("--config", file, "--no-gently", "-o", "~/out")
    assert not given.gently
    assert cut("--config", file, "-o", "x").gently
    assert (given.pages, given.output, given.scissors) == ([tmp_path / "a"], tmp_path / "out", "~")


def test_no_number_is_nan_or_infinite(cut):
    with pytest.raises(RunError, match="--share -inf: expected a finite number"):
        cut("a", "-o", "x", "--scissors", "s", "--share", "-inf")


@pytest.mark.parametrize(
    ("group", "verbs"),
    [
        (options.PlaceOptions, [sl.load]),
        (options.ScheduleOptions, [TrainingSettings]),
        (score.ScoreOptions, [sl.score]),
        (score.RelaxOptions, [sl.Guard]),
        (select.PickOptions, [Scores.select]),
        (evaluate.AskOptions, [sl.evaluate]),
        (verify.DisturbOptions, [sl.verify]),
        (stability.CompareOptions, [sl.stability]),
        (enhance.RetainOptions, [run_enhancement, enhancer]),
        (preserve.ProtectOptions, [run_preservation]),
        (patch.DiffOptions, [diff]),
    ],
)
def test_groups_that_are_passed_on_are_what_the_library_takes(group, verbs):
    taken = {name for verb in verbs for name in signature(verb).parameters}
    assert {field.name for field in fields(group)} <= taken


def test_a_run_is_named_as_its_command():
    """So that `--config` takes the run.toml of the same command."""
    registered = {each.callback.__name__: signature(each.callback.__wrapped__) for each in app.registered_commands}
    kinds = {name: next(iter(known.parameters.values())).annotation for name, known in registered.items()}
    assert {name: kind.command_name for name, kind in kinds.items()} == {name: name for name in kinds}
