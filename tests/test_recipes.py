"""The recipes: each is taken by its command as it stands, goes through every check before the long work, and fits."""

import json
import runpy
import tomllib
from pathlib import Path

import pytest

import safelocus.resources as resources
from safelocus.resources import Subject

REHEARSES = True
BUILD = runpy.run_path(str(Path(__file__).parents[1] / "docs" / "build_recipes.py"))
RECIPES = BUILD["recipes"]()
PAGE = BUILD["PAGE"].read_text(encoding="utf-8")


class Reached(SystemExit):
    """The long work would begin."""


@pytest.fixture
def stand_ins(tmp_path, monkeypatch):
    """The models of the recipes as folders without weights, and a task of one's own."""
    with BUILD["stand_ins"]() as folder:
        rows = [{"prompt": f"What is {i} plus one?", "response": str(i + 1)} for i in range(60)]
        (folder / "my-task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        yield folder


@pytest.fixture
def until_the_work(run, monkeypatch):
    """Run a command of a recipe up to where its run folder is made; returns what it said."""

    def until_the_work(recipe, *more):
        command = tomllib.loads(recipe.read_text(encoding="utf-8"))["command"]
        found = resources.find_device
        device = BUILD["DEVICES"][BUILD["model_of"](recipe)]

        def begin(given):
            assert given.resolved()["model"] in BUILD["MODELS"]
            raise Reached(77)

        with monkeypatch.context() as patched:
            patched.setattr(f"safelocus.cli.{command}.shared_run", begin)
            patched.setattr(resources, "find_device", lambda _: found(device))
            return run(command, "--config", recipe, *more, "-o", "runs/made")

    return until_the_work


@pytest.mark.parametrize("name", BUILD["MODELS"])
def test_the_stand_ins_have_the_published_sizes(name, stand_ins):
    assert Subject.load(name).num_weights == BUILD["MODELS"][name][0]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_reaches_the_long_work(recipe, stand_ins, until_the_work):
    """Options, prompts, checks that sets are apart, and the plan, by the command itself; only weights are missing."""
    code, _, err = until_the_work(recipe)
    assert code == 77, err
    assert "batch size" in err
    assert "no plan" not in err
    assert "does not fit" not in err


@pytest.mark.parametrize("recipe", [path for path in RECIPES if "preserve" in path.stem], ids=lambda path: path.stem)
def test_a_task_of_ones_own_is_asked_for(recipe, stand_ins, until_the_work):
    (stand_ins / "my-task.jsonl").unlink()
    code, _, err = until_the_work(recipe)
    assert code == 2
    assert "my-task.jsonl: no such file" in err


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_the_page_tells_how_to_run_every_recipe(recipe):
    assert f"`{recipe.stem}`" in PAGE
    command = tomllib.loads(recipe.read_text(encoding="utf-8"))["command"]
    assert f"safelocus {command} --config recipes/{recipe.name}" in PAGE


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2-enhance", "llama-3.1-8b-preserve", "qwen3-30b-a3b-score"])
def test_the_page_says_what_the_plan_says(name, stand_ins):
    recipe = next(path for path in RECIPES if path.stem == name)
    assert BUILD["row"](recipe, BUILD["planned"](recipe)) in PAGE


def test_a_recipe_is_planned_as_it_is_and_can_be_overridden(run, stand_ins):
    recipe = next(path for path in RECIPES if path.stem == "smollm2-enhance")
    code, out, err = run("plan", "--config", recipe, "--device", "24GB", "--json")
    assert code == 0, err
    ((name, stage),) = json.loads(out)["stages"].items()
    assert name == "enhance"
    assert f"enhance --config {recipe}" in stage["command"]
    assert stage["batch_size"] * stage["accumulation"] == 6
    code, out, _ = run("plan", "--config", recipe, "--device", "24GB", "--json", "--batch-size", 12)
    ((_, stage),) = json.loads(out)["stages"].items()
    assert stage["batch_size"] * stage["accumulation"] == 12
    assert run("plan", "smollm2", "--stage", "tune")[0] == 2
