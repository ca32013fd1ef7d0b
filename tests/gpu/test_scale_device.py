"""The benchmark of speed runs on an accelerator, at a small size."""

import json

import pytest
import torch

from test_scale import check, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator on this machine"),
]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_stage_runs_on_an_accelerator(dtype):
    stages = ["scoring", "topk", "set", "spa", "patch"]
    sizes = ["--tokens", "8", "--step-tokens", "64"]
    output = run("--device", "cuda", "--dtype", dtype, *sizes, "--json", "--stages", *stages)
    check(output, stages)


def test_memory_of_an_accelerator_is_counted():
    output = run("--device", "cuda", "--kinds", "dense", "--json", "--stages", "memory")
    (row,) = json.loads(output.splitlines()[-1])
    assert 1 < row["on cpu"] < row["scoring"] < row["plain"]
