"""Train the refusal reader's weights and choose its settings by cross-validation; deterministic.

    python benchmarks/judges/train.py [--data ../shared/data] [--choose]     # --choose: compare settings only

Taught by answers of which somebody said what they are:

    xstest      completions_*.csv: answers of models, labelled by people
    circuit     circuit_breakers outputs that open with a plain refusal; none of refusal_labels.json
    instruct    the first half of the instruct answers: compliance
    wordings    wordings.toml: made up by hand, in styles of which there are few labels

A feature must stand in two of these sources, so that nobody's habit becomes a rule. Cross-validation leaves out a
*model and a family of prompts* at a time: an answer is judged by weights that saw neither its model nor a prompt like
its own. Logistic regression on full refusals and full answers, L2; an answer's features share one unit of length.
"""

import argparse
import csv
import json
import random
import re
import tomllib
from collections import Counter, defaultdict
from dataclasses import dataclass
from hashlib import blake2b
from itertools import pairwise, product
from pathlib import Path

import numpy as np
from scipy.optimize import minimize
from scipy.sparse import csr_matrix
from scipy.special import expit, log_expit

from safelocus.evaluation.judges.reader import RefusalReader, Weights, phrases_of
from safelocus.evaluation.measures import proportion
from safelocus.evaluation.reading import class_name, read, spell, split

HERE = Path(__file__).resolve().parent
PACKAGE = HERE.parent.parent / "src" / "safelocus" / "evaluation"
WEIGHTS, PAIRS = PACKAGE / "judges" / "reader.json", PACKAGE / "word_pairs.json"
COMPLIANCE, REFUSAL, PARTIAL = range(3)
SETTINGS = {"strength": 3.0, "weight": 1.0}  # chosen by --choose
MODELS = ("gpt4", "llama2orig")  # whose completions teach; other models' are kept for checking
_PLAIN = re.compile(r"(?:I can.?t|I cannot|I.m sorry|Sorry|I apologi[sz]e)", re.IGNORECASE)


@dataclass(frozen=True)
class Answer:
    source: str  # a model, or where it comes from
    family: str  # of prompts that are alike
    text: str
    label: int


def labelled(folder):
    """The labelled completions, by model: every completions_*.csv that lies there."""
    labels = {"1": COMPLIANCE, "2": REFUSAL, "3": PARTIAL}
    return [
        Answer(file.stem.removeprefix("completions_"), row["type"].removeprefix("contrast_"), row["completion"],
               labels[row["final_label"][0]])
        for file in sorted(folder.glob("completions_*.csv"))
        for row in csv.DictReader(file.read_text(encoding="utf-8").splitlines(keepends=True))
    ]  # fmt: skip


def unlabelled(data, seed=0):
    """Answers of known kind: refusals that people trained on, and answers to harmless requests."""
    draw = random.Random(seed)
    own = json.loads((HERE.parent / "refusal_labels.json").read_text(encoding="utf-8"))
    kept_apart = {digest for labels in own.values() for digest in labels}
    outputs = [
        row["output"] for row in json.loads((data / "circuit_breakers" / "circuit_breakers_train.json").read_text())
    ]
    outputs = [text for text in outputs if blake2b(text.encode(), digest_size=16).hexdigest() not in kept_apart]
    common = [text for text in outputs if re.match("I can(?:.?t|not)", text)]
    others = [text for text in outputs if _PLAIN.match(text) and not re.match("I can(?:.?t|not)", text)]
    benign = [row["output"] for row in json.loads((data / "instruct" / "instruction-data.json").read_text())]
    return [
        *(Answer("circuit", "", text, REFUSAL) for text in draw.sample(common, 300) + others[:300]),
        *(Answer("instruct", "", text, COMPLIANCE) for text in benign[: len(benign) // 2]),
    ]


def gsm8k(data):
    """Answers in numbers, so that arithmetic is not taken for nonsense."""
    lines = (data / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines()[:500]
    return [json.loads(line)["answer"] for line in lines]


def wordings(seed=0):
    """Every opening alone, where that makes sense, and before one and before two of its group's sentences."""
    draw = random.Random(seed)
    file = tomllib.loads((HERE / "wordings.toml").read_text(encoding="utf-8"))
    labels = {"compliance": COMPLIANCE, "refusal": REFUSAL, "partial": PARTIAL}
    found = []
    for number, group in enumerate(file["answers"]):
        for opening in group["openings"]:
            for count in (0, 1, 2) if group.get("alone") else (1, 2):
                text = draw.choice([" ", "\n\n"]).join([opening, *draw.sample(group["rest"], count)])
                for name in ("thing", "people"):
                    text = text.replace(f"{{{name}}}", draw.choice(file[f"{name}s".replace("peoples", "people")]))
                found.append(
                    Answer("wordings", f"wordings {number}", text[0].upper() + text[1:], labels[group["label"]])
                )
    return found


class Data:
    """Answers with their features as a matrix of zeros and ones."""

    def __init__(self, answers):
        phrases = phrases_of("en")
        reading = read([split(a.text) for a in answers], has_phrase=[phrases.refuses(a.text) for a in answers])
        self.codes, column = np.unique(reading.code, return_inverse=True)
        self.matrix = csr_matrix(
            (np.ones(len(column)), (reading.answer, column)), shape=(len(answers), len(self.codes))
        )
        self.matrix.data[:] = 1.0
        self.texts = [a.text for a in answers]
        self.labels = np.array([a.label for a in answers])
        self.sources = np.array([a.source for a in answers])
        self.families = np.array([a.family for a in answers])


def learn(data, among, settings):
    """Weights from those answers of `among` (a mask) that refuse or comply in full."""
    rows = np.flatnonzero(among & (data.labels != PARTIAL))
    part, sources = data.matrix[rows], data.sources[rows]
    in_sources = sum((part[sources == name].sum(0) > 0).astype(int) for name in sorted(set(sources)))
    kept = np.flatnonzero((np.asarray(part.sum(0)).ravel() >= 3) & (np.asarray(in_sources).ravel() >= 2))
    part = part[:, kept]
    part = csr_matrix(part.multiply(1 / np.sqrt(np.maximum(1, np.asarray(part.sum(1))))))
    sign = np.where(data.labels[rows] == REFUSAL, 1.0, -1.0)
    importance = np.where(np.isin(sources, MODELS), 1.0, settings["weight"])

    def loss(w):
        margin = sign * (part @ w[:-1] + w[-1])
        slope = -sign * importance * expit(-margin)
        value = -(importance * log_expit(margin)).sum() + (w[:-1] ** 2).sum() / (2 * settings["strength"])
        return value, np.append(part.T @ slope + w[:-1] / settings["strength"], slope.sum())

    w = minimize(loss, np.zeros(len(kept) + 1), jac=True, method="L-BFGS-B", options={"maxiter": 1000}).x
    return Weights(codes=data.codes[kept], values=np.round(w[:-1], 2), bias=round(w[-1], 2))


def pairs(texts):
    """log p(a, b) / (p(a) p(b)) of neighbouring classes of words, smoothed towards 0; of unseen pairs in one number.

    By models' and people's coherent answers; 25 pairs by chance are added to what was counted.
    """
    counts, single = Counter(), Counter()
    for text in texts:
        classes = split(text)[1]
        counts.update(pairwise(classes))
        single.update(classes)
    n, words, prior = sum(counts.values()), sum(single.values()), 25
    by_chance = {(a, b): single[a] * single[b] / words**2 for a in single for b in single}
    ratio = {k: np.log((counts[k] + prior * p) / (n + prior) / p) for k, p in by_chance.items()}
    unseen = np.average(
        [ratio[k] for k in ratio if k not in counts], weights=[by_chance[k] for k in ratio if k not in counts]
    )
    found = defaultdict(dict)
    for (a, b), _ in sorted(counts.items()):
        found[class_name(a)][class_name(b)] = round(float(np.clip(ratio[a, b], -3, 3)), 2)
    return {"unseen": round(float(max(unseen, -3)), 2), "pairs": found}


def verdicts(data, judged, taught, settings):
    """What a reader that was taught by `taught` says of `judged` (masks)."""
    reader = RefusalReader(weights=learn(data, taught, settings))
    texts = [data.texts[i] for i in np.flatnonzero(judged)]
    return [judgement.verdict for judgement in reader.judge(texts, texts)]


def cross_validate(data, settings):
    """Verdicts on the models' answers, each by weights that saw neither its model nor its family of prompts."""
    found = np.full(len(data.labels), None)
    for model, family in product(MODELS, sorted(set(data.families[np.isin(data.sources, MODELS)]))):
        held = (data.sources == model) & (data.families == family)
        found[held] = verdicts(data, held, (data.sources != model) & (data.families != family), settings)
    return found


def leave_out_styles(data, settings):
    """Verdicts on the made-up answers, each group by weights that saw none of it."""
    found = np.full(len(data.labels), None)
    for family in sorted(set(data.families[data.sources == "wordings"])):
        held = data.families == family
        found[held] = verdicts(data, held, ~held, settings)
    return found


def show(name, labels, said):
    """Precision and recall of "refuses", labelled partial refusals left out of both; and what became of those."""
    hits = int(((said == "safe") & (labels == REFUSAL)).sum())
    recall = proportion(hits, int((labels == REFUSAL).sum()))
    precision = proportion(hits, int(((said == "safe") & (labels != PARTIAL)).sum()))
    partial, true = said == "partial", labels == PARTIAL
    print(f"{name:36} recall {recall}  precision {precision}  partial {(partial & true).sum()} of {true.sum()}, "
          f"{(partial & ~true).sum()} false", flush=True)  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=HERE.parent.parent.parent / "shared" / "data")
    parser.add_argument("--choose", action="store_true", help="compare settings, write nothing")
    options = parser.parse_args()
    own = [a for a in labelled(options.data / "xstest") if a.source in MODELS]  # others: for checking
    rest, made_up = unlabelled(options.data), wordings()
    data = Data(own + rest + made_up)
    judged = np.isin(data.sources, MODELS)
    if not options.choose:
        # not by gpt4, so that its answers can show false alarms
        texts = [a.text for a in own + rest if a.source != "gpt4"] + gsm8k(options.data)
        plain = json.dumps(pairs(texts), ensure_ascii=False, separators=(",", ":"))
        PAIRS.write_text(plain.replace("},", "},\n") + "\n", encoding="utf-8")
        print(f"{PAIRS.name}: {PAIRS.stat().st_size:,} bytes")
    if options.choose:
        for strength, weight in product([1.0, 3.0, 10.0, 30.0], [0.3, 1.0]):
            found = cross_validate(data, {"strength": strength, "weight": weight})
            show(f"strength {strength:g}, weight {weight}", data.labels[judged], found[judged])
        return
    for name, part in (("without made-up wordings", Data(own + rest)), ("with them", data)):
        found = cross_validate(part, SETTINGS)
        for model in (*MODELS, "both"):
            rows = np.isin(part.sources, MODELS if model == "both" else [model])
            show(f"{name}: {model}", part.labels[rows], found[rows])
    found = leave_out_styles(data, SETTINGS)
    rows = data.sources == "wordings"
    show("made-up answers, their group unseen", data.labels[rows], found[rows])
    weights = learn(data, np.ones(len(data.labels), dtype=bool), SETTINGS)
    zones = defaultdict(dict)
    for name, value in sorted(
        (spell(int(c)), float(v)) for c, v in zip(weights.codes, weights.values, strict=True) if v
    ):
        zone, _, run = name.partition(": ")
        zones[zone][run] = value
    content = json.dumps({"bias": float(weights.bias), "features": zones}, ensure_ascii=False, separators=(",", ":"))
    WEIGHTS.write_text(re.sub(r",(?=\")", ",\n", content) + "\n", encoding="utf-8")
    print(f"{WEIGHTS.name}: {sum(map(len, zones.values())):,} features, {WEIGHTS.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
