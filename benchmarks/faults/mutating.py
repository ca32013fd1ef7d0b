"""What becomes of inputs that are damaged or forged: an error in words, a right result, or a fault?

    python benchmarks/faults/mutating.py [--number 10000] [--seed 0] [--only NAME]

Every format that is read is made once, tiny, and mutated: bits turned, bytes put in, taken out, doubled, files cut
short, and values of JSON replaced by others. What is read then is refused in words, or loaded. Faults:

    traceback       any other exception; exit code 1 of a command
    wrong success   a changed file with a digest that loads; prompts that are no text

Writes numbers beside `docs/results/faults.md`, and the page.
"""

import argparse
import copy
import json
import random
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import torch

import safelocus as sl
from safelocus.cli import main as command_line
from safelocus.errors import SafelocusError
from safelocus.evaluation import Evaluation
from safelocus.evaluation.incoherence import incoherence
from safelocus.evaluation.judges import RefusalMatcher, RefusalReader
from safelocus.evaluation.judges.endpoint import _GivenUp, _read_answer, _Retry
from safelocus.evaluation.judges.rubric import Rubric, shipped_rubrics
from safelocus.evaluation.matching import read_choice, read_number
from safelocus.evaluation.tasks import read_task
from safelocus.model.layout import Layout
from safelocus.model.target import load_config
from safelocus.objective.presets import read_preset
from safelocus.organism import resolve_model
from safelocus.patch import Patch
from safelocus.report.page import write_page
from safelocus.report.runs import ReportRun
from safelocus.run.files import DIGESTS, seal
from safelocus.run.resume import Journal, Snapshots, claim
from safelocus.run.tensors import own_digest
from safelocus.scoring.scores import Scores
from safelocus.selection.selection import Selection

sys.path.insert(0, str(Path(__file__).parent))

from page import record

TOKENS = [b"\0", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"NaN", b"1e999", b"-1", b"9" * 400, b"null", b"[" * 3000,
          b'"', b"\n", b"\r", b",", b"{}", b"../x", b"\\ud800", b"\x1b[2J", "\u202e".encode(), b"{{"]  # fmt: skip
VALUES: list[Any] = [None, True, -1, 0, 10**30, 1e308, "", "x", "\ud800", "../../x", [], {}, [None], {"a": []}, "0"]


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One file of a format.

    Attributes:
        name: of the format.
        file: that is mutated.
        load: reads it, and whatever belongs to it; where it has a digest, what it said.
        has_digest: whatever was changed in it is to be noticed.
        forge: gives the file the digest that belongs to what it says now.
        share: of all mutations.
    """

    name: str
    file: Path
    load: Callable[[], object]
    has_digest: bool = False
    forge: Callable[[], None] | None = None
    share: float = 1.0


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One change, or a few, of any kind."""
    if rng.random() < 0.3 and (changed := _mutate_json(data, rng)) is not None:
        return changed
    raw = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        at = rng.randrange(len(raw) + 1)
        end = min(len(raw), at + rng.choice((1, 1, 4, 40)))
        kind = rng.randrange(6)
        if kind == 0 and at < len(raw):
            raw[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del raw[at:end]
        elif kind == 2:
            raw[at:at] = raw[at:end]
        elif kind == 3:
            raw[at:at] = rng.choice(TOKENS)
        elif kind == 4:
            raw[at:end] = rng.choice(TOKENS)
        elif rng.random() < 0.3:
            del raw[at:]
    return bytes(raw)


def _mutate_json(data: bytes, rng: random.Random) -> bytes | None:
    """Another value in its place, one more, or one less; None where the data are no JSON (lines)."""
    lines = data.split(b"\n") if data.count(b"\n{") else [data]
    at = rng.randrange(len(lines))
    try:
        value = json.loads(lines[at])
    except ValueError:
        return None
    lines[at] = json.dumps(_changed(value, rng)).encode()
    return b"\n".join(lines)


def _changed(value: Any, rng: random.Random) -> Any:
    """A JSON value with one change somewhere."""
    value, places = copy.deepcopy(value), []

    def walk(node: Any) -> None:
        for key in node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            places.append((node, key))
            walk(node[key])

    walk(value)
    if not places or rng.random() < 0.03:
        return copy.deepcopy(rng.choice(VALUES))
    node, key = rng.choice(places)
    if rng.random() < 0.25:
        del node[key]
    elif rng.random() < 0.1 and isinstance(node, dict):
        node[rng.choice(["", "x", "\0"])] = node.pop(key)
    else:
        node[key] = copy.deepcopy(rng.choice(VALUES))
    return value


def attempt(subject: Subject, data: bytes) -> tuple[str, str]:
    """(what came of it, the traceback of a fault)."""
    original = subject.file.read_bytes()
    subject.file.write_bytes(data)
    try:
        with redirect_stderr(StringIO()), redirect_stdout(StringIO()):
            if subject.forge is not None:
                subject.forge()
            found = subject.load()
    except SafelocusError:
        return "refused", ""
    except Exception:  # noqa: BLE001 (this is what is looked for)
        return "traceback", traceback.format_exc()
    finally:
        subject.file.write_bytes(original)
        if subject.forge is not None:
            subject.forge()
    if subject.has_digest and found != subject.load():  # another space or so in a digest's own file says the same
        return "wrong success", "another value was loaded"
    return "loaded", ""


# ---- the formats

ROWS = [{"prompt": f"how to make a kite, part {i}", "response": "Sure. First\ncut.", "category": "x"} for i in range(4)]


def prompts(folder: Path) -> list[Subject]:
    folder.mkdir()
    columns = list(ROWS[0])
    quoted = [[value.replace("\n", " ") for value in row.values()] for row in ROWS]
    table = pa.table({name: [row[name] for row in ROWS] for name in columns})
    pa.parquet.write_table(table, folder / "a.parquet")
    texts = {
        "a.json": json.dumps(ROWS),
        "a.jsonl": "\n".join(map(json.dumps, ROWS)) + "\n",
        "a.csv": "\n".join(",".join(f'"{cell}"' for cell in row) for row in (columns, *quoted)) + "\n",
        "a.tsv": "\n".join("\t".join(row) for row in (columns, *quoted)) + "\n",
        "a.txt": "\n".join(row["prompt"] for row in ROWS) + "\n",
    }
    for name, text in texts.items():
        (folder / name).write_text(text)

    def read(file: Path) -> None:
        found = sl.read_prompts(str(file))
        assert len(found)
        assert all(isinstance(text, str) and text.strip() for text in found.texts)
        found.texts[0].encode("utf-8", "surrogatepass")  # halves of pairs are data, until a tokenizer reads them

    task = folder / "task.jsonl"
    task.write_text("\n".join(json.dumps({"question": f"1 + {i}", "answer": str(i + 1)}) for i in range(4)) + "\n")
    files = [*map(folder.__truediv__, texts), folder / "a.parquet"]
    return [
        *(Subject(name=f"prompts {f.suffix}", file=f, load=lambda f=f: read(f), share=1.5) for f in files),
        Subject(name="task", file=task, load=lambda: read_task(str(task))),
    ]


def artefacts(folder: Path) -> list[Subject]:
    folder.mkdir()
    layout = Layout.from_config(load_config("organism:dense"))
    names = layout.eligible_tensors[:3]
    coordinates = {name: torch.arange(0, 60, 3) for name in names}
    values = {name: torch.linspace(0, 1, 20) for name in names}
    selection = Selection(coordinates=coordinates, scores=values, layout=layout)
    selection.save(folder / "selection.safetensors")
    target = sl.load("organism:dense")
    Patch.of(target, selection, new=values).save(folder / "patch.safetensors")
    found = sl.score(target, sl.read_prompts("organism:harmful").limit(2), method="magnitude", progress=False)
    found.save(folder / "scores", tensors=False)
    subjects = []
    whole = {"selection": lambda f: Selection.load(f).identity(), "patch": lambda f: Patch.load(f).selection.identity()}
    for kind, load in whole.items():
        file = folder / f"{kind}.safetensors"
        forged = folder / f"forged-{kind}.safetensors"
        shutil.copyfile(file, forged)
        subjects += [
            Subject(
                name=kind,
                file=file,
                load=lambda f=file, o=load: o(f),
                has_digest=True,
                share=3,
            ),
            Subject(
                name=f"{kind}, forged", file=forged, load=lambda f=forged, o=load: o(f), forge=lambda f=forged: forge(f)
            ),
        ]
    scores = folder / "scores"
    forged_scores = folder / "forged-scores"
    shutil.copytree(scores, forged_scores)
    return [
        *subjects,
        *(
            Subject(
                name=f"scores: {name}", file=scores / name, load=lambda: Scores.load(scores).identity(), has_digest=True
            )
            for name in ("scores.json", DIGESTS)
        ),
        Subject(
            name="scores, forged", file=forged_scores / "scores.json", load=lambda: Scores.load(forged_scores),
            forge=lambda: seal(forged_scores),
        ),
    ]  # fmt: skip


def forge(file: Path) -> None:
    """Give a mutated safetensors file the digest of its bytes, where its place is still there."""
    try:
        digest = own_digest(file)
    except Exception:  # noqa: BLE001 (whatever it is, loading it is the test)
        return
    if digest is not None:
        raw = bytearray(file.read_bytes())
        raw[digest.place : digest.place + 32] = digest.found.encode()
        file.write_bytes(raw)


class Echo:
    """Answers without a model."""

    name = "echo"

    def length(self, request: Any) -> int:
        return 0

    def respond(self, requests: Any) -> list[Any]:
        from safelocus.evaluation.responding import Reply

        return [Reply(text=f"I cannot help with {request.prompt}", finished=True) for request in requests]

    def identity(self) -> dict[str, Any]:
        return self.describe()

    def describe(self) -> dict[str, Any]:
        return {"kind": "echo", "name": "echo"}


def runs(folder: Path) -> list[Subject]:
    folder.mkdir()
    harmful = sl.read_prompts("organism:harmful").limit(3)
    evaluation = sl.evaluate(Echo(), harmful=[harmful], progress=False)
    sealed, bare, kept = folder / "sealed", folder / "bare", folder / "kept"
    for place in (sealed, bare):
        place.mkdir()
        evaluation.save(place)
        (place / "run.toml").write_text('command = "evaluate"\nmodel = "echo"\nseed = 0\n')
    seal(sealed)
    (bare / DIGESTS).unlink()
    claim(kept, {"seed": 1})
    Journal(kept, "answers").add([(("a", 1), "yes"), (("b", 2), [0.1, None])])
    Snapshots(kept).save(3, {"sum": torch.arange(4.0)}, {"done": 2})

    def evaluated(place: Path) -> object:
        run = ReportRun.read(place)
        write_page([run], folder / "page.html", responses=True)
        return Evaluation.load(place), run.config

    def resumed() -> object:
        total = torch.zeros(4)
        claim(kept, {"seed": 1})
        journal = Journal(kept, "answers")
        state = Snapshots(kept).load({"sum": total})
        if len(journal) < 2:  # left out, as what a crash cut off: it is done again
            raise SafelocusError("left out")
        return state, total.tolist(), journal[("a", 1)], journal[("b", 2)]

    files = ("results.json", "responses.jsonl", "run.toml", DIGESTS)
    works = ("identity.json", "answers.jsonl", "snapshot-3.safetensors")
    return [
        *(
            Subject(name=f"run: {name}", file=sealed / name, load=lambda: evaluated(sealed), has_digest=True)
            for name in files
        ),
        *(
            Subject(name=f"run without digests: {name}", file=bare / name, load=lambda: evaluated(bare))
            for name in files[:3]
        ),
        *(Subject(name=f"unfinished: {name}", file=kept / name, load=resumed, has_digest=True) for name in works),
    ]


def descriptions(folder: Path) -> list[Subject]:
    folder.mkdir()
    config = load_config("organism:dense")
    rubrics = (Path(sl.__file__).parent / "evaluation/judges/rubrics.toml").read_text(encoding="utf-8")
    texts = {
        "layout.toml": (Path(sl.__file__).parent / "model/layout/families/llama.toml").read_text(encoding="utf-8"),
        "guard.toml": 'name = "mine"\nmatches = ["a*"]\nformat = "chat"\nsafe = ["safe"]\nunsafe = ["unsafe"]\n',
        "rubric.toml": "[[rubric]]" + rubrics.split("[[rubric]]")[1],
        "run.toml": 'command = "score"\nmodel = "organism:nowhere"\nprompts = "organism:harmful"\nrefusal = true\n'
        "ratio = 0.01\nmethod = \"esi\"\nseed = 0\nwhere = []\n",
    }  # fmt: skip
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")

    def score() -> None:
        try:
            command_line(["score", "--config", str(folder / "run.toml"), "-o", str(folder / "out")])
        except SystemExit as stop:
            if stop.code == 1:
                raise RuntimeError("exit code 1") from stop
            if stop.code == 2:
                raise SafelocusError("refused") from stop

    loads = {
        "layout.toml": lambda: Layout.from_config(config, file=folder / "layout.toml"),
        "guard.toml": lambda: read_preset(folder / "guard.toml"),
        "rubric.toml": lambda: Rubric.load(str(folder / "rubric.toml")),
        "run.toml": score,
    }
    return [
        Subject(name=name, file=folder / name, load=load, share=0.5 if name == "run.toml" else 1.5)
        for name, load in loads.items()
    ]


def answers(folder: Path) -> list[Subject]:
    folder.mkdir()
    body = {"choices": [{"message": {"content": "Score: 4"}, "finish_reason": "stop"}], "usage": {"prompt_tokens": 3}}
    texts = {
        "answer.txt": "The answer is harmful. I cannot say more, but\n**Score: 4**\nrefusal: no\n42.5 (B)\n",
        "answer.json": json.dumps({"score": 4, "refusal": "no", "specific": 3, "convincing": 2}),
        "body.json": json.dumps(body),
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    rubrics, matcher, reader = shipped_rubrics().values(), RefusalMatcher(), RefusalReader()

    def judged(name: str) -> None:
        text = (folder / name).read_bytes().decode("utf-8", "surrogatepass" if name == "x" else "replace")
        for rubric in rubrics:
            reading = rubric.read(text)
            assert reading is None or reading.score == reading.score, "NaN"
        matcher.judge([text], [text])
        reader.judge([text], [text])
        incoherence(text)
        read_number(text)
        read_choice(text, ["yes", "no"], letters=True)

    def received() -> None:
        try:
            body = (folder / "body.json").read_bytes().decode("utf-8", "replace")
            answer = _read_answer(body, shown=body[:200])
        except (_Retry, _GivenUp) as error:
            raise SafelocusError(str(error)) from error
        assert isinstance(answer.text, str)
        assert answer.text.strip()

    return [
        Subject(name="judge's answer", file=folder / "answer.txt", load=lambda: judged("answer.txt")),
        Subject(name="judge's answer, JSON", file=folder / "answer.json", load=lambda: judged("answer.json")),
        Subject(name="endpoint's body", file=folder / "body.json", load=received),
    ]


def models(folder: Path) -> list[Subject]:
    shutil.copytree(resolve_model("dense"), folder)
    names = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")

    def load() -> None:
        target = sl.load(folder)
        target.chat.encode_prompt("how to bake a cake")

    return [Subject(name=f"model: {name}", file=folder / name, load=load, share=0.5) for name in names]


def subjects(folder: Path, only: str = "") -> list[Subject]:
    """All formats, made in a folder."""
    made = [prompts, artefacts, runs, descriptions, answers, models]
    found = [subject for make in made for subject in make(folder / make.__name__)]
    return [subject for subject in found if only in subject.name]


def campaign(folder: Path, number: int, seed: int = 0, only: str = "") -> dict[str, Any]:
    """Mutate so many times in all; counts by format, and the faults."""
    every = subjects(folder, only)
    total = sum(subject.share for subject in every)
    table, faults = {}, []
    for subject in every:
        rng, counts = random.Random(f"{seed} {subject.name}"), Counter[str]()
        original = subject.file.read_bytes()
        subject.load() if subject.name != "run.toml" else None  # unmutated, it loads
        for _ in range(round(number * subject.share / total)):
            data = mutate(original, rng)
            if data != original:
                outcome, why = attempt(subject, data)
                counts[outcome] += 1
                if why:
                    print(f"\n{outcome} in {subject.name}\n{why}\n{data[:600]!r}")
                    faults.append({"format": subject.name, "outcome": outcome, "why": why, "data": repr(data[:4000])})
        table[subject.name] = dict(counts)
        print(f"{subject.name:45} {dict(counts)}", flush=True)
    return {"seed": seed, "formats": table, "faults": faults}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="formats whose name has this; nothing is recorded then")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = campaign(Path(folder), options.number, options.seed, options.only)
    if not options.only:
        record("mutations", {key: value for key, value in found.items() if key != "faults"})


if __name__ == "__main__":
    main()
