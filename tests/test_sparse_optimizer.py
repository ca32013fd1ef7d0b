"""SparseOptimizer: on the selected weights it is the dense optimizer; every other bit stays."""

import io

import pytest
import torch

import safelocus as sl
from safelocus.enhancement.optimizer import SparseOptimizer
from safelocus.errors import NumericalError, SelectionError, TrainingError
from test_sparse import NAME, everything, some, transpose_storage, unchanged
from tiny_targets import dense, moe

ADAMW = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.9)}
MOMENTUM = {"lr": 1e-2, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True}
TIED = {"tie_word_embeddings": True}


def batches(number, length=9):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(6, 300, (2, length), generator=generator) for _ in range(number)]


def selecting(target, names):
    """All weights of these tensors, eligible or not."""
    tensors = target.layout.tensors
    coordinates = {name: torch.arange(tensors[name].num_weights) for name in names}
    return sl.Selection(coordinates=coordinates, layout=target.layout, only_eligible=False)


def train(model, optimizer, steps, *, accumulate=1, clip=None, schedule=False):
    """Steps with a linearly falling learning rate; returns the losses. `clip` is for a dense optimizer."""
    total = 2 * steps
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / total if schedule else 1.0)
    losses = []
    for step in range(steps):
        for ids in batches(steps * accumulate)[step * accumulate :][:accumulate]:
            loss = model(input_ids=ids, labels=ids).loss / accumulate
            loss.backward()
            losses.append(loss.item())
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        falling.step()
        optimizer.zero_grad()
    return losses


def changed(model, before):
    """Name -> flat indices of the weights whose bits are not those of `before`."""
    return {
        name: (bits != before[name]).flatten().nonzero().squeeze(1)
        for name, bits in everything(model).items()
        if not torch.equal(bits, before[name])
    }


def assert_only_selected(model, before, selection):
    for name, index in changed(model, before).items():
        assert torch.isin(index, selection[name]).all(), name


def assert_same(model, other):
    for (name, mine), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs), f"{name}: {(mine - theirs).abs().max():.2g}"


@pytest.mark.parametrize("make", [dense, moe, lambda: dense(**TIED)], ids=["dense", "moe", "tied"])
@pytest.mark.parametrize(("kind", "options"), [(torch.optim.AdamW, ADAMW), (torch.optim.SGD, MOMENTUM)])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_with_all_weights_it_is_the_dense_optimizer(make, kind, options, accumulate):
    target, reference = make(), make()
    how = {"steps": 5, "accumulate": accumulate, "schedule": True}
    expected = train(reference.model, kind(reference.model.parameters(), **options), clip=0.5, **how)
    selection = selecting(target, target.layout.tensors)
    assert selection.k == target.layout.num_weights
    with SparseOptimizer(target.model, selection, kind, max_grad_norm=0.5, **options) as optimizer:
        assert train(target.model, optimizer, **how) == expected
        assert optimizer.gradient_norm > 0.5  # it was clipped
    assert_same(target.model, reference.model)


@pytest.mark.parametrize("make", [dense, moe])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "options"), [(torch.optim.AdamW, ADAMW), (torch.optim.SGD, MOMENTUM)])
@pytest.mark.parametrize("strided", [False, True])
def test_only_selected_weights_change(make, dtype, kind, options, strided):
    target = make()
    target.model.to(dtype)
    if strided:
        transpose_storage(target.model)
    selection, before = some(target), everything(target.model)
    with SparseOptimizer(target.model, selection, kind, max_grad_norm=1.0, **options) as optimizer:
        losses = train(target.model, optimizer, 4)
        assert all(
            torch.equal(v, target.model.get_parameter(n).flatten()[selection[n]]) for n, v in optimizer.values().items()
        )
    assert losses[-1] != losses[0]
    assert_only_selected(target.model, before, selection)
    moved = sum(len(index) for index in changed(target.model, before).values())
    assert moved > 0.9 * selection.k  # bf16: a few roundings come back to where they were


def test_a_weight_moves_as_in_dense_training_of_the_same_weights():
    """Not only where, but what: masking the dense gradient gives the same bits."""
    target, reference = dense(), dense()
    selection = some(target)
    own = dict(reference.model.named_parameters())
    masks = {name: torch.zeros(own[name].shape) for name in own}
    for name, index in selection.coordinates.items():
        masks[name].view(-1)[index] = 1.0
    masked = torch.optim.AdamW(own.values(), lr=1e-2, weight_decay=0.0)
    for ids in batches(4):
        reference.model(input_ids=ids, labels=ids).loss.backward()
        for name, parameter in own.items():
            parameter.grad *= masks[name]
        masked.step()
        masked.zero_grad()
    with SparseOptimizer(target.model, selection, lr=1e-2, weight_decay=0.0) as optimizer:
        train(target.model, optimizer, 4)
    assert_same(target.model, reference.model)


def test_steps_below_the_resolution_of_bf16_add_up():
    target = dense()
    target.model.bfloat16()
    weight = target.model.get_parameter(NAME)
    with torch.no_grad():
        weight.fill_(1.0)
    selection = sl.Selection(coordinates={NAME: torch.tensor([3, 5])}, layout=target.layout)
    with SparseOptimizer(target.model, selection, torch.optim.SGD, lr=1e-4) as optimizer:
        for step in range(100):
            weight.float().sum().backward()  # a gradient of 1 everywhere
            optimizer.step()
            if step == 9:
                assert (weight == 1).all()  # 1 - 0.001 is 1 in bf16
    assert weight.view(-1)[[3, 5]].tolist() == [torch.tensor(0.99).bfloat16()] * 2
    assert (weight == 1).sum() == weight.numel() - 2


def test_backward_stops_below_the_lowest_selected_layer():
    target = dense()
    name = "model.layers.1.mlp.down_proj.weight"
    needed = {}
    for number, layer in enumerate(target.model.model.layers):
        layer.register_forward_hook(lambda _m, _i, output, number=number: needed.update({number: output.requires_grad}))
    with SparseOptimizer(target.model, selecting(target, [name]), lr=1e-2) as optimizer:
        assert {n for n, p in target.model.named_parameters() if p.requires_grad} == {name}
        train(target.model, optimizer, 1)
    assert needed == {0: False, 1: True}


def test_gradients_are_freed_as_they_come():
    target = dense()
    with SparseOptimizer(target.model, some(target, 2000), lr=1e-2) as optimizer:
        parameters = list(target.model.parameters())
        alive = []
        for parameter in parameters:
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(
                    lambda _p: alive.append(sum(p.grad is not None for p in parameters))
                )
        (ids,) = batches(1)
        target.model(input_ids=ids, labels=ids).loss.backward()
        assert len(alive) == len(optimizer.values())
        assert not any(alive)


def test_experts_without_tokens_get_no_gradient_and_stay():
    target = moe()
    names = [name for name in target.layout.tensors if "experts" in name]
    before = everything(target.model)
    with SparseOptimizer(target.model, selecting(target, names), torch.optim.SGD, lr=1e-2) as optimizer:
        target.model(input_ids=torch.tensor([[7]])).logits.logsumexp(-1).sum().backward()  # one token: two experts
        optimizer.step()
    for name, index in changed(target.model, before).items():
        assert name in names
        experts = (index // (target.layout.tensors[name].num_weights // 4)).unique()
        assert len(experts) == 2


def test_tensors_that_the_loss_does_not_reach_stay():
    """As with a dense optimizer, which skips a gradient of None: not even weight decay."""
    target = dense()
    before = everything(target.model)
    selection = selecting(target, [NAME, "lm_head.weight"])
    with SparseOptimizer(target.model, selection, **ADAMW) as optimizer:
        for ids in batches(2):
            target.model.model(input_ids=ids).last_hidden_state.square().sum().backward()
            optimizer.step()
        optimizer.step()  # no gradient at all
    assert set(changed(target.model, before)) == {NAME}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "options"), [(torch.optim.AdamW, ADAMW), (torch.optim.SGD, MOMENTUM)])
def test_a_saved_state_resumes_bit_for_bit(dtype, kind, options):
    """From the state alone: the model it is loaded into has the original weights."""

    def start():
        target = dense()
        target.model.to(dtype)
        return target.model, SparseOptimizer(target.model, some(target), kind, max_grad_norm=1.0, **options)

    def go_on(model, optimizer, rows):
        falling = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.9)
        for ids in rows:
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            falling.step()

    model, optimizer = start()
    go_on(model, optimizer, batches(6)[:3])
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    half = everything(model)
    go_on(model, optimizer, batches(6)[3:])
    file.seek(0)
    other, resumed = start()
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert unchanged(other, half)
    assert resumed.param_groups[0]["lr"] < options["lr"]
    go_on(other, resumed, batches(6)[3:])
    assert unchanged(other, everything(model))


def test_the_state_of_another_selection_is_refused():
    target = dense()
    saved = SparseOptimizer(dense().model, some(target, seed=1), **ADAMW).state_dict()
    before = everything(target.model)
    tensors, own = target.layout.tensors, some(target).coordinates
    next_ones = {name: ((index + 1) % tensors[name].num_weights).sort().values for name, index in own.items()}
    moved = sl.Selection(coordinates=next_ones, layout=target.layout)
    alike = SparseOptimizer(dense().model, moved, **ADAMW).state_dict()  # as many weights of each tensor
    with SparseOptimizer(target.model, some(target), **ADAMW) as optimizer:
        for state in (saved, alike):
            with pytest.raises(SelectionError, match="another selection"):
                optimizer.load_state_dict(state)
        with pytest.raises(SelectionError, match="another selection"):
            optimizer.load_state_dict(torch.optim.AdamW(target.model.parameters(), **ADAMW).state_dict())
    assert unchanged(target.model, before)


def test_close_gives_the_model_back():
    target = dense()
    frozen = target.model.get_parameter(NAME).requires_grad_(False)
    flags = {name: parameter.requires_grad for name, parameter in target.model.named_parameters()}
    (ids,) = batches(1)
    with pytest.raises(RuntimeError, match="inside"), SparseOptimizer(target.model, some(target), lr=1e-2):
        target.model(input_ids=ids, labels=ids).loss.backward()
        raise RuntimeError("inside")
    assert flags == {name: parameter.requires_grad for name, parameter in target.model.named_parameters()}
    assert not any(parameter._post_accumulate_grad_hooks for parameter in target.model.parameters())
    target.model(input_ids=ids, labels=ids).loss.backward()
    assert all((p.grad is None) == (p is frozen) for p in target.model.parameters())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_no_number_changes_nothing(value):
    target = dense()
    with SparseOptimizer(target.model, some(target), max_grad_norm=1.0, **ADAMW) as optimizer:
        first, second = batches(2)
        train(target.model, optimizer, 2)
        before, state = everything(target.model), optimizer.state_dict()["state"]
        moments = {key: entry["exp_avg"].clone() for key, entry in state.items()}
        (target.model(input_ids=first, labels=first).loss * value).backward()
        with pytest.raises(NumericalError, match="learning rate"):
            optimizer.step()
        assert unchanged(target.model, before)
        assert all(torch.equal(entry["exp_avg"], moments[key]) for key, entry in state.items())
        target.model(input_ids=second, labels=second).loss.backward()
        optimizer.step()  # and it can go on
        assert not unchanged(target.model, before)


def test_a_selection_that_does_not_fit_changes_nothing():
    target, other = dense(), dense(num_hidden_layers=3)
    before = everything(target.model)
    with pytest.raises(SelectionError, match=r"model\.layers\.2"):
        SparseOptimizer(target.model, some(other, 2000), lr=1e-2)
    with pytest.raises(ValueError, match="learning rate"):
        SparseOptimizer(target.model, some(target), lr=-1)
    assert unchanged(target.model, before)
    assert all(p.requires_grad and not p._post_accumulate_grad_hooks for p in target.model.parameters())


def test_a_norm_of_zero_does_not_clip():
    target, reference = dense(), dense()
    for model, norm in ((target.model, 0.0), (reference.model, None)):
        with SparseOptimizer(model, some(target), max_grad_norm=norm, **ADAMW) as optimizer:
            train(model, optimizer, 2)
    assert_same(target.model, reference.model)
    assert not unchanged(target.model, everything(dense().model))
    for norm in (-1.0, float("nan")):
        with pytest.raises(TrainingError, match="max_grad_norm is at least 0"):
            SparseOptimizer(target.model, some(target), max_grad_norm=norm, **ADAMW)


def test_zero_grad_forgets_what_was_accumulated():
    target, reference = dense(), dense()
    first, second = batches(2)
    for model, rows in ((target.model, [first, second]), (reference.model, [second])):
        with SparseOptimizer(model, some(target), **ADAMW) as optimizer:
            for ids in rows:
                optimizer.zero_grad()
                model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
    assert_same(target.model, reference.model)


def test_a_closure_computes_the_loss():
    target, reference = dense(), dense()
    (ids,) = batches(1)
    with SparseOptimizer(reference.model, some(target), **ADAMW) as optimizer:
        expected = train(reference.model, optimizer, 1)

    def closure():
        loss = target.model(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss

    with SparseOptimizer(target.model, some(target), **ADAMW) as optimizer:
        assert optimizer.step(closure).item() == expected[0]
    assert_same(target.model, reference.model)


@pytest.mark.parametrize("trainer", [False, True], ids=["loop", "trainer"])
def test_a_gradient_scaler_scales_and_skips(trainer):
    """A trainer clears the gradients of the model alone, after a step that was skipped too."""
    target, reference = dense(), dense()
    with SparseOptimizer(reference.model, some(target), max_grad_norm=0.5, **ADAMW) as optimizer:
        train(reference.model, optimizer, 3)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with SparseOptimizer(target.model, some(target), max_grad_norm=0.5, **ADAMW) as optimizer:
        for number, ids in enumerate(batches(3)):
            if number == 1:  # an overflow: the scaler skips this step, and the same data comes again
                scaler.scale(target.model(input_ids=ids, labels=ids).loss * float("inf")).backward()
                scaler.step(optimizer)
                scaler.update()
                assert scaler.get_scale() == 512
                (target.model if trainer else optimizer).zero_grad()
            scaler.scale(target.model(input_ids=ids, labels=ids).loss).backward()
            scaler.step(optimizer)
            scaler.update()
    assert_same(target.model, reference.model)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(reentrant):
    target, reference = dense(), dense()
    for model in (target.model, reference.model):
        model.train()
    target.model.activation_checkpointing_enable({"use_reentrant": reentrant})
    target.model.enable_input_require_grads()  # what reentrant checkpointing needs where embeddings are frozen
    for model in (target.model, reference.model):
        with SparseOptimizer(model, some(target), **ADAMW) as optimizer:
            train(model, optimizer, 3)
    assert_same(target.model, reference.model)


@pytest.mark.slow
def test_a_compiled_model():
    target, reference = dense(), dense()
    selection, before = some(target), everything(target.model)
    with SparseOptimizer(reference.model, selection, **ADAMW) as optimizer:
        train(reference.model, optimizer, 3)
    compiled = torch.compile(target.model, backend="aot_eager")
    with SparseOptimizer(compiled, selection, **ADAMW) as optimizer:
        train(compiled, optimizer, 3)
    assert_only_selected(target.model, before, selection)
    for mine, theirs in zip(target.model.parameters(), reference.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


def test_a_model_wrapped_by_peft():
    from peft import LoraConfig, get_peft_model

    target = dense()
    selection = some(target)
    wrapped = get_peft_model(target.model, LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    flags = {name: parameter.requires_grad for name, parameter in wrapped.named_parameters()}
    before = everything(wrapped)
    with SparseOptimizer(wrapped, selection, **ADAMW) as optimizer:
        train(wrapped, optimizer, 3)
    moved = changed(wrapped, before)
    assert not any("lora" in name for name in moved)
    assert sum(len(index) for index in moved.values()) == selection.k
    assert flags == {name: parameter.requires_grad for name, parameter in wrapped.named_parameters()}


def test_the_state_has_the_size_of_the_selection():
    target = dense()
    selection = some(target)
    with SparseOptimizer(target.model, selection, **ADAMW) as optimizer:
        train(target.model, optimizer, 1)
        state = optimizer.state_dict()
    moments = [v for entry in state["state"].values() for v in entry.values() if v.dim()]
    assert sum(v.numel() for v in moments) == 2 * selection.k
    assert sum(v.numel() for v in state["masters"].values()) == selection.k


def test_two_on_one_model_are_refused():
    """The second freezes what the first trains, or takes its gradient."""
    target = dense()
    (ids,) = batches(1)
    first = SparseOptimizer(target.model, selecting(target, [NAME]), lr=1e-2)
    with SparseOptimizer(target.model, selecting(target, ["lm_head.weight"]), lr=1e-2) as second:
        target.model(input_ids=ids, labels=ids).loss.backward()
        second.step()
        with pytest.raises(TrainingError, match=r"1 of 1 selected tensors do not require gradients.*first \| second"):
            first.step()
    with (
        SparseOptimizer(target.model, selecting(target, [NAME]), lr=1e-2),
        pytest.raises(TrainingError, match="took its gradient"),
    ):
        target.model(input_ids=ids, labels=ids).loss.backward()
    before = everything(target.model)
    target.model(input_ids=ids, labels=ids).loss.backward()
    first.step()
    assert set(changed(target.model, before)) == {NAME}
