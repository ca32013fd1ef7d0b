"""The vocabulary transfer, against autograd through one-hot inputs and against brute force."""

import copy
import gc
import json
from dataclasses import replace

import pytest
import torch
from tokenizers import processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from safelocus.errors import ModelError
from safelocus.model.generation import Response
from safelocus.objective import Classifier, Guard, remake
from safelocus.objective.spelling import spell_vocabulary
from safelocus.objective.text import tokenize_around
from safelocus.objective.transfer import GuardReading
from tiny_targets import PROMPTS, byte_level, dense, guard, metaspace

RESPONSE = "Sure, here is how to bake a 東京 cake 😀"


def respond(target, text=RESPONSE):
    ids = tuple(target.tokenizer(text, add_special_tokens=False)["input_ids"])
    return Response(ids=ids, text=text, finished=True)


@pytest.mark.parametrize("tokenizer", [byte_level(), metaspace()], ids=["byte-level", "metaspace"])
def test_identity_equals_autograd_through_one_hot_inputs(tokenizer):
    """Same vocabulary: G is d score / d one-hot(response), exactly."""
    target = dense(tokenizer=tokenizer)
    judge = guard(tokenizer=target.tokenizer)
    responses = [respond(target), respond(target, "I'm sorry")]
    transfer = judge.transfer_for(target)
    assert transfer.variant == "identity"
    reading = judge.read(PROMPTS[:2], [r.text for r in responses], response_ids=[list(r.ids) for r in responses])
    aligned = transfer.align(reading, [transfer.response_text(r.ids)[1] for r in responses])
    gain = transfer.gain(aligned)

    expected, scores = [], []
    for prompt, response in zip(PROMPTS, responses, strict=False):
        tokenizer, model = judge.tokenizer, judge.model
        before = tokenizer(f"Request: {prompt}\nAnswer: ")["input_ids"]
        # no space before it, such as SentencePiece puts before a text by itself
        after = tokenizer("a\nVerdict:", add_special_tokens=False)["input_ids"][len(tokenizer.tokenize("a")) :]
        embedding = model.get_input_embeddings().weight
        one_hot = torch.nn.functional.one_hot(torch.tensor(response.ids), len(embedding)).float().requires_grad_()
        middle = one_hot @ embedding
        embeds = torch.cat([embedding[before], middle, embedding[after]])[None]
        logits = model(inputs_embeds=embeds).logits[0, -1]
        safe, unsafe = judge.verdict_ids
        score = torch.logsumexp(logits[safe], 0) - torch.logsumexp(logits[unsafe], 0)
        expected.append(torch.autograd.grad(score, one_hot)[0])
        scores.append(score.detach())
    torch.testing.assert_close(gain, torch.cat(expected), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(reading.score, torch.stack(scores), rtol=1e-5, atol=1e-6)


def test_an_answer_that_a_classifier_has_no_positions_for():
    tokenizer = byte_level(300, seed=1)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=24,
    )  # fmt: skip
    judge = Classifier(name="tiny", model=BertForSequenceClassification(config), tokenizer=tokenizer, unsafe=1)
    assert judge.read(["bake"], ["a cake"]).score.shape == (1,)
    with pytest.raises(ModelError, match=r"tiny has 24 positions, and \d+ tokens to read.*--max-new-tokens"):
        judge.read(["bake"], ["a cake of many words " * 5])


def test_a_padding_token_takes_positions_of_roberta():
    tokenizer = byte_level(300, seed=1)
    config = RobertaConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=24, pad_token_id=1, type_vocab_size=1,
    )  # fmt: skip
    judge = Classifier(name="tiny", model=RobertaForSequenceClassification(config), tokenizer=tokenizer, unsafe=1)
    assert judge.read(["bake"], ["zq" * 11]).score.isfinite().all()
    with pytest.raises(ModelError, match="has 22 positions, and 23 tokens"):
        judge.read(["bake"], ["zq" * 11 + "z"])


def test_an_empty_answer_of_which_a_classifier_reads_no_token_adds_nothing():
    tokenizer = byte_level(300, seed=1)
    judge = Classifier(name="tiny", model=decoder(tokenizer, pad_token_id=3), tokenizer=tokenizer, unsafe=1)
    reading = judge.read(["bake"] * 2, ["", "a cake"])
    assert reading.unread == (0,)
    assert reading.score[0] == 0
    torch.testing.assert_close(reading.score[1:], judge.read(["bake"], ["a cake"]).score)
    assert judge.read(["bake"], [""]).unread == (0,)


def test_tokens_of_spaces_keep_their_place_where_offsets_are_trimmed():
    tokenizer = copy.deepcopy(byte_level(300, seed=1))
    texts = ("a:\n    b  c", "  a ", "a\n\n\nb")
    for text in texts:
        given = {"prefix": "x", "response": text, "suffix": "y", "add_special_tokens": False}
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
        whole = tokenize_around(tokenizer, **given)
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
        trimmed = tokenize_around(tokenizer, **given)
        assert trimmed.response_positions == whole.response_positions
        assert all(start < end for start, end in trimmed.response_spans)


@pytest.mark.parametrize("guard_tokenizer", [byte_level(300, seed=1), metaspace()], ids=["byte-level", "metaspace"])
def test_character_variant_equals_brute_force(guard_tokenizer):
    """G_t[v] = sum over overlapping u of share(u, t) * <a_u, mean embedding of v's pieces>."""
    target = dense()
    judge = guard(tokenizer=guard_tokenizer)
    transfer = judge.transfer_for(target)
    assert transfer.variant == "character"
    response = respond(target)
    text, spans = transfer.response_text(response.ids)
    assert text == RESPONSE
    reading = judge.read(["bake"], [text])
    gain = transfer.gain(transfer.align(reading, [spans]))

    embedding = judge.model.get_input_embeddings().weight.detach()
    spelled = spell_vocabulary(target.tokenizer)
    for v in [*range(300, 330), *target.tokenizer("cake safe", add_special_tokens=False)["input_ids"]]:
        try:
            piece = spelled[v].decode()
        except UnicodeDecodeError:  # half a character; see the test of bytes below
            continue
        pieces = guard_tokenizer(f"\n{piece}", add_special_tokens=False)["input_ids"]
        newline = guard_tokenizer("\n", add_special_tokens=False)["input_ids"]
        assert pieces[: len(newline)] == newline
        mean = embedding[pieces[len(newline) :]].mean(0)
        for t in range(len(spans)):
            expected = torch.zeros(())
            for (left, right), a in zip(reading.spans[0], reading.gradients[0], strict=True):
                shared = max(0, min(right, spans[t][1]) - max(left, spans[t][0]))
                expected = expected + shared / max(1, right - left) * (a @ mean)
            torch.testing.assert_close(gain[t, v], expected, rtol=1e-4, atol=1e-6)


def test_half_characters_transfer_byte_by_byte():
    target, judge = dense(), guard(tokenizer=byte_level(300, seed=1))
    transfer = judge.transfer_for(target)
    spelled, guard_spelled = spell_vocabulary(target.tokenizer), spell_vocabulary(judge.tokenizer)
    v = next(i for i, piece in enumerate(spelled) if piece and piece[0] == 0xE6 and len(piece) < 3)
    aligned = torch.randn(1, 32)
    embedding = judge.model.get_input_embeddings().weight.detach()
    pieces = [guard_spelled.index(bytes([byte])) for byte in spelled[v]]
    torch.testing.assert_close(transfer.gain(aligned)[0, v], aligned[0] @ embedding[pieces].mean(0))


def test_every_guard_token_is_given_away_exactly_once():
    """Character alignment: the shares of a guard token over the target's positions sum to one."""
    target, judge = dense(), guard(tokenizer=byte_level(300, seed=1))
    transfer = judge.transfer_for(target)
    text, spans = transfer.response_text(respond(target, "here is how to build a kite").ids)
    reading = judge.read(["x"], [text])
    ones = GuardReading(score=reading.score, gradients=[torch.ones(len(reading.spans[0]), 1)], spans=reading.spans)
    assert transfer.align(ones, [spans]).sum().item() == pytest.approx(len(reading.spans[0]), rel=1e-5)


def test_template_tokens_do_not_shift_the_alignment():
    """Guard tokens of the response are found by characters: the request's length must not matter."""
    judge = guard()
    short, long = (judge.read([p], [RESPONSE]) for p in ("x", "a much longer request, <s> with specials <|end|>"))
    assert short.spans == long.spans
    covered = "".join(RESPONSE[left:right] for left, right in _distinct(short.spans[0]))
    assert covered.strip() == RESPONSE


def _distinct(spans):
    return list(dict.fromkeys(spans))


def test_index_variant_spreads_gains_over_pieces():
    target, judge = dense(), guard(variant="index")
    transfer = judge.transfer_for(target)
    response = respond(target, "bake a cake")
    text, spans = transfer.response_text(response.ids)
    reading = judge.read(["x"], [text])
    gain = transfer.gain(transfer.align(reading, [spans]))
    embedding = judge.model.get_input_embeddings().weight.detach()
    expected = torch.zeros_like(gain)
    for g, piece in enumerate(spell_vocabulary(judge.tokenizer)):
        if piece is None:
            token = judge.tokenizer.convert_ids_to_tokens(g)
            pieces = [target.tokenizer.get_vocab()[token]]
        else:
            try:
                pieces = target.tokenizer(piece.decode(), add_special_tokens=False)["input_ids"]
            except UnicodeDecodeError:
                continue
        for t in range(min(len(spans), len(reading.gradients[0]))):
            for v in pieces:
                expected[t, v] += (reading.gradients[0][t] @ embedding[g]) / len(pieces)
    bytes_only = [g for g, p in enumerate(spell_vocabulary(judge.tokenizer)) if p and len(p) == 1 and p[0] > 127]
    keep = torch.ones(gain.shape[1], dtype=torch.bool)
    keep[[target.tokenizer.get_vocab()[judge.tokenizer.convert_ids_to_tokens(g)] for g in bytes_only]] = False
    torch.testing.assert_close(gain[:, keep], expected[:, keep], rtol=1e-4, atol=1e-5)


def test_logit_gradient_is_that_of_the_relaxed_score():
    target, judge = dense(), guard()
    transfer = judge.transfer_for(target)
    logits = torch.randn(7, transfer.target_vocabulary, requires_grad=True)
    aligned = torch.randn(7, 32)
    tau = 0.3
    (transfer.gain(aligned) * torch.softmax(logits / tau, -1)).sum().backward()
    slope = transfer.logit_gradient(logits.detach(), aligned, tau=tau)
    torch.testing.assert_close(slope, logits.grad, rtol=1e-4, atol=1e-5)


def test_gumbel_noise_comes_from_its_seed():
    transfer = guard().transfer_for(dense())
    logits, aligned = torch.randn(3, transfer.target_vocabulary), torch.randn(3, 32)
    draw = lambda seed: transfer.logit_gradient(  # noqa: E731
        logits, aligned, tau=0.3, seeds=[seed, seed + 1, seed + 2]
    )
    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_guard_collects_no_gradients():
    target, judge = dense(), guard()
    judge(target, PROMPTS[:2]).sum().backward()
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in judge.model.parameters())
    assert target.model.model.layers[0].mlp.up_proj.weight.grad is not None


def test_memory_is_linear_in_the_vocabulary():
    """The map between vocabularies is a ragged list of ids: a few per token, never one per pair."""
    for variant in ("character", "index"):
        pieces = guard(variant=variant).transfer_for(dense())._pieces
        assert pieces.ids.numel() < 8 * pieces.offsets.numel()


def decoder(tokenizer, **changes):
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        initializer_range=0.2, **changes,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForSequenceClassification(config)


@pytest.mark.parametrize("padding", [None, 3])
def test_a_decoder_classifies_an_answer_alone_as_in_a_batch(padding):
    """By each answer's last token, whatever padding its configuration knows of."""
    tokenizer = byte_level(300, seed=1)
    judge = Classifier(name="tiny", model=decoder(tokenizer, pad_token_id=padding), tokenizer=tokenizer, unsafe=1)
    answers = ["a cake", "a much longer answer about a cake and a kite"]
    alone = torch.cat([judge.read(["bake"], [answer]).score for answer in answers])
    torch.testing.assert_close(judge.read(["bake"] * 2, answers).score, alone)
    cut = torch.cat([judge.read(["bake"], [answer[:-1]]).score for answer in answers])
    assert not torch.isclose(cut, alone).any()


@pytest.mark.parametrize(
    ("labels", "unsafe", "index"),
    [
        (["safe", "toxic"], None, 1),
        (["LABEL_0", "LABEL_1"], None, None),
        (["LABEL_0", "LABEL_1"], "label_0", 0),
        (["safe", "toxic"], "toxik", None),
        (["toxicity"], None, 0),
        (["toxicity"], "toxik", None),
        (["LABEL_0"], None, None),  # a reward, perhaps, of which more is better
    ],
)
def test_the_unsafe_label_is_never_guessed(tmp_path, labels, unsafe, index):
    tokenizer = byte_level(300, seed=1)
    decoder(tokenizer, id2label=dict(enumerate(labels))).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    if index is None:
        with pytest.raises(ModelError, match=r"which label is unsafe\? It has .*--unsafe-label"):
            Classifier.load(tmp_path, unsafe=unsafe)
    else:
        assert Classifier.load(tmp_path, unsafe=unsafe).unsafe == index


@pytest.mark.parametrize(
    ("variant", "message"), [("charakter", "expected one of identity, character, index"), ("identity", "differs")]
)
def test_a_transfer_that_is_none_is_refused(variant, message):
    with pytest.raises(ModelError, match=message):
        guard(variant=variant).transfer_for(dense())


def test_a_transfer_goes_with_its_tokenizer():
    """Another one may get the same place in memory."""
    judge, target = guard(), dense()
    target = replace(target, tokenizer=copy.deepcopy(target.tokenizer))
    assert judge.transfer_for(target) is judge.transfer_for(target)
    assert len(judge._transfers) == 1
    judge.variant = "index"
    assert judge.transfer_for(target).variant == "index"
    wider = replace(target, model=dense(vocab_size=400).model)
    assert judge.transfer_for(wider).target_vocabulary == 400
    del target, wider
    gc.collect()
    assert len(judge._transfers) == 0


def test_a_guard_is_known_by_its_chat_template_and_tokenizer():
    reader = guard()
    asked = replace(reader, preset=replace(reader.preset, format="chat", text=None))
    told = copy.deepcopy(asked.tokenizer)
    told.chat_template = told.chat_template.replace("<|end|>", "!")
    retold, resplit = replace(asked, tokenizer=told), replace(asked, tokenizer=byte_level(300))
    for other in (retold, resplit):
        assert not other.is_the_one(asked.describe())
        assert other.identity() != asked.identity()
        assert other.identity_of_reader() != asked.identity_of_reader()
    told.truncation_side = "left"
    told(["a", "a cake"], padding=True, truncation=True, max_length=4)
    assert replace(retold, tokenizer=told).describe() == retold.describe()
    # a template is no part of what a text is asked with
    assert replace(reader, tokenizer=told).is_the_one(reader.describe())


def test_a_classifier_is_made_anew_with_its_kind_of_labels(tmp_path):
    tokenizer = byte_level(300, seed=1)
    decoder(tokenizer, id2label={0: "safe", 1: "toxic"}).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    made = Classifier.load(tmp_path)
    assert not made.multi_label
    described = replace(made, multi_label=True).describe()
    assert remake(described).describe() == described
    assert not made.is_the_one(described)


def test_an_objective_is_made_anew_of_the_very_model(tmp_path):
    """Its name alone does not say which it was: neither after its weights changed, nor as it is asked otherwise."""
    reader = guard()
    reader.tokenizer.save_pretrained(tmp_path / "guard")
    reader.model.save_pretrained(tmp_path / "guard")
    description = tmp_path / "mine.toml"
    text = 'name = "a"\nformat = "text"\ntext = "{prompt} {response} Verdict:"\nsafe = [" safe"]\nunsafe = [" unsafe"]'
    description.write_text(text)
    described = json.loads(json.dumps(Guard.load(tmp_path / "guard", description=description).describe()))
    assert remake(described, description=description).describe() == described
    description.write_text(text.replace("Verdict", "Opinion"))
    with pytest.raises(ModelError, match="not the guard that the scores were made with"):
        remake(described, description=description)
    description.write_text(text)
    guard(seed=2).model.save_pretrained(tmp_path / "guard")
    with pytest.raises(ModelError, match="not the guard that the scores were made with"):
        remake(described, description=description)
    earlier = {name: value for name, value in described.items() if name not in ("weights", "preset_hash")}
    assert remake(earlier, description=description).name == described["name"]
