"""Several processes (gloo, CPU) against one: copies that share the prompts, and FSDP2 shards."""

import json
import os
import signal

import pytest
import torch
import torch.distributed as dist

import safelocus as sl
from safelocus import distributed
from safelocus.errors import NumericalError, RunError, SafelocusError
from safelocus.selection.topk import pick
from several import command, launch, odd, sharded, together
from tiny_targets import PROMPTS, guard, moe

REFUSAL = sl.Refusal(refusals=["I'm sorry"], compliances=["Sure"])
SELECTIONS = [
    {},
    {"which": "bottom"},
    {"which": "random", "seed": 3},
    {"granularity": "neuron", "ratio": 0.05},
    {"where": lambda matrix: matrix.component in ("up", "value")},
]


MODELS = {"odd": odd, "moe": moe}
# five prompts are three batches, which two processes cannot share evenly; of one prompt all but one have none
SCORED = [("esi", 5), ("esi", 1), ("snip", 5), ("snip", 1), ("magnitude", 5), ("random", 5)]


def selected_of(num_prompts):
    """All of five prompts; of one alone, whose scores are chosen from no differently, the first."""
    return SELECTIONS if num_prompts > 1 else SELECTIONS[:1]


# --- scores and selections ------------------------------------------------------------------------------


def score_all(folder, shards):
    """What one process, or any number of them, make of the same inputs."""
    for name, make in MODELS.items():
        for method, num_prompts in SCORED:
            target = sharded(make()) if shards else make()
            objective = guard() if method == "esi" else REFUSAL
            scores = sl.score(
                target, PROMPTS[:num_prompts], objective=objective, method=method, batch_size=2, progress=False
            )
            scores.save(folder / f"{name}-{method}-{num_prompts}")
            for number, options in enumerate(selected_of(num_prompts)):
                file = f"{name}-{method}-{num_prompts}-{number}.{distributed.rank()}"
                scores.select(**options).save(folder / file)
            assert all(parameter.grad is None for parameter in target.model.parameters())


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    score_all(folder := tmp_path_factory.mktemp("alone"), False)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("num_processes", "shards"), [(2, False), (3, True)], ids=["copies", "shards"])
def test_several_processes_score_and_select_like_one(alone, tmp_path, num_processes, shards):
    (many := tmp_path / "many").mkdir()
    together(num_processes, score_all, many, shards)
    for name in MODELS:
        for method, num_prompts in SCORED:
            made = f"{name}-{method}-{num_prompts}"
            expected, found = (sl.Scores.load(folder / made) for folder in (alone, many))
            assert found.provenance == expected.provenance  # the fingerprint among it
            assert found.per_prompt == expected.per_prompt
            for ours, theirs in zip(found.statistics, expected.statistics, strict=True):
                assert (ours.matrix, ours.sigma, ours.tokens) == (theirs.matrix, theirs.sigma, theirs.tokens)
                assert ours.max == pytest.approx(theirs.max, rel=1e-4)
                assert ours.gradient_norm == (theirs.gradient_norm and pytest.approx(theirs.gradient_norm, rel=1e-4))
            for tensor, value in expected.tensors.items():
                if method in ("magnitude", "random"):
                    assert torch.equal(found.tensors[tensor], value)
                torch.testing.assert_close(found.tensors[tensor], value, rtol=1e-4, atol=1e-5 * float(value.max()))
            for number, options in enumerate(selected_of(num_prompts)):
                read = [sl.Selection.load(many / f"{made}-{number}.{rank}") for rank in range(num_processes)]
                # exactly what one process takes from the very same scores, in every process
                exact = found.select(**options)
                for selection in read:
                    assert_same(selection, exact)
                reference = sl.Selection.load(alone / f"{made}-{number}.0")
                assert read[0].k == reference.k
                assert read[0].iou(reference) > 0.98


def assert_same(selection, other):
    assert list(selection.coordinates) == list(other.coordinates)
    for name, index in other.coordinates.items():
        assert torch.equal(selection[name], index)
        assert torch.equal(selection.scores[name], other.scores[name])


# --- ties -----------------------------------------------------------------------------------------------


def pick_from_ties(_):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    mesh = init_device_mesh("cpu", (distributed.world_size(),))
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (7, 3), "b": (2, 5), "c": (4, 3, 2), "d": (1, 6), "e": (9,)}
    plain = {name: torch.randint(3, shape, generator=generator).float() for name, shape in shapes.items()}
    plain["a"][2] = -torch.inf  # not eligible
    held = {
        name: DTensor.from_local(
            value.chunk(3)[r] if (r := distributed.rank()) < len(value.chunk(3)) else value[:0],
            mesh, [Shard(0)], shape=value.shape, stride=value.stride(),
        )
        for name, value in plain.items()
    }  # fmt: skip
    held["e"] = plain["e"]  # not sharded: every process has it
    num_eligible = sum(int((value >= 0).sum()) for value in plain.values())
    for which in ("top", "bottom", "random"):
        for k in (0, 1, 5, 20, 21, 40, num_eligible - 1, num_eligible):
            expected, found = pick(plain, k, which=which), pick(held, k, which=which)
            assert list(found.indices) == list(expected.indices), (which, k)
            for name, index in expected.indices.items():
                assert torch.equal(found.indices[name], index), (which, k, name)
                assert torch.equal(found.scores[name], expected.scores[name])
    with pytest.raises(SafelocusError, match="only"):
        pick(held, num_eligible + 1)


@pytest.mark.slow
def test_ties_are_broken_by_tensor_and_flat_index_across_shards(tmp_path):
    together(3, pick_from_ties, tmp_path)


# --- errors ---------------------------------------------------------------------------------------------


def break_rules(_):
    target = sharded(odd())
    with pytest.raises(SafelocusError, match="wanda"):
        sl.score(target, PROMPTS, method="wanda", progress=False)
    with pytest.raises(SafelocusError, match="accumulate_on"):
        sl.score(target, PROMPTS, objective=REFUSAL, accumulate_on="cpu", progress=False)
    with pytest.raises(RunError, match="different inputs \\(--prompts\\)"):
        sl.score(target, PROMPTS[distributed.rank() :], objective=REFUSAL, progress=False)

    def explode(target, prompts):
        slope = torch.inf if distributed.rank() == 1 else 1.0
        return REFUSAL(target, prompts) * 0 + Slope.apply(REFUSAL(target, prompts), slope)

    target.model.set_gradient_divide_factor(5.0)
    with pytest.raises(NumericalError, match="batches 1 to 2 of 3"):
        sl.score(target, PROMPTS, objective=explode, batch_size=2, progress=False)
    (group,) = target.model._get_fsdp_state()._fsdp_param_groups
    assert group.gradient_divide_factor == 5.0


class Slope(torch.autograd.Function):
    """The same value, another slope."""

    @staticmethod
    def forward(context, value, slope):
        context.slope = slope
        return value.clone()

    @staticmethod
    def backward(context, gradient):
        return gradient * context.slope, None


@pytest.mark.slow
def test_what_cannot_be_done_together_is_an_error_in_every_process(tmp_path):
    together(2, break_rules, tmp_path)


def test_alone_everything_is_whole_and_nothing_is_shared():
    value = torch.arange(6.0).view(3, 2)
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    assert distributed.share([1, 2, 3], in_step=True) == [1, 2, 3]
    assert distributed.all_reduce_sum(value) is value
    assert distributed.whole(value) is distributed.local(value) is distributed.sharded_like(value, value) is value
    assert distributed.gather_objects("x") == ["x"]
    with distributed.processes() as several:
        assert not several
        assert not dist.is_initialized()


# --- the command line -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_under_torchrun(tmp_path, run):
    options = [
        "organism:dense", "--prompts", "organism:harmful", "--limit", "5", "--batch-size", "2", "--guard",
        "organism:guard", "--max-new-tokens", "8", "--dtype", "float32", "--json",
    ]  # fmt: skip
    code, out, _ = run("score", *options, "-o", tmp_path / "alone")
    assert code == 0
    found = launch(2, "-m", "safelocus", "score", *options, "--shard", "-o", tmp_path / "shards")
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["k"] == json.loads(out)["k"]  # one document: the other process is silent
    assert sorted(p.name for p in tmp_path.iterdir()) == ["alone", "shards"]
    names = sorted(p.name for p in (tmp_path / "alone").iterdir())
    assert sorted(p.name for p in (tmp_path / "shards").iterdir()) == names
    responses = [(tmp_path / folder / "responses.jsonl").read_text() for folder in ("alone", "shards")]
    assert responses[0] == responses[1]
    one, two = (sl.Selection.load(tmp_path / folder / "selection.safetensors") for folder in ("alone", "shards"))
    assert one.iou(two) > 0.99
    assert two.provenance == one.provenance


def kill_the_second():
    score = sl.Refusal.__call__

    def killed(self, target, prompts):
        if distributed.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return score(self, target, prompts)

    sl.Refusal.__call__ = killed


@pytest.mark.slow
def test_a_killed_process_ends_the_run_and_leaves_no_artefact(tmp_path):
    (streams := tmp_path / "streams").mkdir()
    codes, _, errors = command(
        2, streams, "score", "organism:dense", "--prompts", "organism:harmful", "--limit", "4", "--batch-size", "1",
        "--refusal", "--shard", "-o", tmp_path / "run", first=kill_the_second,
    )  # fmt: skip
    assert codes[0] > 0 > codes[1]
    assert "error: process 0: " in errors[0]
    assert [path.name for path in tmp_path.iterdir()] == ["streams"]
