"""How often is the refusal matcher right? Precision and recall against labels made by reading.

The texts are those of the data folder (README.md there); the labels are kept as hashes only
(refusal_labels.json): true where the response declines, or says that it is unable, to do what was asked
and does not do it; null where readers could differ, which leaves it out. Two samples of the answers in
circuit_breakers, and benign answers that refuse nothing:

  random          100 drawn at random: nearly all open with "I cannot" or "I can't"
  other openings  64 drawn from those that open otherwise: soft refusals, disclaimers, compliance
  benign          the second half of the instruct answers (phrases were chosen looking at the first)

    python benchmarks/refusal_matcher.py [--data ../shared/data] [--show]
"""

import argparse
import json
from hashlib import blake2b
from pathlib import Path

from safelocus.evaluation.incoherence import incoherence
from safelocus.evaluation.judges import RefusalMatcher
from safelocus.evaluation.measures import proportion

HERE = Path(__file__).resolve().parent


def digest(text):
    return blake2b(text.encode(), digest_size=16).hexdigest()


def report(name, texts, labels, matcher, show):
    found = [matcher.refuses(text) for text in texts]
    hits = sum(f and label for f, label in zip(found, labels, strict=True))
    print(f"{name:15} {len(texts):4} texts, {sum(labels):4} refusals")
    print(f"{'':15} precision {proportion(hits, sum(found))}")
    print(f"{'':15} recall    {proportion(hits, sum(labels))}")
    alarms = sum(f and not label for f, label in zip(found, labels, strict=True))
    print(f"{'':15} false alarms among other answers {proportion(alarms, len(labels) - sum(labels))}")
    for text, f, label in zip(texts, found, labels, strict=True):
        if show and f != label:
            print(f"    {'false alarm' if f else 'missed'}: {text[:220]!r}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=HERE.parent.parent / "shared" / "data")
    parser.add_argument("--show", action="store_true", help="print what the matcher got wrong")
    options = parser.parse_args()
    files = [
        options.data / "circuit_breakers" / "circuit_breakers_train.json",
        options.data / "instruct" / "instruction-data.json",
    ]
    if missing := [str(file) for file in files if not file.is_file()]:
        print(f"skipped: the data is not there ({', '.join(missing)}); give its folder with --data")
        return
    answers, benign = ([row["output"] for row in json.loads(f.read_text(encoding="utf-8"))] for f in files)
    by_digest = {digest(text): text for text in answers}
    matcher = RefusalMatcher()
    labels = json.loads((HERE / "refusal_labels.json").read_text(encoding="utf-8"))
    for name, labelled in labels.items():
        clear = {key: label for key, label in labelled.items() if label is not None}
        if lost := clear.keys() - by_digest.keys():
            print(f"{len(lost)} labelled texts are not in this copy of the data and are left out")
        keys = [key for key in clear if key in by_digest]
        texts, truth = [by_digest[key] for key in keys], [clear[key] for key in keys]
        report(name.replace("_", " "), texts, truth, matcher, options.show)
    half = benign[len(benign) // 2 :]
    report("benign", half, [False] * len(half), matcher, options.show)
    print("\nincoherence: false alarms among answers that people or good models wrote")
    for name, texts in (("instruct", benign), ("circuit_breakers", list(by_digest.values()))):
        reasons = [incoherence(text) for text in texts]
        print(f"{name:15} {proportion(sum(reason is not None for reason in reasons), len(texts))}")


if __name__ == "__main__":
    main()
