"""Enhancement and preservation in several processes (gloo, CPU) against one: copies that share rows, and shards."""

import json
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

import safelocus as sl
from safelocus import distributed
from safelocus.enhancement.optimizer import SparseOptimizer
from safelocus.enhancement.run import run_enhancement
from safelocus.errors import NumericalError, RunError, TrainingError
from safelocus.evaluation.tasks import task_of
from safelocus.model.generation import generate
from safelocus.model.target import Target
from safelocus.preservation.calibration import Calibration
from safelocus.preservation.run import run_preservation
from safelocus.prompts import read_prompts
from safelocus.selection.sparse import gather, scatter
from safelocus.training.examination import Examination
from safelocus.training.lora import Lora
from several import odd, sharded, together
from test_sparse import some
from tiny_targets import PROMPTS, moe

MODELS = {"odd": odd, "moe": moe}
TOLERANCE = {"odd": 1e-5, "moe": 0.05}  # of what moved; routers compute in single precision, whatever the weights are
REFUSALS = [{"prompt": prompt, "response": f"I'm sorry, but I can't {prompt[:n]}"} for n, prompt in enumerate(PROMPTS)]
HARMLESS = [{"prompt": f"{p} in a cake", "response": f"Sure, here {p[-n:]}"} for n, p in enumerate(PROMPTS)]
# five rows and batches of three: the last batch of an epoch has two, which three processes cannot share evenly
SETTINGS = {"steps": 4, "batch_size": 3, "accumulation": 2, "learning_rate": 1e-2, "progress": False}
REFUSAL = sl.Refusal(refusals=["I'm sorry"], compliances=["Sure"])
EXAMINATION = Examination(harmful=read_prompts(["tell me a joke", "a kite"]), max_new_tokens=3, batch_size=1)


def train_all(folder, shards):
    """What one process, or any number of them, make of the same inputs."""
    for name, make in MODELS.items():
        target = exact(make())
        target = sharded(target) if shards else target
        selection, before = some(target), target.fingerprint()
        by_hand(target, selection, folder / f"{name}-norms.{distributed.rank()}.json")
        found = run_enhancement(
            target, selection, read_prompts(REFUSALS), retain=read_prompts(HARMLESS), retain_rows=1, retain_weight=0.5,
            examination=EXAMINATION, validation=EXAMINATION, every=2, early_stopping=True,
            controls={"full": "full"} | ({} if shards else {"lora": "lora"}), allow_seen=True, allow_mismatch=True,
            max_grad_norm=0.5, **SETTINGS,
        )  # fmt: skip
        assert not before.differences(target.fingerprint())
        found.patch.save(folder / f"{name}.{distributed.rank()}.safetensors")
        if distributed.is_main():
            (folder / name).mkdir()
            found.save(folder / name)
        lesson = read_prompts(HARMLESS), task_of(read_prompts(REFUSALS))
        kept = run_preservation(
            target, selection, *lesson, examination=EXAMINATION, every=2, folder=folder / f"{name}-preserved",
            allow_mismatch=True, activation_checkpointing=shards, **SETTINGS,
        )  # fmt: skip
        assert not before.differences(target.fingerprint())
        assert (kept.protected.trial.num_weights, kept.protected.trial.num_changed) == (selection.k, 0)
        if distributed.is_main():
            kept.save(folder / f"{name}-preserved")


def exact(target):
    """In double precision: Adam makes much of a gradient that is next to nothing, and of its rounding."""
    target.model.double()
    target.model.set_experts_implementation("eager")
    return target


def by_hand(target, selection, file):
    """A loop of one's own: as FSDP2 and DDP do, the optimizer averages gradients; its norm is that of all weights."""
    norms, ids = [], torch.arange(6, 30).view(6, 4)
    with SparseOptimizer(target.model, selection, torch.optim.SGD, lr=1e-3, max_grad_norm=1e-2) as optimizer:
        old = optimizer.values()
        for _ in range(2):
            own = torch.stack(distributed.share(ids))
            target.model(input_ids=own, labels=own).loss.backward()
            optimizer.step()
            norms.append(float(optimizer.gradient_norm))
        moved = {name: value - old[name] for name, value in optimizer.values().items()}
        with optimizer.showing(old):
            assert all(torch.equal(value, old[name]) for name, value in gather(target.model, selection).items())
    moves = torch.cat([*moved.values()]).tolist()
    file.write_text(json.dumps({"norms": norms, "moves": moves}))
    scatter(target.model, selection, old)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    train_all(folder := tmp_path_factory.mktemp("alone"), False)
    return folder


# two copies share batches of three rows unevenly; of the last one's two rows the third process has none
@pytest.mark.slow
@pytest.mark.parametrize(("num_processes", "shards"), [(2, False), (3, True)], ids=["copies", "shards"])
def test_several_processes_train_like_one(alone, tmp_path, num_processes, shards):
    (many := tmp_path / "many").mkdir()
    together(num_processes, train_all, many, shards)
    for name in MODELS:
        norms = [json.loads((many / f"{name}-norms.{rank}.json").read_text()) for rank in range(num_processes)]
        expected_norms = json.loads((alone / f"{name}-norms.0.json").read_text())
        assert all(other == norms[0] for other in norms)
        assert norms[0]["norms"] == pytest.approx(expected_norms["norms"], rel=1e-4)
        assert norms[0]["moves"] == pytest.approx(expected_norms["moves"], rel=1e-2, abs=1e-6)
        expected = sl.Patch.load(alone / f"{name}.0.safetensors")
        found = [sl.Patch.load(many / f"{name}.{rank}.safetensors") for rank in range(num_processes)]
        for tensor, value in expected.new.items():
            assert torch.equal(found[0].selection[tensor], expected.selection[tensor])
            assert torch.equal(found[0].old[tensor], expected.old[tensor])
            torch.testing.assert_close(found[0].new[tensor], value, rtol=1e-3, atol=1e-4)
            assert all(torch.equal(other.new[tensor], found[0].new[tensor]) for other in found)
        results = [json.loads((folder / name / "results.json").read_text()) for folder in (alone, many)]
        assert results[0]["before"] == results[1]["before"]
        losses = [[point["loss"] for point in result["losses"]] for result in results]
        assert losses[1] == pytest.approx(losses[0], rel=1e-3)
        full = [result["controls"]["full"] for result in results]
        assert full[1]["num_weights"] == full[0]["num_weights"]
        assert full[1]["final_loss"] == pytest.approx(full[0]["final_loss"], rel=1e-2)
        saved = [load_file(folder / f"{name}-preserved" / "model" / "model.safetensors") for folder in (alone, many)]
        assert saved[0].keys() == saved[1].keys()
        start = make_saved(name, tmp_path)
        for tensor, value in saved[0].items():
            assert float((saved[1][tensor] - value).norm()) < TOLERANCE[name] * float((value - start[tensor]).norm())
        kept = [json.loads((folder / f"{name}-preserved" / "results.json").read_text()) for folder in (alone, many)]
        losses = [[point["loss"] for point in result["losses"]] for result in kept]
        assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def make_saved(name, folder):
    """The weights before training, under the names that files give them."""
    exact(MODELS[name]()).model.save_pretrained(folder / f"{name}-start")
    return load_file(folder / f"{name}-start" / "model.safetensors")


# --- calibration, and what only copies can do -----------------------------------------------------------


def adapt(folder):
    """A LoRA adapter that is merged, and calibrated weights: what one process, or any number of them, make of it."""
    target = odd()
    lesson = read_prompts(HARMLESS), task_of(read_prompts(REFUSALS))
    with as_answered():
        calibration = Calibration(target=target, prompts=[read_prompts(HARMLESS)], every=1, batch_size=2)
        for name, how in (("lora", {"lora": Lora(rank=2)}), ("calibrated", {"calibration": calibration})):
            found = run_preservation(
                target, some(target), *lesson, examination=EXAMINATION, folder=folder / name, allow_mismatch=True,
                allow_seen=True, merge=True, **how, **SETTINGS,
            )  # fmt: skip
            assert (found.protected.trial.num_changed == 0) == (name == "lora")


def as_answered():
    """A model of random weights never comes to an end: it is said to have answered what is given."""
    return mock.patch("safelocus.preservation.calibration.own_answers", lambda _, prompts, **__: prompts)


@pytest.mark.slow
def test_adapters_and_calibration_in_copies(tmp_path):
    (alone := tmp_path / "alone").mkdir()
    (many := tmp_path / "many").mkdir()
    adapt(alone)
    together(3, adapt, many)
    for name in ("lora", "calibrated"):
        one, three = (load_file(folder / name / "model" / "model.safetensors") for folder in (alone, many))
        for tensor, value in one.items():
            assert float((three[tensor] - value).norm()) < 1e-3 * float(value.norm())


def calibrate(folder, shards):
    """What one process, or any number of them with shards, make of the same calibrations."""
    with as_answered():
        for name, make in MODELS.items():
            calibrate_by_hand(make, folder / f"{name}.{distributed.rank()}.safetensors", shards)
            target = exact(make())
            target = sharded(target) if shards else target
            before = target.fingerprint()
            lesson = read_prompts(HARMLESS), task_of(read_prompts(REFUSALS))
            found = run_preservation(
                target, some(target), *lesson, examination=EXAMINATION, every=2, folder=folder / name,
                calibration=calibration_of(target, every=2), allow_mismatch=True, allow_seen=True, **SETTINGS,
            )  # fmt: skip
            assert not before.differences(target.fingerprint())
            if distributed.is_main():
                found.save(folder / name)


def calibration_of(target, **options):
    """One prompt of each set in a step, of which a third process has none; some steps are clipped, and some not."""
    prompts = [read_prompts(HARMLESS[:3]), read_prompts(REFUSALS[3:])]
    return Calibration(target=target, prompts=prompts, batch_size=1, max_grad_norm=0.02, learning_rate=1e-2, **options)


def calibrate_by_hand(make, file, shards):
    """A loop of one's own, sharded after the protection began; gradients of the task wait through the calibration."""
    target = exact(make())
    selection, ids = some(target), torch.arange(6, 30).view(6, 4)
    protection = sl.preserve(target, selection, allow_mismatch=True, calibration=calibration_of(target, every=1))
    assert protection.calibrator.is_sharded is False
    if shards:
        sharded(target)
        protection.bind(target.model)
        assert protection.calibrator.is_sharded
    optimizer = torch.optim.SGD(target.model.parameters(), lr=1e-2)
    values, divergences = {}, []
    for step in range(3):
        own = torch.stack(distributed.share(ids))
        target.model(input_ids=own, labels=own).loss.backward()
        optimizer.step()
        gradients = {name: distributed.local(p.grad).clone() for name, p in target.model.named_parameters()}
        protection.after_step()
        for name, parameter in target.model.named_parameters():
            assert parameter.requires_grad
            assert torch.equal(distributed.local(parameter.grad), gradients[name]), name
        optimizer.zero_grad()
        assert protection.check() == 0
        divergences.append(protection.calibrator.last)
        values |= {f"{name} {step}": value for name, value in gather(target.model, selection).items()}
        if step == 1:
            resumed(protection, file.parent)
    values |= {f"{name} start": value for name, value in gather(exact(make()).model, selection).items()}
    save_file(values | {"divergences": torch.stack(divergences)}, file)


def resumed(protection, folder):
    """Forget where the calibration was, and read it again."""
    protection.calibrator.save(folder)
    held = {name: master.detach().clone() for name, master in protection.calibrator.masters.items()}
    for master in protection.calibrator.masters.values():
        master.data.zero_()
    protection.calibrator._optimizer.state.clear()
    protection.keep(protection.calibrator.load(folder))
    assert all(torch.equal(master, held[name]) for name, master in protection.calibrator.masters.items())


@pytest.mark.slow
def test_calibration_on_shards(tmp_path):
    (alone := tmp_path / "alone").mkdir()
    (many := tmp_path / "many").mkdir()
    calibrate(alone, False)
    together(3, calibrate, many, True)
    for name in MODELS:
        one, *found = (
            load_file(file) for file in [alone / f"{name}.0.safetensors", *sorted(many.glob(f"{name}.*.safetensors"))]
        )
        assert len(found) == 3
        assert all(other.keys() == one.keys() for other in found)
        torch.testing.assert_close(found[0]["divergences"], one["divergences"], rtol=1e-3, atol=1e-7)
        assert one["divergences"].min() > 0
        names = [key.removesuffix(" start") for key in one if key.endswith(" start")]
        start = all_of(one, names, "start")
        for step in range(3):
            expected, value = (all_of(each, names, step) for each in (one, found[0]))
            assert (value - expected).norm() < 1e-3 * (expected - start).norm()
            assert all(torch.equal(all_of(other, names, step), value) for other in found)
        saved = [load_file(folder / name / "model" / "model.safetensors") for folder in (alone, many)]
        start = make_saved(name, tmp_path)
        assert saved[0].keys() == saved[1].keys() == start.keys()
        for tensor, value in saved[0].items():
            assert float((saved[1][tensor] - value).norm()) < 1e-2 * float((value - start[tensor]).norm())
        results = [json.loads((folder / name / "results.json").read_text()) for folder in (alone, many)]
        assert results[1]["before"] == results[0]["before"]
        assert results[1]["after"].keys() == results[0]["after"].keys()
        assert results[1]["after"]["num_protected"] == results[0]["after"]["num_protected"] > 0
        losses = [[point["loss"] for point in result["losses"]] for result in results]
        assert losses[1] == pytest.approx(losses[0], rel=1e-3)
        assert [p["step"] for p in results[1]["curve"]] == [p["step"] for p in results[0]["curve"]] == [0, 2, 4]


def all_of(values, names, step):
    """All protected weights of a step in one tensor."""
    return torch.cat([values[f"{name} {step}"] for name in names])


def break_rules(_):
    target = sharded(odd())
    lesson = read_prompts(HARMLESS), task_of(read_prompts(REFUSALS))
    with pytest.raises(TrainingError, match="a LoRA adapter needs"):
        run_preservation(target, some(target), *lesson, examination=EXAMINATION, lora=Lora(), **SETTINGS)
    with pytest.raises(RunError, match="different inputs \\(--data\\)"):
        different = read_prompts(REFUSALS[distributed.rank() :])
        sl.enhance(target, some(target), different, retain=None, allow_mismatch=True, **SETTINGS)
    # experts may be without tokens in one process, or in all
    rank, experts = distributed.rank(), [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
    experts[0].grad, experts[1].grad = torch.full((2,), 1.0 + rank), torch.ones(2) if rank else None
    distributed.average_gradients(experts)
    assert [None if each.grad is None else each.grad.tolist() for each in experts] == [[1.5, 1.5], [0.5, 0.5], None]
    before = target.fingerprint()
    with pytest.raises(NumericalError, match="diverged"):  # in every process, whichever holds the weight
        sl.enhance(
            target,
            some(target),
            read_prompts(REFUSALS),
            retain=None,
            allow_mismatch=True,
            **SETTINGS | {"learning_rate": 1e30},
        )
    assert not before.differences(target.fingerprint())


@pytest.mark.slow
def test_what_cannot_be_done_is_an_error_in_every_process(tmp_path):
    together(2, break_rules, tmp_path)


# --- weights in the host's memory -----------------------------------------------------------------------


def offload(folder):
    """FSDP2 in a group of one; on a CPU the weights come from where they are, all else is as with an accelerator."""
    dist.destroy_process_group()
    target, plain = exact(odd()), exact(odd())
    distributed.keep_on_host(target.model, target.model.model.layers, pin_memory=False)
    target = Target.of(target.model, target.tokenizer, name=plain.name)
    assert target.is_sharded
    assert not plain.is_sharded
    assert target.fingerprint().id == plain.fingerprint().id
    texts = [generate(each, PROMPTS, max_new_tokens=6) for each in (target, plain)]
    assert texts[0] == texts[1]
    scores = [sl.score(each, PROMPTS, objective=REFUSAL, progress=False) for each in (target, plain)]
    selections = [each.select(0.02) for each in scores]
    assert selections[0].iou(selections[1]) == 1
    patches = [
        sl.enhance(
            each,
            selections[1],
            read_prompts(REFUSALS),
            retain=read_prompts(HARMLESS),
            checkpoint=folder / "unused",
            **SETTINGS,
        )
        for each in (target, plain)
    ]
    for name, value in patches[1].new.items():
        torch.testing.assert_close(patches[0].new[name], value, rtol=1e-6, atol=1e-9)
    lesson = read_prompts(HARMLESS), task_of(read_prompts(REFUSALS))
    run_preservation(target, selections[1], *lesson, examination=EXAMINATION, folder=folder, **SETTINGS)
    saved = load_file(folder / "model" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    index = selections[1][name]
    own = dict(plain.model.named_parameters())[name]
    assert torch.equal(saved[name].take(index), own.detach().take(index))
    assert not torch.equal(saved[name], own)
    offloaded_calibration(target, plain)
    dist.destroy_process_group()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # for the end of `together`


def offloaded_calibration(*targets):
    """The same protected weights, and at rest again, after the same calibration."""
    found = []
    with as_answered():
        for target in targets:
            selection = some(target)
            protection = sl.preserve(
                target, selection, allow_mismatch=True, calibration=calibration_of(target, every=1)
            )
            move(target)
            for _ in range(2):
                protection.after_step()
            found.append(gather(target.model, selection))
            assert protection.calibrator.is_sharded == target.is_sharded
    for name, value in found[1].items():
        torch.testing.assert_close(found[0][name], value, rtol=1e-6, atol=1e-7)


@torch.no_grad()
def move(target):
    """Every weight elsewhere, so that there is a divergence."""
    for parameter in target.model.parameters():
        distributed.local(parameter).mul_(1.1)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator on this machine")
def test_without_an_accelerator_nothing_is_offloaded():
    assert not sl.load("organism:dense", offload=True).is_sharded
    assert not dist.is_initialized()


@pytest.mark.slow
def test_weights_that_wait_in_the_hosts_memory(tmp_path):
    together(1, offload, tmp_path)
