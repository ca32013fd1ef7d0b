"""Evaluation and verification in several processes (gloo, CPU) against one: copies that share batches, and shards."""

import json

import pytest
import torch

import safelocus as sl
from safelocus import distributed
from safelocus.evaluation.tasks import task_of
from safelocus.prompts import read_prompts
from safelocus.verification.interventions import Noise, intervening
from several import odd, sharded, together
from test_sparse import some
from tiny_targets import PROMPTS, TEXT, guard, moe

MODELS = {"odd": odd, "moe": moe}
PAIRS = [{"prompt": f"{p} in a cake", "response": f"Sure, here {p[-n:]}"} for n, p in enumerate(PROMPTS)]
TOO_LONG = "a kite " * 200  # for positions of the tiny models


def measure_all(folder, shards):
    """What one process, or any number of them, make of the same inputs."""
    for name, make in MODELS.items():
        target = sharded(make()) if shards else make()
        before, held = target.fingerprint(), bits(target)
        evaluation = sl.evaluate(
            target, harmful=[*PROMPTS, TOO_LONG], harmless=TEXT[:1], tasks=task_of(read_prompts(PAIRS)),
            perplexity=read_prompts(PAIRS), judges=[judge()], batch_size=2, max_new_tokens=8, progress=False,
        )  # fmt: skip
        selection = some(target)
        found = sl.verify(
            target, selection, prompts=read_prompts(PROMPTS), noises=(2.0,), interventions=("noise", "zero"), seeds=2,
            batch_size=2, max_new_tokens=5, allow_mismatch=True, progress=False,
        )  # fmt: skip
        assert not before.differences(target.fingerprint())
        assert all(torch.equal(value, held[tensor]) for tensor, value in bits(target).items())
        with intervening(target, selection, Noise(3.0), seed=1):
            disturbed = target.fingerprint()
        results = {
            "evaluation": evaluation.to_json(), "rows": evaluation.rows, "verification": found.to_json(),
            "cells": [cell.to_line() for cell in found.cells], "disturbed": disturbed.to_json(),
        }  # fmt: skip
        (folder / f"{name}.{distributed.rank()}.json").write_text(json.dumps(results))


def judge():
    from safelocus.evaluation.judges import GuardJudge

    return GuardJudge(guard=guard())


def bits(target):
    model = target.model
    return {name: distributed.local(parameter.detach()).clone() for name, parameter in model.named_parameters()}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    measure_all(folder := tmp_path_factory.mktemp("alone"), False)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("num_processes", "shards"), [(2, False), (3, True)], ids=["copies", "shards"])
def test_several_processes_measure_what_one_does(alone, tmp_path, num_processes, shards):
    (many := tmp_path / "many").mkdir()
    together(num_processes, measure_all, many, shards)
    for name in MODELS:
        expected = json.loads((alone / f"{name}.0.json").read_text())
        assert len([row for row in expected["rows"] if row["failure"]]) == 1
        for rank in range(num_processes):
            found = json.loads((many / f"{name}.{rank}.json").read_text())
            for key, value in expected.items():
                assert found[key] == value, key
