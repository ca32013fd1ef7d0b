"""`benchmarks/lexicon/projection.py`, against brute force: a step, less what lowers the objective, and nothing else."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import BartConfig, BartForConditionalGeneration, Trainer, TrainingArguments

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "lexicon"))
from projection import Projection

import safelocus as sl
from safelocus.errors import TrainingError
from tiny_targets import byte_level, dense

OPTIMIZERS = {
    "adamw": lambda weights: torch.optim.AdamW(weights, lr=1e-2, weight_decay=0.1),
    "sgd": lambda weights: torch.optim.SGD(weights, lr=0.5, momentum=0.9),
}


def ids(seed, size=3):
    return torch.randint(6, 300, (size, 9), generator=torch.Generator().manual_seed(seed))


def seq2seq():
    tokenizer = byte_level()
    config = BartConfig(
        vocab_size=len(tokenizer), d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=64, dropout=0.0,
        init_std=0.2, pad_token_id=5, bos_token_id=0, eos_token_id=1, decoder_start_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    return BartForConditionalGeneration(config)


MODELS = {"causal": lambda: dense().model, "encoder-decoder": seq2seq}


def risk(model, seed=7):
    """S: minus the probability of one token, everywhere."""
    return -torch.softmax(model(input_ids=ids(seed), labels=ids(8)).logits, dim=-1)[..., 42].mean()


def lessons(model, step):
    """The loss of a batch in which that token is what is to be learned."""
    labels = ids(step)
    labels[:, ::2] = 42
    return model(input_ids=ids(step), labels=labels).loss


def flat(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def slope(model):
    found = torch.autograd.grad(risk(model), list(model.parameters()), allow_unused=True)
    return torch.cat(
        [torch.zeros(p.numel()) if g is None else g.flatten() for p, g in zip(model.parameters(), found, strict=True)]
    )


def learn(model, optimizer, step):
    optimizer.zero_grad()
    lessons(model, step).backward()
    optimizer.step()


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("rule", OPTIMIZERS)
def test_a_step_loses_what_lowers_the_objective_and_nothing_else(kind, rule):
    model = MODELS[kind]()
    optimizer = OPTIMIZERS[rule](model.parameters())
    projection = Projection(optimizer, lambda: risk(model))
    for step in range(6):
        free, own = copy.deepcopy((model, optimizer.state_dict()))
        other = OPTIMIZERS[rule](free.parameters())
        other.load_state_dict(own)
        before, g = flat(model), slope(model)
        learn(free, other, step)
        learn(model, optimizer, step)
        u, projected = flat(free) - before, flat(model) - before
        expected = u - min(0.0, float(g @ u) / float(g @ g)) * g
        torch.testing.assert_close(projected, expected, rtol=1e-4, atol=1e-6)
        assert float(g @ projected) >= -1e-4 * float(g.norm() * projected.norm())
    assert projection.num_steps == 6
    assert projection.num_projected >= 4  # the lesson is what must not be learned


def test_a_step_that_does_not_lower_it_keeps_its_bits():
    free, model = dense().model, dense().model
    optimizers = [OPTIMIZERS["sgd"](each.parameters()) for each in (free, model)]
    projection = Projection(optimizers[1], lambda: -lessons(model, 0))
    for each, optimizer in zip((free, model), optimizers, strict=True):
        learn(each, optimizer, 0)
    assert (projection.num_steps, projection.num_projected) == (1, 0)
    assert torch.equal(flat(free), flat(model))


def test_what_must_not_be_learned_is_not_and_is_once_the_projection_is_removed():
    model = dense().model
    start = risk(model, 0).item()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with Projection(optimizer, lambda: risk(model, 0)):
        for _ in range(15):
            learn(model, optimizer, 0)
        held = risk(model, 0).item()
    for _ in range(15):
        learn(model, optimizer, 0)
    assert start - held < 0.05
    assert held - risk(model, 0).item() > 0.2


def test_a_lexicon_is_an_objective_for_it():
    target = dense()
    lexicon = sl.Lexicon.of(["cake"], max_new_tokens=4)
    optimizer = torch.optim.SGD(target.model.parameters(), lr=0.1)
    projection = Projection(optimizer, lambda: lexicon(target, ["bake a cake"]).mean())
    learn(target.model, optimizer, 0)
    assert projection.num_steps == 1


def trainer_of(model, folder):
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=4, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no", logging_strategy="no", learning_rate=1e-2,
        dataloader_pin_memory=False, lr_scheduler_type="constant",
    )  # fmt: skip
    rows = [{"input_ids": row.tolist(), "labels": [42] * 9} for row in ids(0, 16)]
    return Trainer(model=model, args=arguments, train_dataset=Dataset.from_list(rows))


def test_a_trainers_steps_are_projected_until_it_is_let_go(tmp_path):
    model = dense().model
    start = risk(model).item()
    trainer = trainer_of(model, tmp_path)
    with Projection(trainer, lambda: risk(model)) as projection:
        trainer.train()
    held = risk(model).item()
    assert projection.num_steps == 4
    assert projection.num_projected >= 2
    trainer.train()
    assert projection.num_steps == 4
    assert start - held < 0.5 * (held - risk(model).item())


@pytest.mark.parametrize(
    ("objective", "said"),
    [
        (lambda model: torch.tensor(1.0), "no trained weight"),
        (lambda model: risk(model).expand(3), "their mean"),
        (lambda model: risk(model) * float("nan"), "finite"),
        (lambda model: torch.ones(1, requires_grad=True).sum(), "no weight that the optimizer trains"),
    ],
)
def test_an_objective_that_is_none_is_an_error(objective, said):
    model = dense().model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    Projection(optimizer, lambda: objective(model))
    with pytest.raises(TrainingError, match=said):
        learn(model, optimizer, 0)


def test_only_what_takes_steps_is_projected():
    with pytest.raises(TrainingError, match="torch optimizer"):
        Projection(dense().model, lambda: torch.zeros(1))
