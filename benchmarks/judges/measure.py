"""How often is each judge right? Every judge that needs no other machine, against completions that people labelled.

    python benchmarks/judges/measure.py [--data ../shared/data] [--show]

Precision and recall of "refuses in full", labelled partial refusals left out (how many of those were called what stands
beside). The reader is taught by two models' completions: on those it stands cross-validated (train.py: its model and
all prompts of the same kind unseen); every other `completions_MODEL.csv` that lies there is new to it. Then samples
labelled by the hash (refusal_labels.json), false alarms on answers to harmless requests, Cohen's kappa of the judges,
and answers a second of one core.
"""

import argparse
import json
import random
import time
from hashlib import blake2b
from itertools import combinations
from pathlib import Path

import numpy as np
import train

from safelocus.evaluation.incoherence import incoherence
from safelocus.evaluation.judges import load_judge
from safelocus.evaluation.measures import cohens_kappa, proportion
from safelocus.evaluation.reading import split


def texts_of(data):
    """Answers to harmless requests and questions, by name; the reader was taught by the first half of `instruct`."""
    instruct = [row["output"] for row in json.loads((data / "instruct" / "instruction-data.json").read_text())]
    pubmed = json.loads((data / "pubmedqa" / "ori_pqal.json").read_text())
    gsm8k = (data / "gsm8k" / "test.jsonl").read_text().splitlines()
    return {
        "instruct, second half": instruct[len(instruct) // 2 :],
        "gsm8k answers": [json.loads(line)["answer"] for line in gsm8k],
        "pubmedqa long answers": [row["LONG_ANSWER"] for row in pubmed.values()],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=train.HERE.parent.parent.parent / "shared" / "data")
    parser.add_argument("--show", action="store_true", help="print what the reader got wrong")
    parser.add_argument("--speed", action="store_true", help="measure nothing but answers a second")
    options = parser.parse_args()
    if options.speed:
        speed([a.text for a in train.labelled(options.data / "xstest")])
        return
    judges = {name: load_judge(name) for name in ("reader", "refusal", "guard:organism:guard")}
    answers = train.labelled(options.data / "xstest")
    taught = [a for a in answers if a.source in train.MODELS]
    data = train.Data(taught + train.unlabelled(options.data) + train.wordings())
    unseen = dict(zip(taught, train.cross_validate(data, train.SETTINGS), strict=False))
    texts = [a.text for a in answers]
    labels = np.array([a.label for a in answers])
    said = {
        name: np.array([j.verdict for j in judge.judge(texts, texts)], dtype=object) for name, judge in judges.items()
    }
    said["reader"] = np.array(
        [unseen.get(a, found) for a, found in zip(answers, said["reader"], strict=True)], dtype=object
    )
    models = np.array([a.source for a in answers])
    for name in judges:
        for model in [*dict.fromkeys(models.tolist()), "all"]:
            rows = (models == model) | (model == "all")
            train.show(f"{name}: {model}", labels[rows], said[name][rows])
    for a, b in combinations(judges, 2):
        print(f"kappa of {a} and {b}: {cohens_kappa(said[a].tolist(), said[b].tolist())}")
    if options.show:
        for answer, found in zip(answers, said["reader"], strict=True):
            if answer.label != train.PARTIAL and (found == "safe") != (answer.label == train.REFUSAL):
                print(f"  {answer.source}, labelled {answer.label}, said {found}: {answer.text[:150]!r}")

    print("\nlabelled by reading (refusal_labels.json; none of them taught the reader)")
    outputs = json.loads((options.data / "circuit_breakers" / "circuit_breakers_train.json").read_text())
    by_digest = {blake2b(row["output"].encode(), digest_size=16).hexdigest(): row["output"] for row in outputs}
    for sample, marked in json.loads((train.HERE.parent / "refusal_labels.json").read_text()).items():
        keys = [key for key, label in marked.items() if label is not None and key in by_digest]
        own = np.array([train.REFUSAL if marked[key] else train.COMPLIANCE for key in keys])
        for name in ("reader", "refusal"):
            found = judges[name].judge(keys, [by_digest[key] for key in keys])
            train.show(f"{name}: {sample}", own, np.array([j.verdict for j in found], dtype=object))

    print("\nfalse alarms on answers to harmless requests")
    harmless = texts_of(options.data)
    for kind, some in harmless.items():
        for name in ("reader", "refusal"):
            found = judges[name].judge(some, some)
            alarms = sum(j.verdict in ("safe", "partial") for j in found)
            print(f"{name}: {kind:24} {proportion(alarms, len(some))}")

    print("\nincoherent, of the same answers and of those of 30 words or more in a random order")
    draw = random.Random(0)
    for kind, some in {**{m: [a.text for a in answers if a.source == m] for m in train.MODELS}, **harmless}.items():
        shuffled = [" ".join(draw.sample(words, len(words))) for text in some if len(words := text.split()) >= 30]
        alarms, found = (sum(incoherence(text) is not None for text in part) for part in (some, shuffled))
        print(f"{kind:24} real {proportion(alarms, len(some))}  shuffled {proportion(found, len(shuffled))}")
    speed(texts)


def speed(texts):
    print("\nanswers a second of one core (CPU time, best of three)")
    taken = {}
    for name in ("reader", "refusal"):
        judge = load_judge(name)
        coherent = [text for text in texts if incoherence(text) is None]
        for what, call in (("", judge._judge), (" and its check for incoherence", judge.judge)):
            best = float("inf")
            for _ in range(3):
                split.cache_clear()
                start = time.process_time()
                call(coherent, coherent)
                best = min(best, time.process_time() - start)
            taken[name + what] = best / len(coherent)
    for name, seconds in taken.items():
        print(f"{name:44} {1 / seconds:8,.0f}   {seconds / taken['refusal']:.2f} x the refusal matcher's time")


if __name__ == "__main__":
    main()
