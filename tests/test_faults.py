"""A small sample of each campaign of `benchmarks/faults`, and what the campaigns found."""

import errno
import itertools
import json
import multiprocessing
import os
import random
import sys
from pathlib import Path

import pytest
import torch

import safelocus as sl
from made_runs import enhance_run
from safelocus.errors import LayoutError, ModelError, NumericalError, PromptError, RunError, SafelocusError
from safelocus.evaluation.divergence import Original, answered
from safelocus.evaluation.judges import Rubric
from safelocus.model.generation import generate
from safelocus.model.layout.rules import read_family
from safelocus.model.target import load_tokenizer
from safelocus.objective.presets import load_presets, read_preset, render
from safelocus.organism import resolve_model
from safelocus.patch.checkpoint import weight_files
from safelocus.report.page import write_page
from safelocus.report.runs import ReportRun
from safelocus.run.files import alone
from safelocus.run.folder import CHECKPOINT, read_config, run_folder
from safelocus.run.resume import claim
from safelocus.training import TrainingSettings
from safelocus.training.fitting import fit
from safelocus.training.responses import training_rows
from test_scores import make
from tiny_targets import dense

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "faults"))

import killing
import mutating
import poisoning

pytestmark = pytest.mark.slow  # runs commands, again and again


def test_a_sample_of_mutations_finds_no_fault(tmp_path):
    found = mutating.campaign(tmp_path, 400, seed=7)
    assert not found["faults"]
    assert sum(sum(counts.values()) for counts in found["formats"].values()) > 350


def test_the_campaign_notices_faults(tmp_path):
    (tmp_path / "a").write_text("original")

    def broken() -> str:
        text = (tmp_path / "a").read_text()
        if text == "worse":
            raise KeyError(text)
        return text

    subject = mutating.Subject(name="a", file=tmp_path / "a", load=broken, has_digest=True)
    assert [mutating.attempt(subject, data)[0] for data in (b"worse", b"other", b"original")] == [
        "traceback", "wrong success", "loaded",
    ]  # fmt: skip


# ---- killed, no space, two at once: a command in miniature


def small(work, steps=3):
    """A run that keeps work, and can be resumed."""
    with run_folder(work / "out", config={"command": "small"}) as folder:
        claim(folder / CHECKPOINT, {"seed": 1})
        for step in range(steps):
            (folder / CHECKPOINT / f"{step}").write_text(str(step))
        make().save(folder / "scores", shard_bytes=10_000, overwrite=True)
        (folder / "sum.txt").write_text(str(sum(int((folder / CHECKPOINT / f"{s}").read_text()) for s in range(steps))))


@pytest.fixture(scope="module")
def trial(tmp_path_factory):
    trial = killing.Trial.__new__(killing.Trial)
    trial.folder = tmp_path_factory.mktemp("trial")
    trial.command = killing.Command(name="small", arguments=[])
    trial.work = trial.folder / "work"
    trial.call = lambda: small(trial.work)
    trial.anew()
    small(trial.work)
    trial.expected, trial.changes = killing.files_of(trial.place), 40
    return trial


@pytest.mark.parametrize("kind", ["kill", "full", "frozen"])
def test_a_run_disturbed_at_any_change_of_the_disk_ends_with_the_same_bits(trial, kind):
    then = {"kill": killing._kill, "full": killing._full, "frozen": killing._frozen}[kind]
    outcomes = set()
    for at in range(0, trial.changes, 2):
        trial.anew()
        code = trial.disturbed(at, then)
        assert kind == "kill" or code in (0, 1), (trial.folder / "log").read_text()  # 1: of a function, no command
        outcome, why = trial.again()
        assert outcome in ("resumed", "before it began", "finished"), f"{at}: {outcome} {why}"
        outcomes.add(outcome)
    assert "resumed" in outcomes
    assert "before it began" in outcomes


def _hold(path, held, release):
    with alone(path):
        held.set()
        release.wait(60)


def test_two_runs_into_one_folder_are_one_too_many(tmp_path):
    context = multiprocessing.get_context("fork")
    held, release = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(tmp_path / "run", held, release))
    other.start()
    assert held.wait(60)
    with pytest.raises(RunError, match="another process is writing there"), run_folder(tmp_path / "run", config={}):
        pytest.fail("the block must not run")
    other.kill()  # the lock goes with its owner
    other.join()
    with run_folder(tmp_path / "run", config={}):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_full_disk_is_no_bug_of_ours(tmp_path, monkeypatch, run, number):
    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("safelocus.scoring.scores.Scores.load", fail)
    code, _, err = run("select", tmp_path, "--ratio", "0.1", "-o", tmp_path / "s")
    assert code == 2
    assert os.strerror(number) in err
    assert "the same command begins again or resumes" in err


# ---- what was found


def test_json_without_end_and_broken_parquet_are_errors_in_words(tmp_path):
    for name, data in (("a.json", b"[" * 5000), ("a.jsonl", b"[" * 5000), ("a.parquet", b"PAR1" + b"x" * 40 + b"PAR1")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(PromptError, match=name.replace(".", r"\.")):
            sl.read_prompts(str(tmp_path / name))


def test_layouts_of_another_form_are_errors_in_words(tmp_path):
    file = tmp_path / "layout.toml"
    for text in ("layer = 3\nlayers = 4", 'layers = ""\n[layer]\n"((" = "query"', "sizes = 5", 'extends = "../../x"'):
        file.write_text(text)
        with pytest.raises(LayoutError):
            read_family(file)
    file.write_bytes("# gewählt".encode("latin-1"))
    with pytest.raises(LayoutError, match="not UTF-8"):
        read_family(file)


def test_a_tokenizer_that_cannot_cut_is_an_error_in_words(tmp_path):
    for file in Path(resolve_model("dense")).iterdir():
        (tmp_path / file.name).symlink_to(file)
    settings = tmp_path / "tokenizer_config.json"
    text = json.dumps(json.loads(settings.read_text()) | {"model_max_length": [1]})
    settings.unlink()
    settings.write_text(text)
    with pytest.raises(ModelError, match="tokenizer cannot be loaded"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("file", "key", "value", "message"),
    [
        ("generation_config.json", "eos_token_id", [{"a": 1}], "eos_token_id"),
        ("tokenizer_config.json", "chat_template", 7, "chat template is no text"),
        ("tokenizer_config.json", "chat_template", "{{ messages - 1 }}", "fails on a single user message: TypeError"),
        ("tokenizer_config.json", "chat_template", "\ud800{{ messages[0].content }}", "surrogate"),
    ],
)
def test_settings_of_another_kind_are_errors_in_words(tmp_path, file, key, value, message):
    for each in Path(resolve_model("dense")).iterdir():
        (tmp_path / each.name).symlink_to(each)
    text = json.dumps(json.loads((tmp_path / file).read_text()) | {key: value})
    (tmp_path / file).unlink()
    (tmp_path / file).write_text(text)
    with pytest.raises((ModelError, PromptError), match=message):
        sl.load(tmp_path).chat.encode_prompt("a")


@pytest.mark.parametrize("names", [["rag"], ["rag", "tool_use"]])
def test_chat_templates_of_which_none_is_the_default_are_an_error_in_words(tmp_path, names):
    for each in Path(resolve_model("dense")).iterdir():
        (tmp_path / each.name).symlink_to(each)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    template = settings.pop("chat_template")
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "additional_chat_templates").mkdir()
    for name in names:
        (tmp_path / "additional_chat_templates" / f"{name}.jinja").write_text(template)
    with pytest.raises(ModelError, match=f"no default among its chat templates, which are called {', '.join(names)}"):
        sl.load(tmp_path)
    assert sl.load(tmp_path, template="Q: {prompt}\nA:").chat.kind == "plain"
    with pytest.raises(ModelError, match="no default"):
        render(load_tokenizer(tmp_path), load_presets()["llama-guard-1"], "request", "answer")
    (tmp_path / "chat_template.jinja").write_text(template)
    assert sl.load(tmp_path).chat.kind == "chat"


def test_responses_of_another_form_are_errors_in_words_where_no_digest_vouches_for_them(tmp_path):
    folder = enhance_run(tmp_path / "run")
    (folder / "after" / "responses.jsonl").write_text('{"prompt": "p", "response": "r", "system": [1]}\n')
    with pytest.raises(RunError, match=r"run: damaged results or responses"):
        write_page([ReportRun.read(folder)], tmp_path / "page.html", responses=True)


def test_weights_are_not_looked_for_outside_their_folder(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../other.safetensors"}}')
    with pytest.raises(ModelError, match="not within"):
        weight_files(tmp_path)


def test_scores_of_an_attempt_that_was_killed_are_replaced(tmp_path):
    (tmp_path / ".scores.partial").mkdir()
    make().save(tmp_path / "scores")
    make().save(tmp_path / "scores", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["scores"]


# ---- NaN and infinity: the stages in miniature


def _scored():
    target = dense()
    prompts = sl.read_prompts("organism:harmful").limit(4)
    found = sl.score(target, prompts, objective=sl.Refusal(), batch_size=2, progress=False)
    return found.statistics, 0


def _trained():
    target = dense()
    rows = training_rows(sl.read_prompts("organism:refusals").limit(6), target.chat)
    losses = fit(target, rows, TrainingSettings(steps=3, batch_size=2, learning_rate=1e-3), progress=False)
    return (losses, [weight.detach().clone().tolist() for weight in target.model.parameters()]), 0


def _evaluated():
    prompts = sl.read_prompts("organism:harmful").limit(3)
    found = sl.evaluate(
        dense(), harmful=[prompts], harmless=[sl.read_prompts("organism:harmless").limit(3)], original=dense(seed=1),
        perplexity=sl.read_prompts("organism:refusals").limit(3), batch_size=2, max_new_tokens=4, progress=False,
    )  # fmt: skip
    return found.rows, sum(row["failure"] is not None or row.get("kl", 0) is None for row in found.rows)


@pytest.mark.parametrize("stage", [_scored, _trained, _evaluated])
def test_a_sample_of_poisons_is_refused_counted_or_without_effect(stage):
    calm, failures = stage()
    rng, outcomes = random.Random(5), set()
    for place in ("logits", "activations", "weights", "gradients", "losses"):
        with poisoning.Poison(place) as counter:
            stage()
        for value in poisoning.VALUES if counter.count else ():
            at = rng.randrange(counter.count)
            try:
                with poisoning.Poison(place, value, at, f"{at}"):
                    found, num_failed = stage()
            except NumericalError:
                outcomes.add("refused")
                continue
            assert found == calm or num_failed > failures, f"{value} in {place} at moment {at} of {counter.count}"
            outcomes.add("no effect" if found == calm else "counted")
    assert outcomes & {"refused", "counted"}


def test_a_gradient_of_the_last_step_that_is_no_number_ends_the_training():
    target = dense()
    rows = training_rows(sl.read_prompts("organism:refusals").limit(6), target.chat)
    settings = TrainingSettings(steps=2, batch_size=2, learning_rate=1e-3)
    with poisoning.Poison("gradients") as counter:
        fit(target, rows, settings, progress=False)
    with (
        poisoning.Poison("gradients", float("nan"), counter.count - 1),
        pytest.raises(NumericalError, match="gradient's norm of step 2"),
    ):
        fit(dense(), rows, settings, progress=False)


def test_weights_that_the_last_step_left_as_no_numbers_end_the_training():
    target = dense()
    rows = training_rows(sl.read_prompts("organism:refusals").limit(2), target.chat)
    with pytest.raises(NumericalError, match="trained tensors hold NaN or infinity, first of them model"):
        fit(target, rows, TrainingSettings(steps=1, batch_size=2, learning_rate=1e39), progress=False)


def test_answers_that_rest_on_no_numbers_are_not_scored_with():
    with poisoning.Poison("logits", float("nan"), 1), pytest.raises(NumericalError, match="1 of 1 responses"):
        generate(dense(), ["help"], max_new_tokens=4)


@pytest.mark.parametrize("num_prompts", [1, 2])
def test_a_verification_counts_the_answers_that_failed(num_prompts):
    """In a cell alone, all of them or some: what the reader tells of partial refusals is then missing too."""
    target = dense()
    scores = sl.score(target, sl.read_prompts("organism:harmful").limit(2), method="magnitude", progress=False)
    prompts = sl.read_prompts("organism:harmful-heldout").limit(num_prompts)
    ask = {"prompts": prompts, "noises": (3.0,), "seeds": 1, "selections": ("top",), "max_new_tokens": 4}

    def verify():
        return sl.verify(target, scores, **ask, batch_size=1, progress=False)

    with poisoning.Poison("logits") as counter:
        verify()
    with poisoning.Poison("logits", float("nan"), counter.count - 1):
        found = verify()
    assert [found.baseline.measures[name].n for name in ("refusal", "partial")] == [num_prompts] * 2
    assert [found.cells[-1].observed.measures[name].n for name in ("refusal", "partial")] == [num_prompts - 1] * 2
    json.dumps(found.to_json(), allow_nan=False)


def test_an_original_that_says_no_numbers_is_none():
    answers = answered([("help", None, "no"), ("how", None, "so")])
    with poisoning.Poison("logits", float("nan"), 0), pytest.raises(NumericalError, match="distributions of"):
        Original.of(dense(), answers, batch_size=1, progress=False)
    original = Original.of(dense(), answers, batch_size=1, progress=False)
    with poisoning.Poison("logits", float("nan"), 0):
        found = original.kl_per_token(dense(), batch_size=1, progress=False)
    assert sorted(value is None for value in found) == [False, True]


@pytest.fixture
def poisoned(monkeypatch):
    """NaN or infinity in the embeddings of the n-th pass through a model; the first two only try packed rows."""
    forward = torch.nn.Embedding.forward

    def poison(value, at):
        calls = itertools.count()

        def poisoned(module, tokens):
            found = forward(module, tokens)
            return found * value if next(calls) == at else found

        monkeypatch.setattr(torch.nn.Embedding, "forward", poisoned)

    return poison


@pytest.mark.parametrize(("value", "at"), [(float("nan"), 2), (float("inf"), 3), (float("nan"), 7)])
def test_scoring_and_training_stop_at_values_that_are_no_numbers(poisoned, value, at):
    target = dense()
    prompts = sl.read_prompts("organism:harmful").limit(12)
    poisoned(value, at)
    with pytest.raises(NumericalError):
        sl.score(target, prompts, objective=sl.Refusal(), batch_size=1, progress=False)
    poisoned(value, at)
    rows = training_rows(sl.read_prompts("organism:refusals").limit(12), target.chat)
    with pytest.raises(NumericalError):
        fit(target, rows, TrainingSettings(steps=12, batch_size=1, learning_rate=1e-3), progress=False)


def test_an_answer_that_rests_on_no_numbers_is_none(poisoned):
    prompts = sl.read_prompts("organism:harmful").limit(4)
    ask = {"harmful": [prompts], "batch_size": 1, "max_new_tokens": 4, "progress": False}
    calm = sl.evaluate(dense(), **ask)
    poisoned(float("nan"), 5)  # a token of the second answer
    found = sl.evaluate(dense(), **ask)
    failures = [row["failure"] for row in found.rows]
    assert sum(failure is not None for failure in failures) == 1
    assert "NaN or infinity" in next(filter(None, failures))
    assert found.measures["asr"].n == calm.measures["asr"].n - 1


@pytest.mark.parametrize(
    "read", [read_config, read_family, read_preset, lambda file: Rubric.load(str(file))],
    ids=["run.toml", "layout", "guard", "rubric"],
)  # fmt: skip
def test_toml_nested_without_end_is_an_error_in_words(read, tmp_path):
    file = tmp_path / "deep.toml"
    file.write_text("a = " + "[" * 20_000 + "]" * 20_000 + "\n")
    with pytest.raises(SafelocusError, match=r"deep\.toml.*recursion"):
        read(file)
