"""The examples run as they are, in a few steps."""

import runpy
import sys
from pathlib import Path

import pytest
import torch

import safelocus as sl
from safelocus.sparse import gather

EXAMPLES = Path(__file__).parent.parent / "examples"


def example(monkeypatch, name, *arguments):
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    return runpy.run_path(str(EXAMPLES / name), run_name="__main__")


@pytest.fixture(scope="module")
def selection():
    target = sl.load("organism:dense")
    prompts = sl.read_prompts("organism:harmful").limit(8)
    return sl.score(target, prompts, objective=sl.Refusal(), batch_size=8, progress=False).select(ratio=0.01)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning")
@pytest.mark.parametrize("kind", [(), ("--lora",)], ids=["full", "lora"])
def test_preserve_with_trl(monkeypatch, tmp_path, selection, kind):
    selection.save(tmp_path / "safety.safetensors")
    options = ["--steps", 3, *kind]
    example(monkeypatch, "preserve_trl.py", "-o", tmp_path / "plain", *options)
    example(
        monkeypatch,
        "preserve_trl.py",
        "-o",
        tmp_path / "kept",
        "--selection",
        tmp_path / "safety.safetensors",
        *options,
    )
    values = gather(sl.load("organism:dense", dtype="float32").model, selection)
    kept, plain = (gather(sl.load(tmp_path / name).model, selection) for name in ("kept", "plain"))
    assert all(torch.equal(kept[name], value) for name, value in values.items())
    assert not any(torch.equal(plain[name], value) for name, value in values.items())


def test_every_example_is_tested():
    tested = Path(__file__).read_text(encoding="utf-8")
    assert all(path.name in tested for path in EXAMPLES.glob("*.py"))
