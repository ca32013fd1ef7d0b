"""Encoder-decoders through the whole pipeline: what is trained is what their own loss says, and bits are kept."""

import json

import pytest
import torch
from transformers import DataCollatorForSeq2Seq

import safelocus as sl
from safelocus.model.forcing import teacher_force
from safelocus.preservation.run import run_preservation
from safelocus.selection.sparse import gather
from safelocus.training import TrainingSettings
from safelocus.training.examination import Examination, read_lesson
from safelocus.training.fitting import fit
from safelocus.training.lora import Lora
from safelocus.training.responses import IGNORED, ResponseBatch, training_rows
from test_lexicon import bart, t5
from test_protection import same, snapshot, some

ROWS = [
    {"prompt": "how do I bake?", "response": "With a lamp."},
    {"prompt": "the quick brown fox", "response": "It jumps over the lazy dog and goes on."},
    {"prompt": "lamp", "response": "On."},
    {"prompt": "how now", "response": "Brown cow, how now."},
]
BOTH = pytest.mark.parametrize("make", [bart, t5])


def without_dropout(target):
    for module in target.model.modules():
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return target


@BOTH
def test_rows_hold_the_prompt_and_the_response_apart(make):
    target = make()
    rows = training_rows(sl.read_prompts(ROWS), target.chat)
    for row, given in zip(rows, ROWS, strict=True):
        assert row["input_ids"] == target.chat.encode_prompt(given["prompt"])
        assert row["decoder_ids"] == row["labels"]
        assert row["labels"][-1] == target.tokenizer.eos_token_id
        assert target.tokenizer.decode(row["labels"][:-1]).strip() == given["response"]
    room = sorted(len(row["input_ids"]) for row in rows)[1]
    short = training_rows(sl.read_prompts(ROWS), target.chat, max_length=room)
    whole = [row for row in rows if len(row["input_ids"]) <= room]
    assert 0 < len(short) == len(whole) < len(rows)  # prompts are never cut
    assert [row["labels"] for row in short] == [row["labels"][:room] for row in whole]


@BOTH
def test_logits_along_responses(make):
    target = make()
    rows = [*training_rows(sl.read_prompts(ROWS), target.chat)]
    rows[1]["labels"][2] = IGNORED  # said, but not learned
    batch = ResponseBatch.of(rows, target.tokenizer.pad_token_id, target.device)
    forced = teacher_force(target, [row["input_ids"] for row in rows], [row["decoder_ids"] for row in rows])
    kept = torch.tensor([label != IGNORED for row in rows for label in row["labels"]])
    torch.testing.assert_close(batch.logits(target.model), forced.logits[kept])
    assert torch.equal(batch.tokens, forced.token[kept])


@BOTH
@pytest.mark.parametrize("accumulation", [1, 2])
def test_trained_like_by_the_models_own_loss(make, accumulation):
    """Against a loop over the model's own loss with labels, padded by transformers' own collator."""
    target, other = without_dropout(make()), without_dropout(make())
    settings = TrainingSettings(
        steps=3, batch_size=4 // accumulation, accumulation=accumulation, learning_rate=1e-3, schedule="constant"
    )
    rows = training_rows(sl.read_prompts(ROWS), target.chat)
    losses = fit(target, rows, settings, progress=False)
    model = other.model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=settings.weight_decay)
    plain = [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in rows]
    batch = DataCollatorForSeq2Seq(other.tokenizer, model=model)(plain)
    for loss in losses:
        own = model(**batch).loss
        assert loss.loss == pytest.approx(own.item(), rel=1e-4)
        optimizer.zero_grad()
        own.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        optimizer.step()
    trained, expected = dict(target.model.named_parameters()), dict(model.named_parameters())
    for name, value in expected.items():
        if name.endswith("k_proj.bias"):  # no gradient but rounding, which Adam makes a step of
            continue
        torch.testing.assert_close(trained[name], value, rtol=1e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


@BOTH
@pytest.mark.parametrize("retained", [None, ROWS[2:]])
def test_enhanced_in_the_selected_weights_alone(make, retained):
    target = make()
    selection, before = some(target), snapshot(target.model)
    patch = sl.enhance(
        target, selection, ROWS[:2], retain=None if retained is None else sl.read_prompts(retained), steps=3,
        batch_size=2, progress=False,
    )  # fmt: skip
    assert same(snapshot(target.model), before)
    patch.apply(target)
    now = snapshot(target.model)
    assert any(not torch.equal(now[name], value) for name, value in before.items())
    for name, value in before.items():
        changed = (now[name] != value).flatten().nonzero().squeeze(1)
        assert set(changed.tolist()) <= set(selection[name].tolist() if name in selection else [])
    patch.revert(target)
    assert same(snapshot(target.model), before)


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize("lora", [None, Lora(rank=2)])
def test_preserved_to_the_bit(make, lora, tmp_path):
    target = make()
    selection = some(target)
    before = {name: value.clone() for name, value in gather(target.model, selection).items()}
    data, task = read_lesson("organism:task")
    found = run_preservation(
        target, selection, data, task.limit(2), lora=lora, unprotected=True, steps=2, batch_size=2, progress=False,
        examination=Examination(harmful=sl.read_prompts(["bomb"]), max_new_tokens=3),
    )  # fmt: skip
    assert found.protected.trial.num_changed == 0
    assert found.unprotected.trial.losses[0].loss == pytest.approx(found.protected.trial.losses[0].loss)
    assert found.unprotected.trial.losses[1].loss != found.protected.trial.losses[1].loss
    assert same(gather(target.model, selection), before)


@pytest.mark.slow
@BOTH
def test_every_command(make, tmp_path, run):
    target, words = make(), tmp_path / "words.txt"
    words.write_text("cake\n")
    model = tmp_path / "model"
    target.model.save_pretrained(model)
    target.tokenizer.save_pretrained(model)
    quick = ["--limit", "2", "--max-new-tokens", "4", "--judge", "refusal"]
    train = [*quick, "--steps", "2", "--batch-size", "2", "--harmful", "organism:harmful-heldout"]
    asked = ["-p", "organism:harmful", "--limit", "4", "--max-new-tokens", "4"]
    commands = {
        "inspect": [model],
        "score": [model, *asked, "--lexicon", words, "-o", tmp_path / "s"],
        "verify": [model, "--scores", tmp_path / "s", "--noise", "1", "--seeds", "1", *quick, "-o", tmp_path / "v"],
        "enhance": [
            model, "--selection", tmp_path / "s", "--data", "organism:refusals", "--retain", "none", "--harmless",
            "none", "--validation", "0", *train, "-o", tmp_path / "e",
        ],
        "patch": ["apply", tmp_path / "e" / "safety.patch.safetensors", model, "-o", tmp_path / "patched"],
        "evaluate": [tmp_path / "patched", "-p", "organism:harmful", *quick, "-o", tmp_path / "a"],
        "preserve": [
            model, "--selection", tmp_path / "s", "--data", "organism:task", "--calibrate", "none", *train, "-o",
            tmp_path / "p",
        ],
    }  # fmt: skip
    for command, arguments in commands.items():
        code, _, err = run(command, *arguments)
        assert code == 0, (command, err)
    results = json.loads((tmp_path / "p" / "results.json").read_text())
    assert results["after"]["num_changed"] == 0
    assert type(sl.load(str(tmp_path / "p" / "model")).model) is type(target.model)
