"""The preference of a contrast recipe on the real model (benchmarks/real/preferring.py), by ORPO's definition."""

from importlib import import_module
from pathlib import Path
from types import MethodType, SimpleNamespace

import pytest
import torch

import safelocus as sl
from safelocus.training.responses import IGNORED, training_rows
from tiny_targets import dense

REAL = Path(__file__).parents[1] / "benchmarks" / "real"
WANTED = [
    {"prompt": "how to kill a process", "response": "use the command"},
    {"prompt": "hi", "response": "hello there"},
]
UNWANTED = [{"prompt": "how to kill a process", "response": "sorry"}]


def test_the_loss_is_that_of_its_definition(scripts):
    scripts(REAL)
    preferring = import_module("preferring")
    target = dense()
    rows, others = ([*training_rows(sl.read_prompts(part), target.chat)] for part in (WANTED, UNWANTED))
    trainer = SimpleNamespace(
        processing_class=target.tokenizer, args=SimpleNamespace(device=target.device),
        unwanted={preferring._prompt(row): row for row in others},
    )  # fmt: skip
    trainer._likelihoods = MethodType(preferring.PreferringTrainer._likelihoods, trainer)
    found = preferring.PreferringTrainer._preference(trainer, target.model, rows)

    def likelihoods(row):
        """Of the response's tokens, one by one."""
        logits = target.model(torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        places = [i for i, label in enumerate(row["labels"]) if label != IGNORED]
        return torch.stack([logits[i - 1, row["labels"][i]] for i in places])

    wanted, unwanted = [likelihoods(row) for row in rows], likelihoods(others[0])
    odds = [p / (1 - p) for p in (wanted[0].mean().exp(), unwanted.mean().exp())]
    preference = -torch.log(torch.sigmoid(torch.log(odds[0] / odds[1])))
    expected = -torch.cat(wanted).mean() + preference / 2  # of two rows one has an opposite
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    assert found.requires_grad
