"""The plan: what devices have, what stages need, what is chosen, and that it is what happens."""

import itertools
import json
import shlex
import tomllib
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, DistilBertConfig

import safelocus as sl
from safelocus.cli import main
from safelocus.errors import LayoutError, PlanError, ResourceError
from safelocus.model.target import Target
from safelocus.resources import (
    Answering,
    DoesNotFit,
    Lengths,
    Pass,
    Scoring,
    Settings,
    Subject,
    Training,
    choose,
    choose_training,
    classifier_bytes,
    devices,
    find_device,
)
from safelocus.resources.rehearsal import _memory_of
from safelocus.training import TrainingSettings
from safelocus.training.fitting import fit
from safelocus.training.lora import Lora
from safelocus.training.responses import training_rows
from several import command
from tiny_models import ATTENTIONLESS, MIXTURES, NAMES, config
from tiny_targets import byte_level, dense, moe

pytestmark = pytest.mark.slow  # rehearses models, again and again

REHEARSES = True
SHORT = Lengths(prompt=24, response=8, row=32, retained=32)


@pytest.fixture(scope="module")
def subject():
    return Subject.load("organism:dense")


@pytest.mark.parametrize(
    ("text", "count", "memory"), [("24GB", 1, 24e9), ("2x80GB", 2, 80e9), ("4 x 16 GiB", 4, 16 * 2**30)]
)
def test_a_device_can_be_described_by_its_memory(text, count, memory):
    found = find_device(text)
    assert (found.count, found.memory) == (count, memory)
    assert 0 < found.free < found.memory
    assert not found.is_here


@pytest.mark.parametrize("text", ["h100", "NVIDIA H100", "2xH100", "rtx4090", "A100 40GB"])
def test_well_known_devices_go_by_name(text):
    assert find_device("T4").seconds(1e12, 0, torch.bfloat16) > find_device(text).seconds(1e12, 0, torch.bfloat16)


@pytest.mark.parametrize("text", ["H300", "nonsense", "24", "0x80GB", "cuda:99", "-1GB"])
def test_unknown_devices_are_refused(text):
    with pytest.raises(ResourceError, match=r"unknown|expected|accelerator"):
        find_device(text)


def test_this_machine_is_asked_and_measured():
    found = find_device("cpu")
    assert found.is_here
    assert 0 < found.free <= found.memory
    assert 0 < found.seconds(1e9, 0, torch.float32) < found.seconds(1e12, 0, torch.float32)


def test_files_in_a_containers_cache_are_free_memory(tmp_path, monkeypatch):
    for name, text in (("max", 16 << 30), ("current", 15 << 30), ("stat", f"anon 1\ninactive_file {14 << 30}\n")):
        (tmp_path / f"memory.{name}").write_text(f"{text}\n")
    monkeypatch.setattr(devices, "_GROUPS", tmp_path)
    monkeypatch.setattr(devices.psutil, "virtual_memory", lambda: SimpleNamespace(total=1 << 40, available=1 << 40))
    assert devices.host_memory() == (16 << 30, 15 << 30)


def test_a_faster_device_takes_less_time(subject):
    for stage in (Scoring(target=subject, lengths=SHORT), Answering(target=subject, guards=(subject,), lengths=SHORT)):
        seconds = [stage.seconds(Settings(batch_size=32), find_device(name), 64) for name in ("T4", "A100", "H100")]
        assert seconds == sorted(seconds, reverse=True)


@pytest.mark.parametrize("name", ["organism:dense", "organism:moe"])
def test_a_subject_has_the_models_own_numbers(name):
    subject, target = Subject.load(name), sl.load(name, dtype="bfloat16")  # as in their files
    assert subject.num_bytes == sum(p.nbytes for p in target.model.parameters())
    assert subject.layout.num_eligible == target.layout.num_eligible


# transformers' own code does
LOOK_AT_VALUES = ("jetmoe", "longcat_flash", "dbrx", "modernbert-decoder")
CACHELESS = ("recurrent_gemma", "openai-gpt")  # what they keep while they write is not among their outputs
NEVER_TWICE = ("openai-gpt", "gpt_neox_japanese")  # its classes support no checkpointing


@pytest.mark.parametrize("name", LOOK_AT_VALUES)
def test_what_cannot_be_rehearsed_says_so(name, caplog):
    with pytest.raises(PlanError, match=r"does not run without data.*--batch-size"):
        Subject.of(name, config(name)).rehearse(Pass(2, 12, 5))
    assert not [record for record in caplog.records if record.name.startswith("torch")]  # it would print a traceback


@pytest.mark.parametrize("name", [name for name in NAMES if name not in LOOK_AT_VALUES])
def test_every_architecture_can_be_rehearsed(name):
    found = Subject.of(name, config(name))
    once, twice = (found.rehearse(Pass(rows, 12, 5), trained="all").peak for rows in (2, 4))
    assert 0 < once < twice <= 2 * once
    if name in NEVER_TWICE:
        with pytest.raises(PlanError, match=r"cannot compute activations twice.*--no-checkpointing"):
            found.rehearse(Pass(2, 12, 5), trained="eligible", checkpointing=True)
    else:
        assert 0 < found.rehearse(Pass(2, 12, 5), trained="eligible", checkpointing=True).peak < once
    if name in CACHELESS:
        with pytest.raises(PlanError, match="does not run without data"):
            found.cache(12)
        return
    assert found.cache(12) >= found.cache(6) > 0
    assert (found.cache(12) > found.cache(6)) == (name not in ATTENTIONLESS)  # whose state has one size


@pytest.mark.parametrize("name", ["llama", MIXTURES[0]])
def test_operations_are_two_for_each_weight_and_token_and_twice_as_many_backward(name):
    model = config(name)
    model.num_experts_per_tok = model.num_local_experts = model.num_experts = 4  # all of them
    found = Subject.of(name, model)
    used = found.layout.num_eligible + sum(
        t.num_weights for t in found.layout.tensors.values() if {"head", "router"} & set(t.components)
    )
    forward = found.rehearse(Pass(2, 12, 24)).operations
    assert forward == pytest.approx(2 * 24 * used, rel=0.05)
    assert found.rehearse(Pass(2, 12, 24), trained="all").operations == pytest.approx(3 * forward, rel=0.1)


@pytest.mark.parametrize(
    "name", ["llama", *(pytest.param(n, marks=pytest.mark.slow) for n in (MIXTURES[0], "gemma3_text"))]
)
def test_few_layers_tell_what_all_take(name, monkeypatch):
    model = config(name)
    model.num_hidden_layers = 5
    if getattr(model, "layer_types", None):
        model.layer_types = (["sliding_attention", "full_attention"] * 3)[:5]

    def trials():
        found = Subject.of(name, model)
        yield found.rehearse(Pass(4, 24, 4))
        yield found.rehearse(Pass(4, 24, 12), trained="eligible", checkpointing=True)
        yield found.rehearse(Pass(1, 24, 2), trained="all")  # gradients are most at the end of the backward pass
        yield found.rehearse(Pass(8, 64, 500), trained="all", again=True)  # activations at its beginning
        yield found.cache(24)

    few = list(trials())
    _memory_of.cache_clear()
    monkeypatch.setattr(Subject, "_extrapolated", lambda _self, whole, measure: measure(whole))
    assert few == list(trials())


def test_a_model_that_looks_at_values_is_an_error_that_says_so(monkeypatch):
    _memory_of.cache_clear()
    found = Subject.of("llama", config("llama"))
    monkeypatch.setattr(found._model().model.norm, "forward", lambda states: states * float(states.sum().tolist()[0]))
    with pytest.raises(PlanError, match="without data"):
        found.rehearse(Pass(2, 12, 5))


def test_models_alike_are_rehearsed_once(monkeypatch):
    """In a process; those of another configuration, dtype or choice of weights for themselves."""
    _memory_of.cache_clear()
    first = Subject.of("llama", config("llama")).rehearse(Pass(2, 12, 5), trained="eligible")
    wider = config("llama")
    wider.intermediate_size *= 2
    with monkeypatch.context() as patched:
        patched.setattr(Subject, "_measured", lambda *_: {"operations": 7, "forward": 7})
        assert Subject.of("its twin", config("llama")).rehearse(Pass(2, 12, 5), trained="eligible") == first
        for other in (Subject.of("llama", wider), Subject.of("llama", config("llama"), dtype="bfloat16")):
            assert other.rehearse(Pass(2, 12, 5), trained="eligible").operations == 7
    _memory_of.cache_clear()


def test_a_cache_grows_with_answers_and_layers():
    """Keys and values of every layer: tokens x layers x heads x head size x 2 x bytes."""
    model = config("llama")
    for model.num_hidden_layers, dtype in ((3, "float32"), (6, "bfloat16")):
        found = Subject.of("llama", model, dtype=dtype)
        each = model.num_hidden_layers * model.num_key_value_heads * model.head_dim * 2 * found.dtype.itemsize
        assert found.cache(20) == 20 * each


def stages(subject):
    guard = Subject.load("organism:guard")
    how = {"target": subject, "lengths": SHORT}
    yield Scoring(**how)
    yield Scoring(guard=guard, **how)
    yield Answering(guards=(guard, guard), reads_rows=True, num_disturbed=1000, **how)
    for kind in ("sparse", "full", "lora"):
        yield Training(num_selected=12000, kind=kind, retained_rows=2 * (kind == "sparse"), **how)


def test_more_at_a_time_never_needs_less_and_checkpointing_never_more(subject):
    for stage in (replace(stage, most=8) for stage in stages(subject)):
        needs = [stage.need(Settings(batch_size=batch)).total for batch in (1, 2, 5, 8, 16)]
        assert needs == sorted(needs)
        assert needs[0] < needs[-1]
        if isinstance(stage, Training):
            assert stage.need(Settings(batch_size=16, checkpointing=True)).total < needs[-1]
            assert stage.need(Settings(batch_size=16, accumulation=2)).total >= needs[-1]
        exact = replace(stage, most=5).need(Settings(batch_size=5)).total
        assert exact <= needs[2] <= 1.2 * exact  # along the line from one to the most, which is never below


def test_sums_take_four_bytes_per_eligible_weight_where_they_are(subject):
    scoring = Scoring(target=subject, lengths=SHORT)
    here, there = (scoring.need(Settings(batch_size=1, sums_on_cpu=where)) for where in (False, True))
    assert here.total - there.total == 4 * subject.layout.num_eligible == there.host["fp32 sums"]
    assert there.on(find_device("cpu"), Settings(batch_size=1), 0).total == here.total


def test_shards_divide_the_weights_and_not_the_guard(subject):
    need = Scoring(target=subject, guard=Subject.load("organism:guard"), lengths=SHORT).need(Settings(batch_size=1))
    shards = need.on(find_device("80GB"), Settings(batch_size=1, count=4, sharded=True), 10)
    for name in ("weights", "fp32 sums"):
        assert shards.standing[name] == -(-need.standing[name] // 4)
    assert shards.standing["guard weights"] == need.standing["guard weights"]
    assert shards.standing["gathered layers"] == 10
    offloaded = need.on(find_device("80GB"), Settings(batch_size=1, offload=True), 10)
    assert set(offloaded.standing) == {"gathered layers", "guard weights"}
    assert offloaded.host["weights"] == need.standing["weights"]


def room(num_bytes, *, count=1):
    """A device on which so many bytes can be used."""
    return replace(find_device("80GB"), free=int(num_bytes / 0.9) + 2, count=count)


@pytest.mark.parametrize("make", [Scoring, Answering])
def test_the_largest_batch_that_fits_is_chosen(subject, make):
    stage = make(target=subject, lengths=SHORT)
    for batch in (4, 8, 16, 32):
        assert choose(stage, room(stage.need(Settings(batch_size=batch)).total)).settings.batch_size == batch
    large, small = find_device("80GB"), room(stage.need(Settings(batch_size=2)).total)
    assert [choose(stage, large, most=most).settings.batch_size for most in (1, 20, 500)] == [1, 20, 32]
    given = choose(stage, small, batch_size=20)  # a user's word is taken
    assert (given.settings.batch_size, given.fits) == (20, False)
    assert choose(stage, large, offload=True).settings.options == ["--offload"]
    assert choose(stage, find_device("2x80GB")).settings.options == []
    assert choose(stage, find_device("2x80GB"), sharded=True).settings.options == ["--shard"]
    with pytest.raises(DoesNotFit, match=r"at least .* are needed on 1MB.*--max-new-tokens") as error:
        choose(stage, replace(small, label="1MB", free=10**6))
    assert error.value.smallest.settings.batch_size == 1
    with pytest.raises(DoesNotFit, match="weights"):  # also where the batch is given: the weights alone do not fit
        choose(stage, replace(small, free=10**6), batch_size=4)


def test_sums_leave_the_device_when_it_is_full_and_then_several_are_used(subject):
    scoring = Scoring(target=subject, lengths=SHORT)
    choice = choose(scoring, room(scoring.need(Settings(batch_size=1, sums_on_cpu=True)).total))
    assert choice.settings.options == ["--accumulate-on", "cpu"]
    assert choice.settings.batch_size == 1
    half = scoring.need(Settings(batch_size=4)).on(find_device("80GB"), Settings(batch_size=4, count=2), 0)
    choice = choose(scoring, room(half.total, count=2), accumulate_on="the weights'")
    assert choice.settings.options == ["--device", "auto"]


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_calibration_is_counted(subject, kind):
    plain = Training(target=subject, num_selected=12000, kind=kind, lengths=SHORT, most=8)
    calibrated, one = replace(plain, calibrated=64), Settings(batch_size=1)
    needs = plain.need(one), calibrated.need(one), calibrated.need(replace(one, checkpointing=True))
    assert needs[1].standing == {**needs[0].standing, "calibrated": (12 + subject.dtype.itemsize) * 12000}
    assert needs[1].phases["calibration"] > needs[2].phases["calibration"] > needs[0].phases["step"]
    times = [
        replace(calibrated, calibrated_every=every).seconds(one, find_device("80GB"), 10) for every in (1, 4, 10**9)
    ]
    assert times == sorted(times, reverse=True)
    assert times[-1] == pytest.approx(plain.seconds(one, find_device("80GB"), 10))


@pytest.mark.parametrize(("stage", "usual"), [("enhance", "0.01"), ("preserve", "0.1"), ("preserve --lora", "0.1")])
def test_every_stage_has_its_usual_ratio(stage, usual, run):
    command = ["plan", "organism:dense", "--stage", stage, "--device", "80GB", "--json"]
    needs = [json.loads(run(*command, *more)[1])["stages"] for more in ([], ["-r", usual], ["-r", "0.2"])]
    assert needs[0] == needs[1] != needs[2]


def test_what_is_short_is_said_where_it_is_the_hosts_memory(subject):
    preserve = Training(target=subject, num_selected=12000, kind="full", lengths=SHORT, most=8)
    with pytest.raises(
        DoesNotFit, match=r"beside 80GB 2\.5 MB of the CPU's memory .* 0\.9 MB can .*\(original weights"
    ):
        choose_training(preserve, replace(find_device("80GB"), host=10**6), batch_size=8)


def test_several_devices_are_at_most_as_much_faster_as_they_are_more(subject):
    eight = find_device("8x80GB")
    for make in (Scoring, partial(Training, num_selected=12000, kind="sparse")):
        alone = make(target=subject, lengths=SHORT, **({"processes": 1, "most": 8} if make is not Scoring else {}))
        shared = make(target=subject, lengths=SHORT, **({"processes": 8, "most": 8} if make is not Scoring else {}))
        slow = alone.seconds(Settings(batch_size=8), eight, 100)
        assert slow / 8 <= shared.seconds(Settings(batch_size=8, count=8, sharded=True), eight, 100) < slow


def test_rows_of_a_step_never_change(subject):
    training = Training(target=subject, num_selected=12000, kind="sparse", lengths=SHORT, retained_rows=2, most=8)
    seen = set()
    for rows, twice in itertools.product((8, 1), (False, True)):
        need = training.need(Settings(batch_size=rows, checkpointing=twice, accumulation=8 // rows)).total
        choice = choose_training(training, room(need), batch_size=8)
        assert choice.settings.batch_size * choice.settings.accumulation == 8
        assert choice.need.total <= need
        seen.add((choice.settings.batch_size, choice.settings.checkpointing))
    assert {(8, False), (8, True)} < seen  # first activations are computed twice, then batches are divided
    given = choose_training(training, room(training.need(Settings(batch_size=1)).total), batch_size=16, given=True)
    assert (given.settings.batch_size, given.fits) == (16, False)
    with pytest.raises(DoesNotFit, match=r"--shard.*--lora"):
        choose_training(training, room(10**6), batch_size=8)


# and what happens


def most_bytes(work):
    """Of tensors at once, on the CPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(sizes, initial=0))


def gpt2(hidden_size, num_hidden_layers, vocab_size, **_):
    """With dropout, whose masks are kept while it is trained."""
    model = config("gpt2")
    model.n_embd, model.n_inner, model.n_layer, model.n_positions = hidden_size, 768, num_hidden_layers, 256
    model.vocab_size = vocab_size
    return Target.of(AutoModelForCausalLM.from_config(model).eval(), byte_level(), name="gpt2")


STAGES = ("score", "evaluate", "verify", "enhance", "checkpointed", "preserve", "lora")


@pytest.mark.parametrize(
    ("make", "stage"), [*itertools.product((dense, moe), STAGES), (gpt2, "enhance"), (gpt2, "preserve")]
)
def test_the_plan_is_what_happens(make, stage):
    """Bytes of tensors at once, predicted from the configuration, against those of the real work: -5 % to +50 %."""
    target = make(hidden_size=192, intermediate_size=384, num_hidden_layers=6, vocab_size=2048)
    size = sum(parameter.nbytes for parameter in target.model.parameters())
    subject = Subject.of("tiny", target.model.config, dtype="float32")
    assert subject.num_bytes == size
    prompts = sl.read_prompts("organism:harmful").limit(8)
    if stage == "score":
        longest = max(len(target.chat.encode_prompt(text)) for text in prompts.texts)
        need = Scoring(target=subject, lengths=Lengths(prompt=longest)).need(Settings(batch_size=4))
        peak = most_bytes(lambda: sl.score(target, prompts, objective=sl.Refusal(), batch_size=4, progress=False))
    elif stage in ("evaluate", "verify"):
        how = {"batch_size": 8, "max_new_tokens": 40, "progress": False}
        longest = max(len(target.chat.encode_prompt(text)) for text in prompts.texts)
        selection = sl.score(target, prompts, method="random", progress=False).select(0.2)
        answering = Answering(
            target=subject, lengths=Lengths(prompt=longest, response=40),
            num_disturbed=selection.k if stage == "verify" else 0,
        )  # fmt: skip
        need = answering.need(Settings(batch_size=8)).on(find_device("cpu"), Settings(batch_size=8), 0)
        held = sl.read_prompts("organism:harmful-heldout").limit(8)
        if stage == "verify":
            peak = most_bytes(lambda: sl.verify(target, selection, prompts=held, noises=(1.0,), seeds=1, **how))
            peak += 12 * selection.k  # coordinates and scores, there before
        else:
            peak = most_bytes(lambda: sl.evaluate(target, harmful=prompts, **how))
    else:
        data = sl.read_prompts("organism:refusals").limit(8)
        rows = training_rows(data, target.chat)
        lengths = [len(ids) for ids in rows["input_ids"]]
        answers = max(sum(label >= 0 for label in row["labels"]) for row in rows)
        settings = TrainingSettings(steps=2, batch_size=8, activation_checkpointing=stage == "checkpointed")
        scores = sl.score(target, prompts, method="random", progress=False)
        selection = scores.select(0.01)
        del scores
        training = Training(
            target=subject, num_selected=selection.k, most=8, lora_rank=Lora().rank,
            kind={"preserve": "full", "lora": "lora"}.get(stage, "sparse"),
            lengths=Lengths(prompt=8, response=answers, row=max(lengths), answer=answers, retained=max(lengths)),
            retained_rows=0 if stage in ("preserve", "lora") else 1,
        )  # fmt: skip
        need = training.need(Settings(batch_size=8, checkpointing=stage == "checkpointed"))
        if stage in ("preserve", "lora"):
            model = Lora().wrap(target.model, target.layout) if stage == "lora" else target.model
            peak = most_bytes(
                lambda: fit(
                    target, rows, settings, model=model, progress=False,
                    prepare=lambda trainer: sl.preserve(trainer, selection),
                )
            )  # fmt: skip
        else:
            peak = most_bytes(
                lambda: sl.enhance(
                    target, selection, data, retain=data, retain_rows=1, settings=settings, progress=False
                )
            )  # fmt: skip
    assert -0.05 <= need.total / (size + peak) - 1 <= 0.5, (need, size, peak)


# the command line

SCORE = ["score", "organism:dense", "--prompts", "organism:harmful", "--limit", "8", "--refusal"]


def test_the_plan_prints_every_stage_and_commands_that_parse(run):
    code, out, _ = run("plan", "organism:dense", "--device", "24GB", "--guard", "organism:guard", "--json")
    assert code == 0
    stages = json.loads(out)["stages"]
    assert list(stages) == ["score", "evaluate", "enhance", "preserve", "preserve --lora"]
    for stage in stages.values():
        assert stage["fits"]
        assert 0 < stage["bytes"] < 24e9 > stage["host"]
        words = shlex.split(stage["command"])[1:]
        with pytest.raises(SystemExit) as stop:
            main([*words, "--help"])
        assert not stop.value.code
    code, out, _ = run("plan", "organism:moe", "--device", "2x0.6GB")
    assert code == 0
    assert "does not fit" in out


@pytest.mark.parametrize(
    ("said", "rows"),
    [
        ("", 1), ('retain = ["organism:retain"]', 6), ('retain = ["organism:retain"]\nown_answers = true', 1),
        ('retain = ["organism:retain"]\nretain_rows = 2', 2), ('lexicon = "words.txt"', 6),
    ],
)  # fmt: skip
def test_what_a_recipe_retains_is_planned_for(said, rows, tmp_path, run, monkeypatch):
    (tmp_path / "words.txt").write_text("poison")
    monkeypatch.chdir(tmp_path)
    Path("r.toml").write_text(
        f'command = "enhance"\nmodel = "organism:dense"\ndata = "organism:refusals"\nmax_length = 512\n{said}\n'
    )
    _, planned, _ = run("plan", "--config", "r.toml", "--device", "24GB", "--json")
    plain = ["--lexicon", "words.txt"] if "lexicon" in said else []
    _, told, _ = run(
        "plan", "organism:dense", "--stage", "enhance", "--retain-rows", rows, *plain, "--device", "24GB", "--json"
    )  # fmt: skip
    need = [json.loads(text)["stages"]["enhance"] for text in (planned, told)]
    assert need[0]["bytes"] == need[1]["bytes"]
    assert f"--retain-rows {rows}" in need[1]["command"]


def planned(run, *arguments):
    """(stage, its command in words) of a plan of one stage."""
    code, out, err = run("plan", *arguments, "--device", "24GB", "--json")
    assert code == 0, err
    ((_, stage),) = json.loads(out)["stages"].items()
    return stage, shlex.split(stage["command"])


def test_the_command_says_what_the_plan_rests_on(run):
    own = ["--dtype", "bfloat16", "--skip-unknown", "--ratio", "0.05", "--max-new-tokens", "32"]
    _, score = planned(run, "organism:dense", "--stage", "score", "--guard", "organism:guard", *own)
    assert {*own, "--guard", "organism:guard"} <= {*score}
    assert "--refusal" not in score
    _, enhance = planned(run, "organism:dense", "--stage", "enhance", "--guard", "organism:guard", "--dtype", "float16")
    assert {"--dtype", "float16", "--guard", "organism:guard"} <= {*enhance}
    _, evaluate = planned(run, "organism:dense", "--stage", "evaluate", "--guard", "organism:guard")
    assert "guard:organism:guard" in evaluate


def test_a_run_is_planned_as_it_would_go_and_what_is_given_beside_it_is_in_the_command(run, tmp_path):
    (file := tmp_path / "run.toml").write_text(
        'command = "enhance"\nmodel = "organism:dense"\ndata = "organism:refusals"\nbatch_size = 4\naccumulation = 2\n'
        "checkpointing = true\nmax_length = 256\n"
    )
    stage, command = planned(run, "--config", file)
    assert command[:4] == ["safelocus", "enhance", "--config", str(file)]
    assert (stage["batch_size"], stage["accumulation"], stage["checkpointing"]) == (4, 2, True)
    assert command[4:-2] == ["--batch-size", "4", "--accumulation", "2", "--checkpointing"]
    _, command = planned(run, "organism:moe", "--config", file, "--steps", "7", "--max-length", "512")
    assert command[:5] == ["safelocus", "enhance", "organism:moe", "--config", str(file)]
    assert {"--steps", "7", "--max-length", "512"} <= {*command}
    file.write_text('command = "preserve"\nmodel = "organism:dense"\ndata = "organism:requests"\n')  # rows of 1024
    assert "--max-length" not in planned(run, "--config", file)[1]
    assert planned(run, "--config", file, "--stage", "preserve --lora")[1][4] == "--lora"
    _, _, err = run("plan", "--config", file, "--stage", "score", "--device", "24GB")
    assert "of `preserve`; leave one out" in err
    file.write_text('command = "score"\nmodel = "organism:dense"\nrefusal = true\n')
    assert "PROMPTS" in planned(run, "--config", file)[1]
    _, out, _ = run("plan", "--config", file, "--device", "2x24GB", "--shard", "--json")
    assert json.loads(out)["stages"]["score"]["command"].count("--shard") == 1
    file.write_text('command = "evaluate"\nmodel = "organism:dense"\nharmless = ["organism:harmless"]\n')
    assert "--prompts" not in planned(run, "--config", file)[1]


def test_what_a_command_would_refuse_is_not_printed(run, tmp_path):
    """A spread model has its place, and its sums with it; what needs it whole is a problem, whatever fits."""
    small = "2x0.626GB"  # where sums would leave the device
    assert choose(Scoring(target=Subject.load("organism:dense")), find_device(small), sharded=True).settings.sums_on_cpu
    _, out, _ = run("plan", "organism:dense", "--stage", "score", "--shard", "--device", small, "--json")
    assert "--accumulate-on" not in json.loads(out)["stages"]["score"]["command"]
    for how in ("--offload", "--shard"):
        _, out, _ = run("plan", "organism:dense", how, "--stage", "preserve --lora", "--device", "2x24GB", "--json")
        stage = json.loads(out)["stages"]["preserve --lora"]
        assert not stage["fits"]
        assert stage["problem"] == f"--lora: not with {how}; leave one of them out"
    file = tmp_path / "run.toml"
    file.write_text('command = "enhance"\nmodel = "organism:dense"\ndata = "organism:refusals"\ndevice = "cpu"\n')
    _, out, _ = run("plan", "--config", file, "--device", "24GB", "--offload", "--json")
    assert "device = 'cpu'" in json.loads(out)["stages"]["enhance"]["problem"]


def test_the_command_names_a_device_that_it_would_not_take(run, tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('command = "score"\nmodel = "organism:dense"\nprompts = "organism:harmful"\nrefusal = true\n')

    def devices_in(*arguments):
        words = shlex.split(json.loads(run("plan", *arguments, "--json")[1])["stages"]["score"]["command"])
        return [value for name, value in itertools.pairwise(words) if name == "--device"]

    assert devices_in("--config", file, "--device", "24GB") == []
    assert devices_in("organism:dense", "--stage", "score", "--device", "cpu") == ["cpu"]
    file.write_text(file.read_text() + 'device = "cpu"\n')
    assert devices_in("--config", file) == []
    assert devices_in("--config", file, "--device", "24GB") == ["cuda"]


def test_offloaded_weights_come_once_for_every_pass_and_token(subject):
    answering, device = Answering(target=subject, lengths=SHORT), find_device("H100")
    there, elsewhere = (
        answering.seconds(Settings(batch_size=4, offload=offload), device, 4) for offload in (False, True)
    )
    coming = device.seconds_from_host(subject.num_bytes)
    assert there < elsewhere
    assert elsewhere == pytest.approx((1 + SHORT.response) * coming, rel=0.01)
    guarded = Answering(target=subject, guards=(subject,), lengths=SHORT)
    assert guarded.seconds(Settings(batch_size=4, offload=True), device, 4) < elsewhere + coming


def test_scores_are_planned_by_what_makes_them(subject):
    settings = Settings(batch_size=8)

    def needs(**how):
        return Scoring(target=subject, lengths=SHORT, **how).need(settings)

    esi, wanda, magnitude = (needs(method=method) for method in ("esi", "wanda", "magnitude"))
    assert [*magnitude.phases] == ["statistics"]
    assert {"generation", "observing"} < {*wanda.phases}
    assert magnitude.total < wanda.total < esi.total
    assert needs(method="magnitude", guard=subject).standing == needs(method="magnitude").standing
    judged = needs(answers=True, classifier=10**9)
    assert "generation" in judged.phases
    assert judged.on(find_device("2x24GB"), Settings(batch_size=8, count=2), 0).standing["classifier weights"] == 10**9


def test_a_classifier_is_counted_by_its_configuration(tmp_path):
    config = DistilBertConfig(dim=32, n_layers=1, n_heads=2, hidden_dim=64, vocab_size=100)
    config.save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_config(config)
    assert classifier_bytes(str(tmp_path)) == 4 * model.num_parameters()
    assert classifier_bytes(str(tmp_path), dtype="bfloat16") == 2 * model.num_parameters()


def test_all_that_a_run_scores_answers_and_trains_is_planned_for(run, tmp_path):
    def stage(*lines):
        (file := tmp_path / "run.toml").write_text('model = "organism:dense"\n' + "\n".join(lines))
        return planned(run, "--config", file)[0]

    evaluate = ('command = "evaluate"', "limit = 8", 'prompts = ["organism:harmful"]')
    one, more = stage(*evaluate), stage(*evaluate, 'harmless = ["organism:harmless"]', 'task = ["organism:utility"]')
    assert more["batch_size"] == 24 == 3 * one["batch_size"]
    assert planned(run, "--config", tmp_path / "run.toml", "-p", "organism:harmful-heldout")[0]["batch_size"] == 24
    assert stage('command = "score"', 'prompts = "organism:harmful"', "refusal = true", "limit = 5")["batch_size"] == 5
    score = ('command = "score"', 'prompts = "organism:harmful"')
    assert stage(*score, 'method = "magnitude"')["bytes"] < stage(*score, "refusal = true")["bytes"]
    guards = [f'judge = ["guard:organism:guard"{more}]' for more in ("", ', "guard:organism:dense"')]
    assert stage(*evaluate, guards[1])["bytes"] > stage(*evaluate, guards[0])["bytes"]
    assert (
        stage(*evaluate, 'kl_to = "organism:dense"')["bytes"] > one["bytes"] + Subject.load("organism:dense").num_bytes
    )
    assert stage(*evaluate, 'perplexity = "organism:requests"')["bytes"] > one["bytes"]
    preserve = ('command = "preserve"', "lora = true", 'data = "organism:requests"')
    assert stage(*preserve, "lora_rank = 64")["bytes"] > stage(*preserve)["bytes"]
    enhance, selection = ('command = "enhance"', 'data = "organism:refusals"'), tmp_path / "s.safetensors"
    assert stage(*enhance, 'controls = "full"')["bytes"] > stage(*enhance)["bytes"]
    assert stage(*enhance, guards[1])["bytes"] > stage(*enhance, guards[0])["bytes"] > stage(*enhance)["bytes"]
    nothing = stage(*enhance, 'retain = ["none"]')
    assert nothing["seconds"] < stage(*enhance, "retain_rows = 1")["seconds"]
    assert "--retain-rows" not in nothing["command"]
    sl.score(sl.load("organism:dense"), ["a"], method="random", progress=False).select(0.1).save(selection)
    assert stage(*enhance, f'selection = "{selection}"')["bytes"] == stage(*enhance, "ratio = 0.1")["bytes"]
    assert stage(*enhance, 'selection = "not-yet"')["bytes"] == stage(*enhance)["bytes"]


def test_a_folder_without_weights_can_be_planned_for(tmp_path, run):
    config("qwen3_moe").save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    code, out, _ = run("plan", tmp_path, "--device", "2xH100", "--shard", "--json")
    assert code == 0
    command = json.loads(out)["stages"]["score"]["command"]
    assert command.startswith("torchrun --nproc-per-node 2 -m safelocus score")
    assert "--shard" in command


def test_score_says_what_it_chose_and_keeps_it(tmp_path, run):
    code, _, err = run(*SCORE, "-o", tmp_path / "r")
    assert code == 0
    assert "scoring: batch size 8:" in err
    settings = tomllib.loads((tmp_path / "r" / "run.toml").read_text())
    assert settings["batch_size"] == 8
    code, _, err = run(*SCORE, "--batch-size", "2", "-o", tmp_path / "two")
    assert "batch size 2:" in err
    assert tomllib.loads((tmp_path / "two" / "run.toml").read_text())["batch_size"] == 2


EVALUATE = ["evaluate", "organism:dense", "-p", "organism:harmful-heldout", "--limit", "6", "--max-new-tokens", "4"]


def test_evaluate_says_what_it_chose_and_keeps_it(tmp_path, run):
    code, _, err = run(*EVALUATE, "--harmless", "organism:harmless-heldout", "-o", tmp_path / "r")
    assert code == 0
    assert "answering: batch size 12:" in err  # there are no more
    assert tomllib.loads((tmp_path / "r" / "run.toml").read_text())["batch_size"] == 12
    assert json.loads((tmp_path / "r" / "results.json").read_text())["provenance"]["batch_size"] == 12
    code, _, err = run(*EVALUATE, "--batch-size", "5", "-o", tmp_path / "five")
    assert "answering: batch size 5:" in err
    assert tomllib.loads((tmp_path / "five" / "run.toml").read_text())["batch_size"] == 5
    code, _, err = run("evaluate", "--config", tmp_path / "five", "-o", tmp_path / "again")
    assert "answering: batch size 5:" in err
    code, out, err = run(*EVALUATE, "--json", "-o", tmp_path / "quiet")
    assert code == 0
    assert not err
    assert json.loads(out)


def test_processes_choose_alike_and_leave_something_for_each(tmp_path):
    arguments = [*EVALUATE[:-4], "--limit", "7", "--max-new-tokens", "4", "-o", tmp_path / "r"]
    codes, _, errors = command(2, tmp_path, *arguments)
    assert codes == [0, 0], errors
    assert "".join(errors).count("answering: batch size 4:") == 1  # of 7 prompts, in two processes
    assert tomllib.loads((tmp_path / "r" / "run.toml").read_text())["batch_size"] == 4


def test_verify_says_what_it_chose_and_keeps_it(tmp_path, run):
    assert run(*SCORE, "-o", tmp_path / "scored")[0] == 0
    code, _, err = run(
        "verify", "organism:dense", "--scores", tmp_path / "scored", "-p", "organism:harmful-heldout", "--limit", "6",
        "--harmless", "organism:harmless-heldout", "--judge", "refusal", "--noise", "1", "--seeds", "1",
        "--max-new-tokens", "4", "-o", tmp_path / "r",
    )  # fmt: skip
    assert code == 0
    assert "answering: batch size 12:" in err
    assert "disturbed" in err
    assert tomllib.loads((tmp_path / "r" / "run.toml").read_text())["batch_size"] == 12


def test_prompts_without_room_are_not_planned_for(tmp_path, run):
    """They are not answered, so they need no memory."""
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": "tell me " * n}) + "\n" for n in (3, 20000)))
    code, _, err = run("evaluate", "organism:dense", "-p", file, "--max-new-tokens", "4", "-o", tmp_path / "r")
    assert code == 0
    assert "answering: batch size 2:" in err
    assert "1 failed" in err


def test_an_evaluation_takes_fewer_prompts_where_memory_is_short(tmp_path, run, monkeypatch):
    arguments = [*EVALUATE[:-4], "--limit", "32", "--max-new-tokens", "64", "--dtype", "float32"]
    monkeypatch.setattr("safelocus.resources.devices.host_memory", lambda: (10**9, 2 * 10**7))
    code, _, err = run(*arguments, "-o", tmp_path / "r")
    assert code == 0
    assert 1 <= tomllib.loads((tmp_path / "r" / "run.toml").read_text())["batch_size"] < 32
    monkeypatch.setattr("safelocus.resources.devices.host_memory", lambda: (10**9, 10**6))
    code, _, err = run(*arguments, "-o", tmp_path / "none")
    assert code == 2
    assert "answering does not fit: at least" in err
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("command", "said"), [(SCORE, "batch size 4:"), (EVALUATE, "answering: batch size 4:")], ids=["score", "evaluate"]
)
def test_a_resumed_run_goes_on_with_what_was_chosen(tmp_path, run, command, said):
    partial = tmp_path / ".r.partial"
    (partial / "checkpoint").mkdir(parents=True)
    (partial / "checkpoint" / "work").touch()
    (partial / "run.toml").write_text(f'command = "{command[0]}"\nbatch_size = 4\n')
    code, _, err = run(*command, "-o", tmp_path / "r")
    assert code == 0
    assert said in err
    assert tomllib.loads((tmp_path / "r" / "run.toml").read_text())["batch_size"] == 4


def test_a_run_that_cannot_fit_fails_before_it_begins(tmp_path, run, monkeypatch):
    monkeypatch.setattr("safelocus.resources.devices.host_memory", lambda: (10**9, 10**6))
    code, _, err = run(*SCORE, "-o", tmp_path / "r")
    assert code == 2
    assert "scoring does not fit: at least" in err
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr("safelocus.resources.devices.host_memory", lambda: (10**9, 2 * 10**7))
    code, _, err = run(*SCORE, "--batch-size", "8", "-o", tmp_path / "r")  # an estimate does not overrule its user
    assert code == 0
    assert "mind:" in err
    monkeypatch.setattr("safelocus.resources.devices.host_memory", lambda: (10**9, 16 * 10**6))
    code, _, err = run(*SCORE[:-1], "--method", "magnitude", "-o", tmp_path / "m")  # makes no backward pass
    assert code == 0, err


@pytest.mark.parametrize(
    ("words", "chooser", "asked"),
    [
        ([*SCORE[:-1], "--classifier", "organism:guard"], "scoring",
         {"method": "esi", "classifier": "organism:guard"}),
        ([*SCORE[:-1], "--method", "wanda"], "scoring", {"method": "wanda", "classifier": None}),
        ([*EVALUATE, "--harmless", "organism:harmless", "--kl-to", "organism:dense"], "answering",
         {"source": "organism:dense"}),
    ],
)  # fmt: skip
def test_all_that_is_loaded_and_run_is_asked_for(words, chooser, asked, tmp_path, run, monkeypatch):
    def told(*_, **given):
        raise PlanError(str({name: given[name] for name in asked}))

    monkeypatch.setattr(f"safelocus.cli.planning.{chooser}_settings", told)
    assert str(asked) in run(*words, "-o", tmp_path / "r")[2]


def test_a_model_that_cannot_be_rehearsed_runs_all_the_same(tmp_path, run, monkeypatch):
    def fail(*_args, **_options):
        raise PlanError("the model's code does not run without data")

    monkeypatch.setattr(Subject, "rehearse", fail)
    code, _, err = run(*SCORE, "-o", tmp_path / "r")
    assert code == 0
    assert "scoring: batch size 8; no plan: the model's code does not run without data" in err


@pytest.mark.parametrize("words", [SCORE, EVALUATE])
def test_an_architecture_that_is_not_understood_ends_the_run_before_the_model_is_loaded(
    words, tmp_path, run, monkeypatch
):
    def not_understood(*_args, **_options):
        raise LayoutError("nothing is known of x.weight")

    monkeypatch.setattr("safelocus.model.layout.Layout.of", not_understood)
    monkeypatch.setattr("safelocus.model.target.load_model", lambda *_, **__: pytest.fail("it was loaded"))
    code, _, err = run(*words, "-o", tmp_path / "r")
    assert code == 2
    assert "nothing is known of x.weight" in err
