"""The benchmark of speed runs, at a size where nothing is to be learned from its figures."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "scale"


def run(*arguments: str) -> str:
    command = [sys.executable, str(BENCHMARK), "--sizes", "1M", "--rounds", "1", "--prompts", "4", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


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
def test_every_stage_compares_with_a_baseline_and_a_limit():
    stages = ["scoring", "topk", "set", "spa", "patch"]
    output = run("--device", "cpu", "--tokens", "4", "--step-tokens", "16", "--json", "--stages", *stages)
    check(output, stages)


@pytest.mark.slow
def test_memory_is_within_weights_sums_and_activations():
    (row,) = json.loads(
        run("--device", "cpu", "--kinds", "dense", "--json", "--stages", "memory").splitlines()[-1],
    )
    assert row["activations"] < row["scoring"] < row["plain"]
    assert row["SET"] < row["masked"]
