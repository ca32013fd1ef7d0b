"""Protected weights keep their bits through training: any optimizer, any trainer, any wrapper."""

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments

import safelocus as sl
from safelocus.errors import SelectionError, TrainingError
from safelocus.scoring.scores import Provenance
from safelocus.selection.sparse import gather
from safelocus.selection.topk import random_k
from several import together
from tiny_targets import dense, moe

LENGTH = 9


def some(target, k=300, seed=0, fingerprint=True):
    """k random eligible coordinates, which say which model they are of."""
    layout = target.layout
    sizes = {name: layout.tensors[name].num_weights for name in layout.eligible_tensors}
    provenance = Provenance(fingerprint=target.fingerprint().to_json() if fingerprint else None)
    return sl.Selection(coordinates=random_k(sizes, k, seed=seed), layout=layout, provenance=provenance)


def bits(tensor):
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()])


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(bits(ours[n]), bits(theirs[n])) for n in ours)


def others_changed(target, selection, before):
    """Most of the weights that are not protected have other values."""
    moved = total = 0
    for name in selection.coordinates:
        changed = (target.model.get_parameter(name) != before[name]).flatten()
        changed[selection[name]] = False
        moved, total = moved + int(changed.sum()), total + changed.numel() - len(selection[name])
    return moved > total // 2


def snapshot(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def batch(seed=0, size=2):
    return torch.randint(6, 300, (size, LENGTH), generator=torch.Generator().manual_seed(seed))


def train(model, optimizer, steps=20, accumulation=1):
    for step in range(steps):
        for part in range(accumulation):
            ids = batch(step * accumulation + part)
            (model(input_ids=ids, labels=ids).loss / accumulation).backward()
        optimizer.step()
        optimizer.zero_grad()


def rows(num=16):
    return Dataset.from_list([{"input_ids": ids.tolist(), "labels": ids.tolist()} for ids in batch(1, num)])


OPTIONS = {
    "max_steps": 6, "learning_rate": 1e-2, "weight_decay": 0.1, "use_cpu": True, "per_device_train_batch_size": 2,
    "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "dataloader_pin_memory": False,
    "logging_strategy": "no",
}  # fmt: skip


def trainer_of(target, folder, **changes):
    arguments = TrainingArguments(output_dir=str(folder), **{**OPTIONS, **changes})
    return Trainer(model=target.model, args=arguments, train_dataset=rows())


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9),
}


@pytest.mark.parametrize("make", [dense, moe])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_bits_stay_with_any_optimizer(make, dtype, optimizer):
    target = make()
    target.model.to(dtype)
    selection, before = some(target), snapshot(target.model)
    values = gather(target.model, selection)
    optimizer = OPTIMIZERS[optimizer](target.model.parameters())
    protection = sl.preserve(optimizer, selection, model=target.model)
    assert protection.num_protected == selection.k
    assert not protection.notes
    train(target.model, optimizer, accumulation=2)
    assert same(gather(target.model, selection), values)
    assert protection.check() == 0
    assert others_changed(target, selection, before)


def test_without_protection_they_change():
    target = dense()
    selection = some(target)
    values = gather(target.model, selection)
    train(target.model, torch.optim.AdamW(target.model.parameters(), lr=1e-2))
    assert not same(gather(target.model, selection), values)


def test_it_changes_nothing_but_the_protected_weights_of_a_step():
    """One step with and without: equal elsewhere, to the bit."""
    plain, guarded = dense(), dense()
    selection, before = some(plain), snapshot(plain.model)
    for target in (plain, guarded):
        optimizer = torch.optim.AdamW(target.model.parameters(), lr=1e-2)
        if target is guarded:
            sl.preserve(optimizer, selection, model=target.model)
        train(target.model, optimizer, steps=1)
    for name, value in snapshot(plain.model).items():
        value.view(-1)[selection[name]] = before[name].view(-1)[selection[name]]
        assert torch.equal(value, guarded.model.get_parameter(name))


def test_two_optimizers_share_the_work():
    """Muon takes the matrices, AdamW the rest; a closure for LBFGS is nothing special either."""
    target = dense()
    selection = some(target)
    values = gather(target.model, selection)
    matrices = [p for n, p in target.model.named_parameters() if p.ndim == 2 and "layers" in n]
    rest = [p for p in target.model.parameters() if all(p is not m for m in matrices)]
    both = [torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.1), torch.optim.AdamW(rest, lr=1e-2)]
    protection = sl.preserve(both, selection, model=target.model)
    for step in range(5):
        ids = batch(step)
        target.model(input_ids=ids, labels=ids).loss.backward()
        for optimizer in both:
            optimizer.step()
    assert same(gather(target.model, selection), values)
    protection.remove()
    both[0].step()
    assert not same(gather(target.model, selection), values)


def test_an_optimizer_with_a_closure():
    target = dense()
    selection = some(target)
    values = gather(target.model, selection)
    optimizer = torch.optim.LBFGS(target.model.parameters(), max_iter=2)
    sl.preserve(optimizer, selection, model=target.model)

    def closure():
        optimizer.zero_grad()
        loss = target.model(input_ids=batch(), labels=batch()).loss
        loss.backward()
        return loss

    optimizer.step(closure)
    assert same(gather(target.model, selection), values)


def test_an_optimizer_wrapped_by_accelerate():
    from accelerate import Accelerator

    target = dense()
    selection = some(target)
    values = gather(target.model, selection)
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(target.model, torch.optim.AdamW(target.model.parameters(), lr=1e-2))
    sl.preserve(optimizer, selection, model=model)
    train(model, optimizer, steps=2)
    assert same(gather(target.model, selection), values)


@pytest.mark.slow
def test_a_thousand_steps():
    target = dense(num_hidden_layers=1)
    target.model.to(torch.bfloat16)
    selection = some(target)
    values = gather(target.model, selection)
    optimizer = torch.optim.AdamW(target.model.parameters(), lr=1e-3, weight_decay=0.1)
    sl.preserve(optimizer, selection, model=target.model)
    train(target.model, optimizer, steps=1000)
    assert same(gather(target.model, selection), values)


def test_by_hand_and_as_a_context():
    target = dense()
    selection, before = some(target), snapshot(target.model)
    values = gather(target.model, selection)
    protection = sl.preserve(target, selection)
    with torch.no_grad():
        for parameter in target.model.parameters():
            parameter.add_(1)
    assert protection.check() == selection.k
    protection.restore()
    assert protection.check() == 0
    assert same(gather(target.model, selection), values)
    with sl.preserve(target.model, selection, allow_mismatch=True) as protection, torch.no_grad():
        for parameter in target.model.parameters():
            parameter.add_(1)
    assert "another model" in protection.notes[0]
    assert same(gather(target.model, selection), values)
    assert others_changed(target, selection, before)


def test_memory_is_that_of_the_values_and_the_shared_indices():
    target = dense()
    selection = some(target, 1000)
    for dtype, width in ((torch.float32, 4), (torch.bfloat16, 2)):
        target.model.to(dtype)
        protection = sl.preserve(target.model, selection, allow_mismatch=True)
        assert protection.num_bytes == selection.k * (width + 8)
        shared = [held.site.index.data_ptr() == selection[name].data_ptr() for name, held in protection._held.items()]
        assert all(shared)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"bf16": True, "gradient_accumulation_steps": 2},
        {"optim": "adafactor"},
        {"optim": "sgd", "optim_args": "momentum=0.9"},
    ],
    ids=["adamw", "mixed-precision-accumulation", "adafactor", "sgd"],
)
def test_a_trainer(tmp_path, changes):
    target = dense()
    selection, before = some(target), snapshot(target.model)
    values = gather(target.model, selection)
    run = trainer_of(target, tmp_path, **changes)
    protection = sl.preserve(run, selection)
    run.train()
    assert same(gather(target.model, selection), values)
    assert others_changed(target, selection, before)
    protection.remove()
    run.train()
    assert not same(gather(target.model, selection), values)


def test_a_trainer_that_goes_on_from_a_checkpoint(tmp_path):
    target = dense()
    selection = some(target)
    values = gather(target.model, selection)
    saved = {"save_strategy": "steps", "save_steps": 3, "logging_strategy": "steps", "logging_steps": 1}
    run = trainer_of(target, tmp_path, **saved)
    sl.preserve(run, selection)
    run.train()
    final = snapshot(target.model)
    again = dense()
    run = trainer_of(again, tmp_path, **saved)
    sl.preserve(run, selection)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same(gather(again.model, selection), values)
    assert same(snapshot(again.model), final)


def test_a_checkpoint_that_was_trained_without_protection(tmp_path):
    """What is protected is what the model held when `preserve` was called, not what the checkpoint brings."""
    run = trainer_of(dense(), tmp_path, save_strategy="steps", save_steps=3)
    run.train()
    target = dense()
    selection = some(target)
    values = gather(target.model, selection)
    run = trainer_of(target, tmp_path)
    sl.preserve(run, selection)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same(gather(target.model, selection), values)


def test_a_tensor_that_is_unfrozen_before_a_checkpoint_is_loaded(tmp_path):
    trainer_of(dense(), tmp_path, save_strategy="steps", save_steps=3).train()
    target = dense()
    target.model.model.layers[0].requires_grad_(False)
    run = trainer_of(target, tmp_path)
    sl.preserve(run, some(target))
    target.model.model.layers[0].requires_grad_(True)
    with pytest.raises(TrainingError, match="frozen when the protection began"):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


class ScheduleFree(torch.optim.SGD):
    """Is evaluated at another point than it trains at."""

    shown = False

    @torch.no_grad()
    def _switch(self, shown):
        if shown != self.shown:
            self.shown = shown
            for parameter in self.param_groups[0]["params"]:
                parameter.add_(0.1 if shown else -0.1)

    def train(self):
        self._switch(False)

    def eval(self):
        self._switch(True)


def test_an_optimizer_that_moves_weights_between_training_and_evaluation(tmp_path):
    target = dense()
    selection = some(target)
    values, seen = gather(target.model, selection), []
    optimizer = ScheduleFree(target.model.parameters(), lr=1e-2)

    class Looking(Trainer):
        def prediction_step(self, *arguments, **options):
            assert optimizer.shown
            seen.append(gather(target.model, selection))
            return super().prediction_step(*arguments, **options)

        def compute_loss(self, *arguments, **options):
            seen.append(gather(target.model, selection))
            return super().compute_loss(*arguments, **options)

    arguments = TrainingArguments(output_dir=str(tmp_path), **OPTIONS, eval_strategy="steps", eval_steps=2)
    run = Looking(
        model=target.model, args=arguments, train_dataset=rows(), eval_dataset=rows(2), optimizers=(optimizer, None)
    )
    protection = sl.preserve(run, selection)
    run.train()
    run.train()
    run.evaluate()
    assert len(seen) == 2 * 6 + 7 * 2  # steps of training; batches of evaluation, each asked for twice
    assert all(same(each, values) for each in [*seen, gather(target.model, selection)])
    protection.remove()
    optimizer.train()
    assert not same(gather(target.model, selection), values)
    protection = sl.preserve(optimizer, selection, model=target.model, allow_mismatch=True)
    values = gather(target.model, selection)
    optimizer.eval()
    assert same(gather(target.model, selection), values)


def test_dpo(tmp_path):
    from trl import DPOConfig, DPOTrainer

    target = dense()
    selection, before = some(target), snapshot(target.model)
    values = gather(target.model, selection)
    run = DPOTrainer(
        model=target.model,
        ref_model=dense().model,
        args=DPOConfig(output_dir=str(tmp_path), bf16=False, activation_checkpointing=False, **OPTIONS),
        train_dataset=Dataset.from_list([{"prompt": "bake", "chosen": " a cake", "rejected": " a kite"}] * 8),
        processing_class=target.tokenizer,
    )
    sl.preserve(run, selection)
    run.train()
    assert same(gather(target.model, selection), values)
    assert others_changed(target, selection, before)


@pytest.mark.slow
def test_a_compiled_model():
    target = dense()
    selection = some(target)
    values = gather(target.model, selection)
    compiled = torch.compile(target.model, backend="aot_eager")
    optimizer = torch.optim.AdamW(compiled.parameters(), lr=1e-2)
    sl.preserve(optimizer, selection, model=compiled)
    train(compiled, optimizer, steps=3)
    assert same(gather(target.model, selection), values)


def test_a_frozen_part_of_the_model_is_left_out():
    target = dense()
    target.model.model.layers[0].requires_grad_(False)
    selection = some(target)
    optimizer = torch.optim.AdamW([p for p in target.model.parameters() if p.requires_grad], lr=1e-2)
    protection = sl.preserve(optimizer, selection, model=target.model)
    assert protection.num_protected == sum(len(i) for n, i in selection.coordinates.items() if ".layers.1." in n)
    assert "not trained" in protection.notes[0]
    assert f"{protection.num_protected:,} of {selection.k:,}" in repr(protection)
    train(target.model, optimizer, steps=2)
    target.model.model.layers[0].requires_grad_(True)
    with pytest.raises(TrainingError, match="frozen when the protection began"):
        optimizer.step()


def test_another_selection_can_follow():
    target = dense()
    first, second = some(target, 200, seed=0), some(target, 200, seed=1)
    values = gather(target.model, first)
    optimizer = torch.optim.AdamW(target.model.parameters(), lr=1e-2)
    protection = sl.preserve(optimizer, first, model=target.model)
    train(target.model, optimizer, steps=2)
    added = gather(target.model, second)
    protection.update(first | second)
    train(target.model, optimizer, steps=2)
    assert same(gather(target.model, first), values)
    assert same(gather(target.model, second), added)
    original = gather(dense().model, second)
    protection.update(second, values=original)
    train(target.model, optimizer, steps=2)
    assert same(gather(target.model, second), original)
    assert not same(gather(target.model, first), values)


def test_a_selection_that_cannot_follow_changes_nothing():
    target = dense()
    first, stranger = some(target, 200, seed=0), some(moe(), 50)
    protection = sl.preserve(target, first)
    with pytest.raises(SelectionError):
        protection.update(stranger)
    assert protection.selection is first
    assert protection.check() == 0


def test_a_selection_of_another_model_is_refused():
    target, sibling = dense(), dense(seed=1)
    selection = some(sibling)
    with pytest.raises(SelectionError, match=r"another model.*allow_mismatch"):
        sl.preserve(target, selection)
    assert sl.preserve(target, selection, allow_mismatch=True).notes
    with pytest.raises(SelectionError, match="nothing says that it was made"):
        sl.preserve(target, some(target, fingerprint=False))
    with pytest.raises(SelectionError, match=r"layers\.2"):
        sl.preserve(target, some(dense(num_hidden_layers=3), 3000), allow_mismatch=True)


def test_the_same_model_in_another_dtype_is_recognised():
    target = dense()
    target.model.to(torch.bfloat16)
    selection = some(target)
    target.model.float()  # wider: nothing is lost, so it is compared
    assert not sl.preserve(target, selection).notes
    with torch.no_grad():
        target.model.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    with pytest.raises(SelectionError, match="another model"):
        sl.preserve(target, selection)
    wide = dense()
    selection = some(wide)
    wide.model.to(torch.bfloat16)  # narrower: rounded, so names and shapes must do
    assert "another dtype" in sl.preserve(wide, selection).notes[0]


def test_what_cannot_be_protected_is_refused(tmp_path):
    target, other = dense(), dense()
    selection = some(target)
    optimizer = torch.optim.AdamW(target.model.parameters(), lr=1e-2)
    with pytest.raises(TrainingError, match="model=model"):
        sl.preserve(optimizer, selection)
    with pytest.raises(TrainingError, match="not parameters of the given"):
        sl.preserve(optimizer, selection, model=other.model)
    head = torch.optim.AdamW([target.model.lm_head.weight])
    with pytest.raises(TrainingError, match="none of the"):
        sl.preserve(head, selection, model=target.model)
    with pytest.raises(TrainingError, match="brings its own"):
        sl.preserve(target.model, selection, model=target.model)
    with pytest.raises(TrainingError, match=r"transformers\.Trainer"):
        sl.preserve("model", selection)
    with pytest.raises(TrainingError, match="exact or patch"):
        sl.preserve(target, selection, mode="soft")
    partial = torch.optim.AdamW(target.model.model.layers[0].parameters())
    assert "preserve([first, second]" in sl.preserve(partial, selection, model=target.model).notes[0]
    target.model.requires_grad_(False)
    with pytest.raises(TrainingError, match="none of the"):
        sl.preserve(target, selection)
    with pytest.raises(TrainingError, match="nothing to correct"):
        sl.preserve(other, selection).patch()
    with pytest.raises(TrainingError, match="not a PEFT model"):
        sl.preserve(other, selection).merge()


def test_quantised_weights_are_refused_with_what_is_possible():
    target = dense()
    selection = some(target)
    weight = target.model.model.layers[0].mlp.up_proj
    weight.weight = torch.nn.Parameter(torch.zeros(weight.weight.shape, dtype=torch.int8), requires_grad=False)
    with pytest.raises(SelectionError, match=r"quantised.*bf16.*patch"):
        sl.preserve(target, selection)


def _sharded(_):
    """Two processes, FSDP2, uneven shards; first the whole model is trained, then LoRA."""
    import torch.distributed as dist
    from peft import LoraConfig, get_peft_model
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh("cpu", (2,))
    for lora in (False, True):
        target = dense(intermediate_size=47)
        selection = some(target)
        values, before = gather(target.model, selection), snapshot(target.model)
        model = get_peft_model(target.model, LoraConfig(r=3, target_modules="all-linear")) if lora else target.model
        for layer in target.model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)
        protection = sl.preserve(optimizer, selection, model=model)
        train(model, optimizer, steps=5)
        assert protection.check() == 0
        shards, changed = protection.effective(), 0
        for name, held in protection._held.items():
            assert torch.allclose(shards[name], held.site.part_of(values[name]), rtol=0, atol=0 if not lora else 1e-7)
        for name, parameter in target.model.named_parameters():
            if (own := before.get(name.replace(".base_layer", ""))) is not None:
                whole = parameter.full_tensor().detach()
                changed += int((whole != own).sum())
        assert changed == selection.k if lora else changed > selection.k  # a frozen base holds corrections alone
        held = torch.tensor(protection.num_protected)
        assert held < selection.k
        dist.all_reduce(held)
        assert held == selection.k
        if lora:
            with pytest.raises(TrainingError, match="sharded"), model.disable_adapter():
                model(input_ids=batch())


@pytest.mark.slow
def test_sharded_over_two_processes(tmp_path):
    together(2, _sharded, tmp_path)
