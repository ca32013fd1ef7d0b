"""The plan: what devices have, what stages need, what is chosen, and that it is what happens."""

import itertools
import json
import shlex
import tomllib

import pytest
import torch

import safelocus as sl
from safelocus.cli import main
from safelocus.errors import PlanError, ResourceError
from safelocus.evaluation.judges.guard import GuardJudge
from safelocus.model.forcing import logits_at
from safelocus.resources import (
    Answering,
    DoesNotFit,
    Lengths,
    Rehearsal,
    Scoring,
    Subject,
    Training,
    answering_duration,
    choose_answering,
    choose_scoring,
    choose_training,
    find_device,
    scoring_duration,
)
from safelocus.resources.devices import host_free
from safelocus.resources.memory import JUDGED
from safelocus.resources.rehearsal import inputs
from safelocus.training import TrainingSettings, fit, training_rows
from several import command
from tiny_models import ATTENTIONLESS, MIXTURES, NAMES, config
from tiny_targets import dense, moe

SHORT = Lengths(prompt=24, response=8, row=32, retained=32)


@pytest.fixture(scope="module")
def subject():
    return Subject.load("organism:dense")


# devices


@pytest.mark.parametrize(
    ("text", "count", "memory"),
    [("24GB", 1, 24e9), ("2x80GB", 2, 80e9), ("4 x 16 GiB", 4, 16 * 2**30), ("1.5TB", 1, 1.5e12)],
)
def test_a_device_can_be_described_by_its_memory(text, count, memory):
    found = find_device(text)
    assert (found.count, found.memory) == (count, memory)
    assert 0 < found.free < found.memory
    assert not found.is_here


@pytest.mark.parametrize("text", ["H100", "h100", "NVIDIA H100", "2xH100", "rtx4090", "RTX 4090", "T4", "A100 40GB"])
def test_well_known_devices_go_by_name(text):
    assert find_device(text).rates.flops(2) > find_device(text).rates.flops(4) > 1e12


def test_a_faster_device_takes_less_time(subject):
    scoring = Scoring(target=subject, lengths=SHORT)
    answering = Answering(target=subject, guards=(subject,), lengths=SHORT)
    devices = [find_device(name) for name in ("T4", "A100", "H100")]
    for seconds in (
        [scoring_duration(scoring, choose_scoring(scoring, device), 64).total for device in devices],
        [answering_duration(answering, choose_answering(answering, device), 64).total for device in devices],
    ):
        assert seconds == sorted(seconds, reverse=True)


@pytest.mark.parametrize("text", ["H300", "nonsense", "24", "0x80GB", "cuda:99", "-1GB"])
def test_unknown_devices_are_refused(text):
    with pytest.raises(ResourceError, match=r"unknown|expected|accelerator|there are"):
        find_device(text)


def test_two_numbers_of_devices_contradict_each_other():
    with pytest.raises(ResourceError, match="say one of both"):
        find_device("2x80GB", count=4)


def test_this_machines_memory_is_asked():
    found = find_device("cpu")
    assert found.is_here
    assert 0 < found.free <= found.memory
    assert host_free() == pytest.approx(found.free, rel=0.5)
    assert found.rates.bandwidth > 0


# what a configuration says


@pytest.mark.parametrize("name", ["organism:dense", "organism:moe"])
def test_a_subject_has_the_models_own_numbers(name):
    subject, target = Subject.load(name), sl.load(name, dtype="bfloat16")  # as in their files
    parameters = list(target.model.parameters())
    assert subject.num_weights == sum(p.numel() for p in parameters)
    assert subject.num_bytes == sum(p.nbytes for p in parameters)
    assert subject.num_eligible == target.layout.num_eligible


def test_active_weights_of_a_mixture_are_those_of_the_experts_a_token_meets():
    subject = Subject.load("organism:moe")
    assert subject.share_of_experts == 2 / 8
    experts = sum(t.num_weights for t in subject.layout.tensors.values() if t.fused_experts)
    looked_up = subject.layout.tensors["model.embed_tokens.weight"].num_weights
    assert subject.num_weights - subject.num_active == experts * 6 // 8 + looked_up
    reads = [subject.read_per_step(batch) for batch in (1, 4, 64)]
    assert reads == sorted(reads)
    assert reads[-1] <= subject.num_bytes


# rehearsals


def passing(batch=2, length=12):
    def work(model):
        given = inputs(batch, length)
        if model.config.is_encoder_decoder:
            given["decoder_input_ids"] = given["input_ids"]
        return logits_at(model, given, torch.zeros(5, dtype=torch.long, device="meta")).float().sum()

    return work


LOOK_AT_VALUES = ("diffllama", "jetmoe", "longcat_flash", "dbrx")  # transformers' own code does


@pytest.mark.parametrize("name", LOOK_AT_VALUES)
def test_what_cannot_be_rehearsed_says_so(name):
    with pytest.raises(PlanError, match=r"does not run without data.*--batch-size"):
        Subject.of(name, config(name)).rehearsal.peak(passing())


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name not in LOOK_AT_VALUES])
def test_every_architecture_can_be_rehearsed(name):
    rehearsal = Subject.of(name, config(name)).rehearsal
    once, twice = rehearsal.peak(passing()).total, rehearsal.peak(passing(4)).total
    checkpointed = rehearsal.peak(passing(), checkpointing=True).total
    assert 0 < checkpointed < once < twice <= 2 * once
    assert rehearsal.cache(12) >= rehearsal.cache(6) > 0
    assert (rehearsal.cache(12) > rehearsal.cache(6)) == (name not in ATTENTIONLESS)  # whose state has one size


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("keep_gradients", [False, True])
@pytest.mark.parametrize("name", ["llama", *MIXTURES[:2]])
def test_layers_alike_are_counted_though_not_run(name, checkpointing, keep_gradients, monkeypatch):
    """The peak of five layers, by way of one and by way of all."""
    model = config(name)
    model.num_hidden_layers = 5

    def twice(model):  # two passes, whose gradients wait for one another
        return passing(3)(model) + passing(2)(model)

    def peak():
        rehearsal = Subject.of(name, model).rehearsal
        return rehearsal.peak(twice, checkpointing=checkpointing, keep_gradients=keep_gradients).total

    short = peak()
    monkeypatch.setattr("safelocus.resources.rehearsal._shorten", lambda *_: {})
    assert short == pytest.approx(peak(), rel=0.02)


def test_no_more_is_rehearsed_than_is_asked_for(monkeypatch):
    """A pass in the shapes of a whole batch where that fits; one answer's is known from another stage."""
    target, rehearsed = Subject.of("llama", config("llama")), []
    peak = Rehearsal.peak
    monkeypatch.setattr(Rehearsal, "peak", lambda self, *work, **how: rehearsed.append(how) or peak(self, *work, **how))
    training = Training(target=target, num_selected=100, kind="sparse", lengths=SHORT, batch=8)
    choose_training(training, find_device("80GB"), batch_size=8)
    assert len(rehearsed) == 1 + 2  # a step; prompts to answer, one and many
    choose_answering(Answering(target=target, lengths=SHORT), find_device("80GB"))
    assert len(rehearsed) == 3
    assert training.need(8).total < training.need(16).total
    assert len(rehearsed) == 4


def test_a_rehearsal_leaves_torch_and_the_model_as_they_were():
    attention, autocast = torch.nn.functional.scaled_dot_product_attention, torch.autocast
    rehearsal = Subject.of("llama", config("llama")).rehearsal
    with pytest.raises(PlanError, match="without data"):
        rehearsal.peak(lambda model: passing()(model).nonsense())
    assert torch.nn.functional.scaled_dot_product_attention is attention
    assert torch.autocast is autocast
    assert rehearsal.peak(passing()) == rehearsal.peak(passing())
    assert all(parameter.grad is None for parameter in rehearsal.model.parameters())


def test_frozen_weights_have_no_gradients():
    rehearsal = Subject.of("llama", config("llama")).rehearsal
    assert rehearsal.peak(passing(), keep_gradients=True).gradients > 0
    assert rehearsal.peak(passing(), keep_gradients=True, trained=lambda name: False).gradients == 0


# needs


@pytest.mark.parametrize("guard", [None, "organism:guard"])
def test_more_prompts_at_a_time_never_need_less(subject, guard):
    scoring = Scoring(target=subject, guard=guard and Subject.load(guard), lengths=SHORT)
    needs = [scoring.need(batch).total for batch in (1, 2, 5, 8, 31, 64, 100)]
    assert needs == sorted(needs)
    assert needs[0] < needs[-1]


def test_more_prompts_answered_at_a_time_never_need_less(subject):
    guard = Subject.load("organism:guard")
    answering = Answering(target=subject, guards=(guard, guard), lengths=SHORT, reads_rows=True)
    needs = [answering.need(batch) for batch in (1, 2, 5, 8, 31, 64, 100)]
    for name, sizes in {name: [need.phases[name].total for need in needs] for name in needs[0].phases}.items():
        assert sizes == sorted(sizes), name
        assert sizes[0] < sizes[-1], name
    assert needs[0].standing["guard weights"] == 2 * guard.num_bytes
    assert GuardJudge.batch_size == JUDGED
    judging = [need.phases["guard's reading"].total for need in needs]
    assert judging[3] < judging[4] == judging[5]  # a guard has a batch size of its own


def test_a_cache_grows_with_answers_and_layers():
    """Keys and values of every layer: batch x tokens x layers x heads x head size x 2 x bytes."""
    model = config("llama")
    heads, size = model.num_key_value_heads, model.head_dim
    for layers, dtype in ((3, "float32"), (6, "bfloat16")):
        model.num_hidden_layers = layers
        found = Subject.of("llama", model, dtype=dtype)
        assert found.rehearsal.cache(20) == 20 * layers * heads * size * 2 * found.weight_bytes
        small, large = (
            Answering(target=found, lengths=Lengths(prompt=4, response=answer)).need(8).phases["generation"].total
            for answer in (16, 116)
        )
        assert large - small == pytest.approx(1.1 * 8 * found.rehearsal.cache(100), abs=2)


def test_disturbing_takes_what_verify_holds(subject):
    plain = Answering(target=subject, lengths=SHORT).need(4)
    k, eligible = 1000, subject.num_eligible
    disturbing = Answering(target=subject, lengths=SHORT, num_disturbed=k, num_scores=2, source=subject)
    need = disturbing.need(4).on_host()
    more = sum(need.standing.values()) - sum(plain.standing.values())
    assert more == k * (subject.weight_bytes + 8 + 4) + 2 * 4 * eligible + subject.num_bytes
    assert need.phases["generation"] == plain.phases["generation"]


@pytest.mark.parametrize("kind", ["sparse", "full", "lora"])
def test_more_rows_never_need_less_and_checkpointing_never_more(subject, kind):
    training = Training(
        target=subject, num_selected=12000, kind=kind, lengths=SHORT, retained_rows=2 * (kind == "sparse")
    )
    needs = [training.need(rows).total for rows in (1, 2, 4, 8)]
    assert needs == sorted(needs)
    assert training.need(8, checkpointing=True).total <= needs[-1]


def test_sums_take_four_bytes_per_eligible_weight_where_they_are(subject):
    scoring = Scoring(target=subject, lengths=SHORT)
    here, there = scoring.need(4), scoring.need(4, sums_on_cpu=True)
    assert here.total - there.total == 4 * subject.num_eligible == there.host["fp32 sums"]
    assert there.on_host().total == here.total


def test_protection_takes_the_promised_bytes(subject):
    need = Training(target=subject, num_selected=1000, kind="full", lengths=SHORT).need(1)
    assert need.standing["protected values and coordinates"] == 1000 * (subject.weight_bytes + 8)


def test_shards_divide_the_weights_and_not_the_guard(subject):
    need = Scoring(target=subject, guard=Subject.load("organism:guard"), lengths=SHORT).need(2)
    shards, layers = need.spread(4, gathered=10), need.spread(4)
    for name in ("weights", "fp32 sums"):
        assert shards.standing[name] == layers.standing[name] == -(-need.standing[name] // 4)
    assert shards.standing["guard weights"] == need.standing["guard weights"] > layers.standing["guard weights"]
    assert shards.standing["gathered layers"] == 10


# choices


def room(subject_need, *, count=1):
    """A device on which so many bytes can be used."""
    from dataclasses import replace

    return replace(find_device("80GB"), free=int(subject_need / 0.9) + 2, count=count)


def test_the_largest_batch_that_fits_is_chosen(subject):
    scoring = Scoring(target=subject, lengths=SHORT)
    for batch in (4, 8, 16):
        assert choose_scoring(scoring, room(scoring.need(batch).total)).batch_size == batch
    assert choose_scoring(scoring, find_device("80GB")).batch_size == 32
    assert choose_scoring(scoring, find_device("80GB"), most=5).batch_size == 4


def test_as_many_prompts_are_answered_at_a_time_as_fit(subject):
    answering = Answering(target=subject, lengths=SHORT)
    for batch in (4, 8, 16, 32):
        assert choose_answering(answering, room(answering.need(batch).total)).batch_size == batch
    large = find_device("80GB")
    assert [choose_answering(answering, large, most=most).batch_size for most in (1, 20, 32, 500)] == [1, 20, 32, 32]
    assert choose_answering(answering, room(answering.need(19).total), most=20).batch_size == 16
    assert choose_answering(answering, room(answering.need(1).total), batch_size=20).batch_size == 20
    with pytest.raises(DoesNotFit, match=r"at least .* are needed on 1MB.*--max-new-tokens.*--device cpu"):
        choose_answering(answering, find_device("1MB"))


def test_answers_are_spread_where_one_device_does_not_do():
    target = Subject.of("llama", config("llama"))
    answering = Answering(target=target, lengths=Lengths(prompt=4, response=2))
    choice = choose_answering(answering, room(answering.need(4).spread(2).total, count=2))
    assert choice.placement.options == ["--device", "auto"]
    assert choose_answering(answering, find_device("2x80GB")).placement.options == []
    assert choose_answering(answering, find_device("2x80GB"), sharded=True).placement.options == ["--shard"]
    assert choose_answering(answering, find_device("80GB"), offload=True).placement.options == ["--offload"]


def test_sums_leave_the_device_when_it_is_full(subject):
    scoring = Scoring(target=subject, lengths=SHORT)
    choice = choose_scoring(scoring, room(scoring.need(1, sums_on_cpu=True).total))
    assert choice.placement.options == ["--accumulate-on", "cpu"]
    assert choice.batch_size == 1


def test_several_devices_are_used_where_one_does_not_do():
    target = Subject.of("llama", config("llama"))
    scoring = Scoring(target=target, lengths=Lengths(prompt=4, response=2))
    choice = choose_scoring(scoring, room(scoring.need(1).spread(2).total, count=2), accumulate_on="the weights'")
    assert choice.placement.options == ["--device", "auto"]
    assert choose_scoring(scoring, find_device("2x80GB")).placement.options == []
    assert choose_scoring(scoring, find_device("2x80GB"), sharded=True).placement.options == ["--shard"]


def test_rows_of_a_step_never_change(subject):
    training = Training(target=subject, num_selected=12000, kind="sparse", lengths=SHORT, retained_rows=2)
    seen = set()
    for rows, checkpointing in itertools.product((8, 4, 2, 1), (False, True)):
        need = training.need(rows, checkpointing=checkpointing, accumulation=8 // rows).total
        choice = choose_training(training, room(need), batch_size=8)
        assert choice.batch_size * choice.accumulation == 8
        assert choice.need.total <= need
        seen.add((choice.batch_size, choice.checkpointing))
    assert {(8, False), (8, True)} < seen  # first activations are computed twice, then batches are divided


def test_what_is_given_is_taken(subject):
    scoring = Scoring(target=subject, lengths=SHORT)
    tight = room(scoring.need(2).total)
    choice = choose_scoring(scoring, tight, batch_size=32)
    assert (choice.batch_size, choice.fits) == (32, False)
    training = Training(target=subject, num_selected=100, kind="full", lengths=SHORT)
    choice = choose_training(training, room(training.need(1).total), batch_size=16, checkpointing=False, given=True)
    assert (choice.batch_size, choice.checkpointing, choice.fits) == (16, False, False)


def test_nothing_fits_and_the_error_says_what_would(subject):
    scoring = Scoring(target=subject, guard=Subject.load("organism:guard"), lengths=SHORT)
    with pytest.raises(DoesNotFit, match=r"at least .* are needed on 1MB.*--max-new-tokens.*--device cpu") as error:
        choose_scoring(scoring, find_device("1MB"))
    assert error.value.smallest.batch_size == 1
    with pytest.raises(DoesNotFit, match="weights"):  # also where the batch is given: the weights alone do not fit
        choose_scoring(scoring, find_device("1MB"), batch_size=4)
    training = Training(target=subject, num_selected=100, kind="full", lengths=SHORT)
    need = training.need(8, checkpointing=True)  # passes that add up would keep gradients beside it
    with pytest.raises(DoesNotFit, match=r"\d+ devices like it .*--shard"):
        choose_training(training, room(need.total - need.standing["weights"] // 2), batch_size=8)


# and what happens


def most_bytes(work):
    """Of tensors at once, on the CPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(sizes, initial=0))


@pytest.mark.slow
@pytest.mark.parametrize("make", [dense, moe])
@pytest.mark.parametrize("stage", ["score", "evaluate", "verify", "enhance", "checkpointed", "preserve"])
def test_the_plan_is_what_happens(make, stage):
    """Bytes of tensors at once, predicted from the configuration, against those of the real work: -5 % to +25 %."""
    target = make(hidden_size=192, intermediate_size=384, num_hidden_layers=6, vocab_size=2048)
    size = sum(parameter.nbytes for parameter in target.model.parameters())
    subject = Subject.of("tiny", target.model.config, dtype="float32")
    assert subject.num_bytes == size
    prompts = sl.read_prompts("organism:harmful").limit(8)
    if stage == "score":
        longest = max(len(target.chat.encode_prompt(text)) for text in prompts.texts)
        need = Scoring(target=subject, lengths=Lengths(prompt=longest)).need(4)
        peak = most_bytes(lambda: sl.score(target, prompts, objective=sl.Refusal(), batch_size=4, progress=False))
    elif stage in ("evaluate", "verify"):
        how = {"batch_size": 8, "max_new_tokens": 40, "progress": False}
        longest = max(len(target.chat.encode_prompt(text)) for text in prompts.texts)
        selection = sl.score(target, prompts, method="random", progress=False).select(0.2)
        answering = Answering(
            target=subject, lengths=Lengths(prompt=longest, response=40),
            num_disturbed=selection.k if stage == "verify" else 0,
        )  # fmt: skip
        need = answering.need(8).on_host()
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
            target=subject, num_selected=selection.k, kind="full" if stage == "preserve" else "sparse", batch=8,
            lengths=Lengths(prompt=8, response=answers, row=max(lengths), retained=max(lengths)), look_batch=1,
            retained_rows=0 if stage == "preserve" else 1,
        )  # fmt: skip
        need = training.need(8, checkpointing=stage == "checkpointed")
        if stage == "preserve":
            peak = most_bytes(
                lambda: fit(
                    target, rows, settings, prepare=lambda trainer: sl.preserve(trainer, selection), progress=False
                )
            )  # fmt: skip
        else:
            peak = most_bytes(
                lambda: sl.enhance(
                    target, selection, data, retain=data, retain_rows=1, settings=settings, progress=False
                )
            )  # fmt: skip
    assert -0.05 <= need.total / (size + peak) - 1 <= 0.25, (need, size, peak)


# the command line

SCORE = ["score", "organism:dense", "--prompts", "organism:harmful", "--limit", "8", "--refusal"]


@pytest.mark.slow
def test_the_plan_prints_every_stage_and_commands_that_parse(run):
    code, out, _ = run("plan", "organism:dense", "--device", "24GB", "--guard", "organism:guard", "--json")
    assert code == 0
    stages = json.loads(out)["stages"]
    assert list(stages) == ["score", "evaluate", "enhance", "preserve", "preserve --lora"]
    for stage in stages.values():
        assert stage["fits"]
        assert stage["bytes"] == sum(stage["standing"].values()) + max(stage["phases"].values())
        words = shlex.split(stage["command"])[1:]
        with pytest.raises(SystemExit) as stop:
            main([*words, "--help"])
        assert not stop.value.code
    code, out, _ = run("plan", "organism:moe", "--device", "2x1MB")
    assert code == 0
    assert "does not fit" in out


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


@pytest.mark.slow
def test_processes_choose_alike_and_leave_something_for_each(tmp_path):
    arguments = [*EVALUATE[:-4], "--limit", "7", "--max-new-tokens", "4", "-o", tmp_path / "r"]
    codes, _, errors = command(2, tmp_path, *arguments)
    assert codes == [0, 0], errors
    assert "".join(errors).count("answering: batch size 4:") == 1  # of 7 prompts, in two processes
    assert tomllib.loads((tmp_path / "r" / "run.toml").read_text())["batch_size"] == 4


@pytest.mark.slow
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


@pytest.mark.slow
def test_an_evaluation_takes_fewer_prompts_where_memory_is_short(tmp_path, run, monkeypatch):
    arguments = [*EVALUATE[:-4], "--limit", "32", "--max-new-tokens", "64", "--dtype", "float32"]
    monkeypatch.setattr("safelocus.resources.devices._host_memory", lambda: (10**9, 2 * 10**7))
    code, _, err = run(*arguments, "-o", tmp_path / "r")
    assert code == 0
    assert 1 <= tomllib.loads((tmp_path / "r" / "run.toml").read_text())["batch_size"] < 32
    monkeypatch.setattr("safelocus.resources.devices._host_memory", lambda: (10**9, 10**6))
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


@pytest.mark.slow
def test_a_run_that_cannot_fit_fails_before_it_begins(tmp_path, run, monkeypatch):
    monkeypatch.setattr("safelocus.resources.devices._host_memory", lambda: (10**9, 10**6))
    code, _, err = run(*SCORE, "-o", tmp_path / "r")
    assert code == 2
    assert "scoring does not fit: at least" in err
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr("safelocus.resources.devices._host_memory", lambda: (10**9, 2 * 10**7))
    code, _, err = run(*SCORE, "--batch-size", "8", "-o", tmp_path / "r")  # an estimate does not overrule its user
    assert code == 0
    assert "mind:" in err


def test_a_model_that_cannot_be_rehearsed_runs_all_the_same(tmp_path, run, monkeypatch):
    def fail(*_args, **_options):
        raise PlanError("the model's code does not run without data")

    monkeypatch.setattr(Rehearsal, "peak", fail)
    code, _, err = run(*SCORE, "-o", tmp_path / "r")
    assert code == 0
    assert "scoring: batch size 8; no plan: the model's code does not run without data" in err
