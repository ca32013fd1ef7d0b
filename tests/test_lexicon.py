"""S by a list of expressions: the sum over positions and sequences, its slope, and what a list becomes in tokens."""

import math
import weakref

import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration

import safelocus as sl
from safelocus.errors import ModelError, WordListError
from safelocus.model import forcing
from safelocus.model.generation import Response, generate, generate_from
from safelocus.model.target import Target
from safelocus.objective import describe, lexicon, remake
from safelocus.objective.lexicon import Lexicon
from safelocus.training.responses import IGNORED, own_answers, training_rows, without_listed
from tiny_targets import PROMPTS, byte_level, dense, metaspace, moe

WORDS = ["how", "quick brown", "lamp", "東京"]
SIZE = {"pad_token_id": 5, "bos_token_id": 0, "eos_token_id": 1, "d_model": 32}


def bart():
    tokenizer = byte_level()
    config = BartConfig(
        vocab_size=len(tokenizer), encoder_layers=1, decoder_layers=2, encoder_attention_heads=2, init_std=0.2,
        decoder_attention_heads=2, encoder_ffn_dim=40, decoder_ffn_dim=40, decoder_start_token_id=0, **SIZE,
    )  # fmt: skip
    torch.manual_seed(0)
    return Target.of(BartForConditionalGeneration(config), tokenizer, name="tiny-bart")


def t5():
    tokenizer = metaspace()
    config = T5Config(
        vocab_size=len(tokenizer), num_layers=2, num_heads=2, d_kv=16, d_ff=40,
        decoder_start_token_id=5, **SIZE,
    )  # fmt: skip
    torch.manual_seed(0)
    return Target.of(T5ForConditionalGeneration(config), tokenizer, name="tiny-t5")


TARGETS = pytest.mark.parametrize("make", [dense, moe, bart, t5])


def in_fp64(target, monkeypatch):
    """The target in double precision, norms and routers too, which are written to compute in single precision."""
    model = target.model.double()
    if "moe" in target.name:
        model.set_experts_implementation("eager")
    softmax = torch.nn.functional.softmax
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda x, dim=-1, **_: softmax(x, dim=dim))
    for norm in model.modules():
        if hasattr(norm, "variance_epsilon"):
            norm.forward = lambda x, n=norm: (
                n.weight * x * (x.pow(2).mean(-1, keepdim=True) + n.variance_epsilon).rsqrt()
            )
    return target


def probabilities(target, prompt, ids):
    """p(. | x, y_<t) for each t: the model run on one answer, without batch or padding."""
    before = target.chat.encode_prompt(prompt)
    if target.model.config.is_encoder_decoder:
        start = [target.model.config.decoder_start_token_id, *ids]
        logits = target.model(input_ids=torch.tensor([before]), decoder_input_ids=torch.tensor([start])).logits[0]
    else:
        logits = target.model(input_ids=torch.tensor([[*before, *ids]])).logits[0, len(before) - 1 :]
    return torch.softmax(logits, dim=-1)


def brute_force(target, prompt, ids, sequences):
    p = probabilities(target, prompt, ids)
    total = 0.0
    for sequence, weight in zip(sequences.ids, sequences.weights, strict=True):
        for t in range(len(ids) - len(sequence) + 1):
            total -= weight * math.prod(float(p[t + j, token]) for j, token in enumerate(sequence))
    return total


@TARGETS
def test_against_loops_over_positions_and_sequences(make, monkeypatch):
    target = in_fp64(make(), monkeypatch)
    objective = Lexicon.of(WORDS, max_new_tokens=9, similarity=0.3)
    found = objective(target, PROMPTS)
    sequences = objective.sequences_for(target)
    assert {1, 2, 3} <= {len(ids) for ids in sequences.ids}
    with torch.no_grad():
        answers = generate(target, PROMPTS, max_new_tokens=9)
        assert any(len(answer.answer_ids) == 9 for answer in answers)
        expected = [brute_force(target, p, a.answer_ids, sequences) for p, a in zip(PROMPTS, answers, strict=True)]
    assert found.tolist() == pytest.approx(expected, rel=1e-9)
    assert max(expected) < 0


@TARGETS
def test_gradient_against_finite_differences(make, monkeypatch):
    target = in_fp64(make(), monkeypatch)
    weights = [p for p in target.model.parameters() if p.ndim > 1]
    answers = [
        Response(ids=tuple(i % 300 for i in range(7 * n, 7 * n + length)), text="", finished=True)
        for n, length in enumerate((6, 1, 9, 0, 4), start=1)
    ]
    objective = Lexicon.of(WORDS, similarity=0.3)
    objective.score_responses(target, PROMPTS, answers).sum().backward()
    random = torch.Generator().manual_seed(3)
    directions = [0.1 * torch.randn(w.shape, dtype=w.dtype, generator=random) for w in weights]
    slope = sum(float((w.grad * d).sum()) for w, d in zip(weights, directions, strict=True) if w.grad is not None)

    def value(step):
        with torch.no_grad():
            for weight, direction in zip(weights, directions, strict=True):
                weight += step * direction
            found = float(objective.score_responses(target, PROMPTS, answers).sum())
            for weight, direction in zip(weights, directions, strict=True):
                weight -= step * direction
        return found

    step = 1e-5
    assert slope == pytest.approx((value(step) - value(-step)) / (2 * step), rel=1e-6)
    assert abs(slope) > 1e-6


def test_logits_are_widened_in_chunks(monkeypatch):
    """Of which one is kept, and the next is being made."""
    widened, most = [], []
    to, logsumexp = torch.Tensor.to, torch.Tensor.logsumexp

    def widen(tensor, *given, **options):
        made = to(tensor, *given, **options)
        if given == (torch.float32,):
            widened.append(weakref.ref(made))
        return made

    def count(tensor, *given, **options):
        most.append(sum(each() is not None for each in widened))
        return logsumexp(tensor, *given, **options)

    monkeypatch.setattr(lexicon, "_CHUNK_BYTES", 8 * 50)
    monkeypatch.setattr(torch.Tensor, "to", widen)
    monkeypatch.setattr(torch.Tensor, "logsumexp", count)
    rows = torch.zeros(9, dtype=torch.long)
    forced = forcing.Forced(logits=torch.zeros(9, 50, dtype=torch.bfloat16), token=rows, row=rows)
    lexicon._expected(forced, lexicon.TokenSequences(ids=((5,),), weights=(1.0,), num_neighbours=0), 1)
    assert len(most) == 9
    assert max(most) <= 2


def test_an_answer_that_holds_the_word_scores_lower():
    target = dense()
    objective = Lexicon.of(["cake"])
    with_it, without = (target.chat.encode_pair(PROMPTS[0], text)[1] for text in ("bake a cake or", "the quick dog;"))
    model = target.model
    with torch.no_grad():  # a model that says its tokens again
        model.lm_head.weight.copy_(8 * model.model.embed_tokens.weight)
    answers = [Response(ids=(*ids, *ids[-1:]), text="", finished=True) for ids in (with_it, without)]
    first, second = objective.score_responses(target, PROMPTS[:2], answers).tolist()
    assert first < second <= 0


def test_batches_and_empty_answers_make_no_difference():
    target = dense()
    objective = Lexicon.of(WORDS, max_new_tokens=6)
    together = objective(target, PROMPTS)
    alone = torch.cat([objective(target, [prompt]) for prompt in PROMPTS])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-9)
    empty = objective.score_responses(target, PROMPTS[:1], [Response(ids=(), text="", finished=True)])
    assert empty.tolist() == [0]
    empty.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in target.model.parameters())


def spelled(target, sequences):
    return {target.tokenizer.decode(ids).strip() for ids in sequences.ids}


def test_what_a_list_becomes_in_tokens():
    target = dense()
    tokenizer = target.tokenizer
    found = Lexicon.of(["cake", "quick brown"], similarity=None).sequences_for(target)
    assert len(set(found.ids)) == len(found.ids)
    assert set(found.weights) == {1.0}
    assert found.num_neighbours == 0
    texts = spelled(target, found)
    expected = {"cake", "Cake", "CAKE", "caking", "c-a-k-e", "c a k e", "c4ke", "quick brown", "QUICK-BROWN"}
    assert expected <= texts
    assert "cakes" not in texts  # holds "cake" already
    for context, text in (("a", " cake"), ("a\n", "cake")):
        head, joint = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (context, context + text))
        assert tuple(joint[len(head) :]) in found.ids
    for one in found.ids:
        for other in found.ids:
            assert one is other or not any(one[i : i + len(other)] == other for i in range(len(one))), (
                "holds another, which counts already"
            )


@pytest.mark.parametrize("similarity", [0.2, 0.35, 0.6])
def test_neighbours_by_enumeration(similarity):
    target = dense()
    shape, seeded = target.model.model.embed_tokens.weight.shape, torch.Generator().manual_seed(5)
    # one dimension large and alike everywhere, as real embeddings have: without standardising, all would be neighbours
    common = torch.nn.functional.one_hot(torch.tensor(3), shape[1]) * 50
    alike = torch.randn(shape[0], 12, generator=seeded) @ torch.randn(12, shape[1], generator=seeded)
    target.model.model.embed_tokens.weight.data[:] = alike + common
    tokenizer, weight = target.tokenizer, target.model.model.embed_tokens.weight.detach()
    (listed,) = tokenizer(" how", add_special_tokens=False)["input_ids"]
    objective = Lexicon.of(["how"], similarity=similarity)
    found = objective.sequences_for(target)
    alone = {ids[0] for ids in found.ids[: len(found.ids) - found.num_neighbours] if len(ids) == 1}
    spelled = [tokenizer.decode([i]) for i in range(len(tokenizer))]
    words = torch.stack(
        [weight[i] for i, text in enumerate(spelled) if len(text) > 2 and text[0] == " " and text[1:].isalpha()]
    )

    def standard(row):
        return (row - words.mean(dim=0)) / words.std(dim=0)

    expected = {}
    for token in range(len(tokenizer)):
        text = tokenizer.decode([token])
        if token in alone or token in tokenizer.all_special_ids or not text.startswith(" ") or not text[1:].isalpha():
            continue
        whole = [i for i in alone if tokenizer.decode([i]).startswith(" ")]
        cosine = max(float(torch.cosine_similarity(standard(weight[token]), standard(weight[i]), dim=0)) for i in whole)
        if len(text) > 2 and cosine >= similarity:
            expected[(token,)] = cosine
    assert listed in alone
    near = dict(zip(found.ids, found.weights, strict=True))
    assert {ids: w for ids, w in near.items() if w < 1} == pytest.approx(expected)
    assert len(expected) == found.num_neighbours
    assert similarity > 0.5 or expected


@pytest.mark.parametrize("make", [dense, bart])
def test_sequences_that_never_come(make):
    target = make()
    asked = [target.chat.encode_prompt(prompt) for prompt in PROMPTS]
    first = generate_from(asked, target, 12)
    single, pair = first[0].ids[:1], first[1].ids[2:4]
    again = generate_from(asked, target, 12, never=[single, pair])
    assert any(single[0] in each.ids for each in first)
    assert not any(single[0] in each.ids for each in again)
    assert not any(each.ids[start : start + 2] == pair for each in again for start in range(12))


def test_own_answers_hold_no_listed_expression():
    target = sl.load("organism:dense-unaligned")
    how = {"max_new_tokens": 12, "cut": True, "progress": False}
    lexicon = Lexicon.of(["sure", "here"], similarity=None)
    for given, found in ((None, 4), (lexicon, 0)):
        answers = own_answers(target, sl.read_prompts("organism:harmful").limit(4), lexicon=given, **how)
        assert sum(bool(lexicon.words.find(example.response)) for example in answers) == found


def test_listed_expressions_carry_no_loss():
    target = dense()
    rows = sl.read_prompts(
        [
            {"prompt": "how is the lamp?", "response": "The lamp is quick brown, how quick."},
            {"prompt": "lamp", "response": "It is on."},
        ]
    )  # fmt: skip
    encoded = training_rows(rows, target.chat)
    masked, remark = without_listed(encoded, Lexicon.of(["lamp", "quick brown"], similarity=None), target)
    tokenizer = target.tokenizer
    for before, after in zip(encoded, masked, strict=True):
        assert before["input_ids"] == after["input_ids"]
        assert all(new in (old, IGNORED) for old, new in zip(before["labels"], after["labels"], strict=True))
    learned = [tokenizer.decode([label for label in row["labels"] if label != IGNORED]) for row in masked]
    assert "lamp" not in learned[0]
    assert "quick brown" not in learned[0]
    assert "quick." in learned[0]  # part of an expression alone
    assert learned[1] == tokenizer.decode([label for label in encoded[1]["labels"] if label != IGNORED])
    lost = sum(a != b for old, new in zip(encoded, masked) for a, b in zip(old["labels"], new["labels"], strict=True))
    assert lost > 1
    assert remark.startswith(f"{lost} of ")


def test_what_it_says_of_itself_and_how_it_is_made_again(tmp_path):
    file = tmp_path / "words.txt"
    file.write_text("# brands\nzorbex\nred kite\n", encoding="utf-8")
    objective = Lexicon.load(file, similarity=0.7, max_new_tokens=12)
    said = describe(objective)
    assert {key: said[key] for key in ("kind", "name", "num_expressions", "similarity", "max_new_tokens")} == {
        "kind": "lexicon", "name": str(file), "num_expressions": 2, "similarity": 0.7, "max_new_tokens": 12,
    }  # fmt: skip
    assert said["num_spellings"] > 40
    assert "zorbex" not in str(said) + repr(objective)
    again = remake(said, device="cpu")
    assert describe(again) == said
    file.write_text("zorbex\n", encoding="utf-8")
    with pytest.raises(WordListError, match="not the 2 that the scores were made with"):
        remake(said)
    file.unlink()
    with pytest.raises(WordListError, match="cannot be read"):
        remake(said)
    with pytest.raises(WordListError, match="came from memory"):
        remake(describe(sl.Lexicon.of(["zorbex"])))
    with pytest.raises(WordListError, match=r"above 0 and at most 1 .* found 1\.5"):
        Lexicon.of(["zorbex"], similarity=1.5)


def test_what_the_tokenizer_cannot_write():
    target = bart()
    plain = target.tokenizer
    assert Lexicon.of(["Ωμέγα"]).sequences_for(target).ids  # bytes can write anything
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0, "<pad>": 1, "cake": 2, "a": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", pad_token="<pad>", eos_token="<pad>")
    target = Target.of(dense().model, tokenizer, template="{prompt}", name="few-words")
    assert Lexicon.of(["cake"]).sequences_for(target).ids == ((2,),)
    with pytest.raises(ModelError, match=r"line 2: the tokenizer of few-words cannot write this") as caught:
        Lexicon.of(["cake", "zorbex"]).sequences_for(
            Target.of(dense().model, tokenizer, template="{prompt}", name="few-words")
        )
    assert "zorbex" not in str(caught.value)
    assert plain.unk_token_id is None
