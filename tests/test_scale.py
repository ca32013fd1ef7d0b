"""The benchmark of speed runs, at a size where nothing is to be learned from its figures."""

import contextlib
import io
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "scale"


@pytest.fixture
def run(monkeypatch, scripts):
    """The script, and the processes that it starts, all in this one, which has imported; returns what is printed."""

    def run(command, **_):
        monkeypatch.setattr(sys, "argv", command[1:])
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            runpy.run_path(command[1], run_name="__main__")
        return subprocess.CompletedProcess(command, 0, stdout=printed.getvalue())

    scripts(BENCHMARK)
    monkeypatch.setattr(subprocess, "run", run)
    script = [sys.executable, str(BENCHMARK), "--sizes", "1M", "--rounds", "1", "--prompts", "4"]
    return lambda *arguments: run([*script, *arguments]).stdout


def check(output: str, stages: list[str]) -> None:
    lines = output.splitlines()
    for stage in stages:
        rows = json.loads(lines[lines.index(stage) + 1])
        assert rows, stage
        for row in rows:
            assert row["ours"]["seconds"][0] > 0
            if row["what"] in ("passes", "step", "full", "top"):
                assert row["baseline"]["seconds"][0] > 0
            assert (row["limit"] is None) == (row["flops"] == row["bytes"] == 0)


@pytest.mark.slow
def test_every_stage_compares_with_a_baseline_and_a_limit(run):
    stages = ["scoring", "topk", "set", "spa", "patch"]
    output = run("--device", "cpu", "--tokens", "4", "--step-tokens", "16", "--json", "--stages", *stages)
    check(output, stages)


def test_memory_is_within_weights_sums_and_activations(run):
    (row,) = json.loads(
        run("--device", "cpu", "--kinds", "dense", "--json", "--stages", "memory").splitlines()[-1],
    )
    assert row["activations"] < row["scoring"] < row["plain"]
    assert row["SET"] < row["masked"]
