"""The examples run as they are, in a few steps."""

import runpy
import sys
from pathlib import Path

import pytest
import torch

import safelocus as sl
from safelocus.selection.sparse import gather

EXAMPLES = Path(__file__).parent.parent / "examples"


def example(monkeypatch, name, *arguments):
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    return runpy.run_path(str(EXAMPLES / name), run_name="__main__")


@pytest.fixture(scope="module")
def selection():
    target = sl.load("organism:dense")
    prompts = sl.read_prompts("organism:harmful").limit(8)
    return sl.score(target, prompts, objective=sl.Refusal(), batch_size=8, progress=False).select(ratio=0.01)


def preserve_with_trl(monkeypatch, tmp_path, selection):
    """Frozen, the selected weights keep their values, with an adapter too; otherwise they do not."""
    selection.save(tmp_path / "safety.safetensors")
    protected = ["--selection", tmp_path / "safety.safetensors"]
    frozen = [*protected, "--freeze"]
    kinds = {"kept": frozen, "adapted": [*frozen, "--lora"], "calibrated": protected, "plain": []}
    for kind, options in kinds.items():
        example(monkeypatch, "preserve_trl.py", "-o", tmp_path / kind, "--steps", 4, *options)
    values = gather(sl.load("organism:dense", dtype="float32").model, selection)
    for kind in kinds:
        found = gather(sl.load(tmp_path / kind).model, selection)
        same = [torch.equal(found[name], value) for name, value in values.items()]
        assert all(same) if kind in ("kept", "adapted") else not any(same), kind


RUN = {"preserve_trl.py": preserve_with_trl}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning")
@pytest.mark.parametrize("name", [path.name for path in sorted(EXAMPLES.glob("*.py"))])
def test_examples_run(name, monkeypatch, tmp_path, selection):
    RUN[name](monkeypatch, tmp_path, selection)
