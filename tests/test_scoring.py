"""ESI and its relatives against brute force: plain autograd, sigma per logical matrix, dense sort."""

import dataclasses
import math

import pytest
import torch

import safelocus as sl
from safelocus.errors import ModelError, NumericalError, PromptError, ResourceError, RunError, SafelocusError
from safelocus.model import forcing
from safelocus.model.forcing import teacher_force
from safelocus.model.generation import generate
from safelocus.model.target import Target
from safelocus.run.resume import claim
from safelocus.scoring.gradients import GradientAccumulator, named_weights
from safelocus.scoring.run import METHODS
from tiny_targets import PROMPTS, byte_level, dense, guard, moe

KEYS = {  # tensor-name part -> how brute force cuts the tensor into logical matrices, written by hand
    "gate_up_proj": lambda w: [m for e in w for m in e.chunk(2, 0)],
    "experts.down_proj": lambda w: list(w),
}


def logical(name, tensor):
    for part, cut in KEYS.items():
        if name.endswith(part):
            return cut(tensor)
    return [tensor]


def is_eligible(name):
    return any(part in name for part in ("_proj", "experts.")) and "norm" not in name


def brute_force(target, objective, prompts):
    """One prompt at a time, whole-model gradients, no hooks."""
    model = target.model
    model.requires_grad_(True)
    total = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in model.named_parameters()}
    for prompt in prompts:
        model.zero_grad(set_to_none=True)
        objective(target, [prompt]).sum().backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                total[name] += parameter.grad.double() / len(prompts)
    model.zero_grad(set_to_none=True)
    scores = {}
    for name, parameter in model.named_parameters():
        if is_eligible(name):
            result = total[name].abs()
            for piece, weight in zip(logical(name, result), logical(name, parameter.detach()), strict=True):
                piece.mul_(weight.double().std(correction=0))
            scores[name] = result
    return scores, total


def dense_sort(scores, k):
    flat = torch.cat([tensor.flatten() for tensor in scores.values()])
    order = torch.argsort(flat, descending=True, stable=True)[:k]
    names = list(scores)
    sizes = torch.tensor([scores[name].numel() for name in names])
    starts = sizes.cumsum(0) - sizes
    owner = torch.bucketize(order, starts, right=True) - 1
    return {name: (order[owner == i] - starts[i]).sort().values for i, name in enumerate(names)}


@pytest.mark.parametrize("make", [dense, moe])
@pytest.mark.parametrize("which", ["guard", "same-vocabulary-guard", "refusal"])
def test_esi_equals_brute_force(make, which):
    target = make()
    objective = {
        "guard": lambda: guard(),
        "same-vocabulary-guard": lambda: guard(tokenizer=target.tokenizer),
        "refusal": lambda: sl.Refusal(refusals=["I'm sorry"], compliances=["Sure"]),
    }[which]()
    expected, _ = brute_force(target, objective, PROMPTS)
    scores = sl.score(target, PROMPTS, objective=objective, batch_size=2, progress=False)
    assert list(scores.tensors) == list(expected)
    for name, tensor in scores.tensors.items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-3, atol=1e-5 * float(expected[name].max()))
    selection = scores.select(ratio=0.01)
    k = math.floor(0.01 * sum(p.numel() for p in target.model.parameters()))
    assert selection.k == k
    reference = dense_sort(expected, k)
    differing = sum(len(set(selection[name].tolist()) ^ set(indices.tolist())) for name, indices in reference.items())
    assert differing == 0


def test_objective_is_differentiated_as_stated():
    """The guard's transferred gradient equals plain autograd of sum_t <G_t, softmax(z_t / tau)>."""
    target, judge = dense(), guard()
    prompts = PROMPTS[:2]
    responses = generate(target, prompts, max_new_tokens=12)
    weight = target.model.model.layers[0].self_attn.v_proj.weight
    (found,) = torch.autograd.grad(judge.score_responses(target, prompts, responses).sum(), weight)

    transfer = judge.transfer_for(target)
    read = [transfer.response_text(r.ids) for r in responses]
    reading = judge.read(prompts, [text for text, _ in read])
    gain = transfer.gain(transfer.align(reading, [spans for _, spans in read]))
    forced = teacher_force(target, [target.chat.encode_prompt(p) for p in prompts], [list(r.ids) for r in responses])
    relaxed = (gain * torch.softmax(forced.logits / judge.tau, -1)).sum()
    (expected,) = torch.autograd.grad(relaxed, weight)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("make", [dense, moe])
def test_batch_size_order_and_padding_side_change_nothing(make):
    selections = []
    for batch_size, prompts, side in (
        (1, PROMPTS, "right"),
        (3, PROMPTS[::-1], "left"),
        (5, PROMPTS, "left"),
    ):
        target = make()
        target.tokenizer.padding_side = side
        scores = sl.score(target, prompts, objective=guard(), batch_size=batch_size, progress=False)
        selections.append(scores.select(ratio=0.02))
    for other in selections[1:]:
        assert selections[0].iou(other) > 0.995  # rounding at the boundary only


@pytest.mark.parametrize("make", [dense, moe])
def test_openings_behind_one_prompt_score_like_each_behind_its_own(make, monkeypatch):
    packed = sl.score(make(), PROMPTS, objective=sl.Refusal(), batch_size=2, progress=False)
    monkeypatch.setattr(forcing, "_takes_packed", lambda *_: False)
    singly = sl.score(make(), PROMPTS, objective=sl.Refusal(), batch_size=2, progress=False)
    torch.testing.assert_close(torch.tensor(packed.per_prompt), torch.tensor(singly.per_prompt), rtol=0, atol=1e-5)
    assert packed.per_prompt != singly.per_prompt  # else both were the same
    assert packed.select(ratio=0.01).iou(singly.select(ratio=0.01)) >= 0.99


@pytest.mark.parametrize("method", ["gradient", "snip", "magnitude"])
@pytest.mark.parametrize("make", [dense, moe])
def test_other_methods(make, method):
    target = make()
    objective = sl.Refusal(refusals=["I'm sorry"], compliances=["Sure"])
    _, gradient = brute_force(target, objective, PROMPTS)
    scores = sl.score(target, PROMPTS, objective=objective, method=method, progress=False)
    weights = dict(target.model.named_parameters())
    for name, tensor in scores.tensors.items():
        theta = weights[name].detach().double()
        expected = {
            "gradient": lambda g=gradient[name]: g.abs(),
            "snip": lambda g=gradient[name], w=theta: (g * w).abs(),
            "magnitude": lambda w=theta: w.abs(),
        }[method]()
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-3, atol=1e-5 * float(expected.max()))


@pytest.mark.parametrize("make", [dense, moe])
def test_wanda_sees_the_inputs_of_every_expert(make):
    """|theta_ij| ||X_j||, with X recomputed from module inputs, expert by expert."""
    target = make()
    scores = sl.score(target, PROMPTS, method="wanda", batch_size=5, max_new_tokens=6, progress=False)
    inputs = {}

    def keep(name):
        return lambda module, args: inputs.setdefault(name, []).append(args)

    handles = [
        module.register_forward_pre_hook(keep(name))
        for name, module in target.model.named_modules()
        if hasattr(module, "weight") or name.endswith("experts")
    ]
    with torch.no_grad():
        answers = {p: list(generate(target, [p], max_new_tokens=6)[0].ids) for p in PROMPTS}
        inputs.clear()
        for prompt, answer in answers.items():
            teacher_force(target, [target.chat.encode_prompt(prompt)], [answer])
    for handle in handles:
        handle.remove()
    weights = dict(target.model.named_parameters())
    for name, tensor in scores.tensors.items():
        weight = weights[name].detach()
        module = name.rpartition(".")[0]
        if "experts." not in name:
            x = torch.cat([args[0].flatten(0, -2) for args in inputs[module]])
            expected = weight.abs() * x.square().sum(0).sqrt()
        else:
            expected = torch.zeros_like(weight)
            gate_up = weights[f"{module}.gate_up_proj"].detach()
            for e in range(weight.shape[0]):
                x = torch.cat([h[(chosen == e).any(1)] for h, chosen, _ in inputs[module]])
                if name.endswith("down_proj"):
                    gate, up = (x @ gate_up[e].T).chunk(2, -1)
                    x = torch.nn.functional.silu(gate) * up
                expected[e] = weight[e].abs() * x.square().sum(0).sqrt()
        torch.testing.assert_close(tensor, expected, rtol=1e-3, atol=1e-5)


def test_random_depends_on_the_seed_only():
    target = dense()
    first, again, other = (
        sl.score(target, PROMPTS, method="random", seed=seed, progress=False).select(ratio=0.05) for seed in (1, 1, 2)
    )
    assert first.iou(again) == 1
    assert first.iou(other) < 0.2


@pytest.mark.parametrize("make", [dense, moe])
def test_the_model_comes_back_as_it_was(make):
    target = make()
    target.model.lm_head.weight.requires_grad_(False)
    before = target.fingerprint()
    required = {name: p.requires_grad for name, p in target.model.named_parameters()}
    sl.score(target, PROMPTS, objective=guard(), progress=False)
    sl.score(target, PROMPTS, method="wanda", max_new_tokens=4, progress=False)
    assert target.fingerprint().differences(before) == []
    assert {name: p.requires_grad for name, p in target.model.named_parameters()} == required
    assert all(p.grad is None for p in target.model.parameters())
    assert not target.model.lm_head._forward_pre_hooks
    assert not target.model._forward_pre_hooks


def test_a_model_left_in_training_mode_is_scored_as_it_is_used():
    target = dense(attention_dropout=0.3)
    scoring = {"objective": sl.Refusal(), "progress": False}
    expected = sl.score(target, PROMPTS, **scoring)
    found = sl.score(dataclasses.replace(target, model=target.model.train()), PROMPTS, **scoring)
    assert found.per_prompt == expected.per_prompt
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.tensors.items())
    assert target.model.training


def test_unrouted_experts_are_counted():
    target = moe()
    with torch.no_grad():  # equal logits: top-k takes the same two experts for every token
        target.model.model.layers[0].mlp.gate.weight.zero_()
    scores = sl.score(target, PROMPTS, objective=guard(), progress=False)
    tokens = {
        s.matrix: s.tokens for s in scores.statistics if s.layer == 0 and s.component == "down" and s.expert is not None
    }
    assert sorted(tokens.values())[:2] == [0, 0]
    for s in scores.statistics:
        if s.layer == 0 and s.expert is not None:
            assert (s.max == 0) == (s.tokens == 0)


def test_token_counts_leave_padding_out():
    target = moe()
    objective = sl.Refusal(refusals=["I'm sorry"], compliances=["Sure"])
    alone = [sl.score(target, [p], objective=objective, progress=False) for p in PROMPTS]
    together = sl.score(target, PROMPTS, objective=objective, batch_size=5, progress=False)
    for i, statistic in enumerate(together.statistics):
        if statistic.expert is not None:
            assert statistic.tokens == sum(scores.statistics[i].tokens for scores in alone)


def test_bf16_gradients_are_summed_in_fp32():
    """A sum in bf16 stops growing at 256 times its addend; ours must not."""
    target = dense()
    target.model.bfloat16()
    weights = named_weights(target.model, ["model.layers.0.mlp.up_proj.weight"])
    accumulator = GradientAccumulator(weights)
    (weight,) = weights.values()
    with accumulator.collecting(target.model):
        for _ in range(1000):
            weight.sum().backward()
    assert torch.equal(accumulator.sums["model.layers.0.mlp.up_proj.weight"], torch.full(weight.shape, 1000.0))


def test_a_callable_is_an_objective():
    def mean_logit(target, prompts):
        ids = [target.chat.encode_prompt(p) for p in prompts]
        return torch.stack([target.model(torch.tensor([i])).logits.mean() for i in ids])

    scores = sl.score(dense(), PROMPTS, objective=mean_logit, batch_size=2, progress=False)
    assert scores.provenance.objective["name"].endswith("mean_logit")
    assert len(scores.per_prompt) == len(PROMPTS)


def test_per_prompt_scores_are_in_the_prompts_order():
    target, judge = dense(), guard()
    scores = sl.score(target, PROMPTS, objective=judge, batch_size=2, progress=False)
    with torch.no_grad():
        expected = [float(judge(target, [prompt])) for prompt in PROMPTS]
    assert scores.per_prompt == pytest.approx(expected, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"method": "best"}, SafelocusError, "unknown"),
        ({}, SafelocusError, "needs an objective"),
        ({"objective": lambda t, p: torch.zeros(len(p))}, SafelocusError, "no gradient"),
        ({"objective": lambda t, p: torch.zeros(1, 2, requires_grad=True)}, SafelocusError, r"shape \(3,\)"),
        ({"objective": lambda t, p: 3.0}, SafelocusError, "found float"),
        (
            {"objective": lambda t, p: torch.full((len(p),), math.nan, requires_grad=True)},
            NumericalError,
            "batch 1 of 2",
        ),
        ({"batch_size": 0, "method": "random"}, SafelocusError, "at least 1"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        sl.score(dense(), PROMPTS, progress=False, **arguments)


def test_no_prompts():
    with pytest.raises(PromptError):
        sl.score(dense(), [], method="magnitude")


def test_nan_in_weights_names_the_tensor():
    target = dense()
    with torch.no_grad():
        target.model.model.layers[1].mlp.up_proj.weight[0, 0] = math.nan
    with pytest.raises(NumericalError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        sl.score(target, PROMPTS, objective=guard(), progress=False)


def test_infinite_gradient_names_tensor_and_batch():
    def explode(target, prompts):
        weight = target.model.model.layers[0].mlp.up_proj.weight
        # finite value, infinite slope
        return torch.stack([torch.sqrt((weight - weight.detach()).abs().sum()) for _ in prompts])

    with pytest.raises(NumericalError, match=r"infinite in batch 1 of 2 .* model\.layers\.0\.mlp\.up_proj\.weight"):
        sl.score(dense(), PROMPTS, objective=explode, progress=False)


def test_rows_bring_their_system_messages():
    rows = [{"prompt": text, "system": "Be brief."} for text in PROMPTS[:2]]
    expected = sl.score(dense_told("Be brief."), PROMPTS[:2], objective=sl.Refusal(), batch_size=1, progress=False)
    found = sl.score(dense(), sl.read_prompts(rows), objective=sl.Refusal(), batch_size=1, progress=False)
    assert all(torch.equal(value, expected.tensors[name]) for name, value in found.tensors.items())
    without = sl.score(dense(), PROMPTS[:2], objective=sl.Refusal(), batch_size=1, progress=False)
    assert found.per_prompt == expected.per_prompt != without.per_prompt
    one, none = sl.read_prompts([rows[0], {"prompt": "help"}]).texts
    assert (one, none) == (PROMPTS[0], "help")
    assert (one.system, none.system) == ("Be brief.", None)
    chat = dense_told("Be long.").chat
    assert "Be brief." in chat.render(one)
    assert "Be long." in chat.render(none)
    assert "Be mine." in chat.render(one, system="Be mine.")
    assert "Be" not in chat.render(one, system="")


def dense_told(system):
    target = dense()
    return Target.of(target.model, target.tokenizer, name=target.name, system=system)


def test_gumbel_noise_does_not_depend_on_batches():
    judge = guard(gumbel_seed=3)
    one, all_at_once = (
        sl.score(dense(), PROMPTS, objective=judge, batch_size=size, progress=False) for size in (1, len(PROMPTS))
    )
    for name, tensor in one.tensors.items():
        torch.testing.assert_close(all_at_once.tensors[name], tensor, rtol=1e-3, atol=1e-6 * float(tensor.max()))


@pytest.mark.parametrize("variant", ["character", "index"])
def test_prediction_against_finite_differences(variant, record_property):
    """Rank correlation of the predicted with the true change of the guard's score of relaxed answers.

    Vocabularies differ, so neither variant is exact; `benchmarks/transfer.py` reports the figures on
    the organisms. Here the prediction must only carry signal.
    """
    from scipy.stats import spearmanr

    target, judge = dense(), guard(tokenizer=byte_level(300, seed=1), variant=variant)
    prompts = PROMPTS[:3]
    responses = generate(target, prompts, max_new_tokens=12)
    weight = target.model.model.layers[1].mlp.down_proj.weight
    (gradient,) = torch.autograd.grad(judge.score_responses(target, prompts, responses).sum(), weight)
    transfer = judge.transfer_for(target)
    read = [transfer.response_text(r.ids) for r in responses]
    reading = judge.read(prompts, [text for text, _ in read])
    gain = transfer.gain(transfer.align(reading, [spans for _, spans in read]))

    def relaxed():
        forced = teacher_force(
            target, [target.chat.encode_prompt(p) for p in prompts], [list(r.ids) for r in responses]
        )
        return float((gain.double() * torch.softmax(forced.logits.double() / judge.tau, -1)).sum())

    picks = torch.randperm(weight.numel(), generator=torch.Generator().manual_seed(0))[:40]
    step, measured = 1e-2, []
    with torch.no_grad():
        for pick in picks.tolist():
            old = weight.view(-1)[pick].item()
            weight.view(-1)[pick] = old + step
            up = relaxed()
            weight.view(-1)[pick] = old - step
            measured.append((up - relaxed()) / (2 * step))
            weight.view(-1)[pick] = old
    assert spearmanr(gradient.view(-1)[picks].numpy(), measured).statistic > 0.99


def test_prompts_may_be_a_source(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("\n".join(PROMPTS))
    by_list = sl.score(dense(), PROMPTS, method="magnitude", progress=False)
    for source in (file, str(file)):
        assert sl.score(dense(), source, method="magnitude", progress=False).provenance == dataclasses.replace(
            by_list.provenance, prompts=str(file), prompts_hash=sl.read_prompts(file).hash
        )
    found = sl.score(dense(), "organism:harmful", method="magnitude", progress=False).provenance
    assert (found.prompts, found.num_prompts) == ("organism:harmful", len(sl.read_prompts("organism:harmful")))


def test_the_work_of_another_method_stays(tmp_path):
    claim(tmp_path, {"method": "esi"})
    (tmp_path / "work").touch()
    with pytest.raises(RunError, match="in method"):
        sl.score(dense(), PROMPTS, method="magnitude", checkpoint=tmp_path, progress=False)


@pytest.mark.parametrize("method", METHODS)
def test_a_device_that_is_not_there_is_refused_before_the_work(method):
    with pytest.raises(ResourceError, match=r"accumulate_on 'gpu': there is no such device here.*expected one such as"):
        sl.score(dense(), PROMPTS, objective=sl.Refusal(), method=method, accumulate_on="gpu", progress=False)


def test_too_little_memory_for_the_sums_says_what_to_try(monkeypatch):
    def exhausted(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "zeros_like", exhausted)
    with pytest.raises(ResourceError, match="--accumulate-on cpu"):
        sl.score(dense(), PROMPTS, objective=sl.Refusal(), progress=False)


@pytest.mark.parametrize("openings", [{"refusals": "I'm sorry"}, {"compliances": "Sure"}])
def test_one_text_is_no_list_of_openings(openings):
    with pytest.raises(ModelError, match="are several openings, found one text"):
        sl.Refusal(**openings)


def test_an_answer_without_a_verdict_adds_nothing(monkeypatch):
    """The other prompts' gradients are all that is left, and who listens is told."""
    heard = {}
    target, reader = dense(), guard()
    reader.on_responses = lambda prompts, _, scores: heard.update(zip(prompts, scores.tolist(), strict=True))
    reader.preset = dataclasses.replace(reader.preset, generate_until="Verdict:")
    monkeypatch.setattr(
        type(reader),
        "_write",
        lambda self, texts, marker: ["so" if PROMPTS[1] in text else f"so {marker}" for text in texts],
    )
    scored = {"objective": reader, "method": "gradient", "progress": False}
    found = sl.score(target, PROMPTS[:3], **scored)
    assert math.isnan(heard[PROMPTS[1]])
    assert found.per_prompt[1] == 0
    others = sl.score(target, [PROMPTS[0], PROMPTS[2]], **scored)
    assert [found.per_prompt[0], found.per_prompt[2]] == pytest.approx(others.per_prompt, abs=1e-4)
    for name, tensor in others.tensors.items():
        torch.testing.assert_close(found[name], tensor * 2 / 3, rtol=1e-3, atol=1e-6)
    with pytest.raises(ModelError, match=r"1 of 2 verdicts did not contain 'Verdict:'"):
        reader.verdicts(PROMPTS[:2], ["a", "b"])
    assert reader.read([PROMPTS[1]] * 8, list("abcdefgh")).unread == tuple(range(8))  # a whole batch of such answers
    monkeypatch.setattr(type(reader), "_write", lambda self, texts, marker: ["so"] * len(texts))
    with pytest.raises(ModelError, match=r"4 of 4 verdicts .* is preset 'tiny' the right one"):
        reader.read([PROMPTS[1]] * 4, list("abcd"))


def test_scores_are_the_readers_to_the_bit():
    heard = {}
    target, reader = dense(), guard()
    reader.on_responses = lambda prompts, _, scores: heard.update(zip(prompts, scores.tolist(), strict=True))
    found = sl.score(target, PROMPTS, objective=reader, progress=False)
    assert found.per_prompt == [heard[prompt] for prompt in PROMPTS]
