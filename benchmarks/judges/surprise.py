"""Does an original's surprise at an answer tell incoherent ones that the cheap statistics miss?

    python benchmarks/judges/surprise.py [--data ../shared/data] [--original smollm2]

Nats per token of an answer under the model that a disturbed one was made of, given the prompt, teacher-forced.
Answers are cut to 64 tokens; those of fewer than 12 are not judged. The threshold is the lowest at which at most 1 % of
the real answers of each kind lie above it, rounded up to a tenth: of XSTest's (two models') to half of its prompts, and
of half of what is there of other kinds, of which medical conclusions surprise a small model most. On the other halves
it is measured: real answers, their words in a random order, loops with variations, and answers that go on in another
European language after a third.
"""

import argparse
import csv
import json
import math
import random
import re
from pathlib import Path

import numpy as np

import safelocus as sl
from safelocus.evaluation.incoherence import incoherence
from safelocus.evaluation.measures import proportion
from safelocus.evaluation.perplexity import nats_per_token
from safelocus.prompts import Example, read_prompts

ROOT = Path(__file__).resolve().parents[2]
NUM_TOKENS, FEW, ALLOWED = 64, 12, 0.01
LANGUAGES = {
    "German": "Das Wetter wird am Wochenende wieder etwas freundlicher. Der Zug nach Hamburg hat leider zwanzig "
    "Minuten Verspätung. Meine Schwester arbeitet seit drei Jahren in einer kleinen Bäckerei. Bitte vergessen Sie "
    "nicht, das Fenster zu schließen, bevor Sie gehen. Im Herbst sammeln die Kinder bunte Blätter und Kastanien. Wir "
    "haben gestern Abend noch lange über das Buch gesprochen.",
    "French": "La bibliothèque du quartier ouvre ses portes à neuf heures du matin. Mon voisin cultive des tomates et "
    "des haricots dans son petit jardin. Il faut ajouter un peu de sel avant de servir la soupe. Les enfants ont joué "
    "toute la journée au bord de la rivière. Nous avons pris le train de nuit pour arriver plus tôt. Elle cherche "
    "encore les clés qu'elle a perdues la semaine dernière.",
    "Spanish": "El mercado del pueblo se llena de gente los sábados por la mañana. Mi abuelo siempre contaba historias "
    "antes de dormir. Para preparar la masa se necesitan harina, agua y un poco de aceite. La película que vimos ayer "
    "duró casi tres horas. Los estudiantes esperan los resultados del examen con paciencia. Hace mucho viento y las "
    "hojas vuelan por toda la calle.",
}


def completions(data):
    """(prompt's number, Example, label) of every labelled answer."""
    files = sorted((data / "xstest").glob("completions_*.csv"))
    rows = [row for file in files for row in csv.DictReader(file.open(encoding="utf-8", newline=""))]
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(row["prompt"] for row in rows))}
    return [
        (numbers[row["prompt"]], Example(prompt=row["prompt"], response=row["completion"]), row["final_label"])
        for row in rows
    ]


def others(data):
    """Question and answer of other kinds, by name."""
    instruct = json.loads((data / "instruct" / "instruction-data.json").read_text())
    gsm8k = map(json.loads, (data / "gsm8k" / "test.jsonl").read_text().splitlines())
    pubmed = json.loads((data / "pubmedqa" / "ori_pqal.json").read_text()).values()
    pairs = {
        "instruct": [(f"{row['instruction']}\n{row['input']}".strip(), row["output"]) for row in instruct],
        "GSM8K": [(row["question"], row["answer"]) for row in gsm8k],
        "PubMed conclusions": [(row["QUESTION"], row["LONG_ANSWER"]) for row in pubmed],
    }
    return {name: [Example(prompt=p, response=r) for p, r in some] for name, some in pairs.items()}


def cut(target, examples):
    """Answers of at most so many tokens."""
    tokenizer = target.tokenizer
    ids = [tokenizer(e.response, add_special_tokens=False)["input_ids"][:NUM_TOKENS] for e in examples]
    return [Example(prompt=e.prompt, response=tokenizer.decode(i)) for e, i in zip(examples, ids, strict=True)]


def shuffled(text, draw):
    words = text.split()
    return " ".join(draw.sample(words, len(words)))


def looped(text, draw):
    """Its first sentence over and over, with another of its words in each turn replaced by one of the text."""
    words = text.split()
    sentence = (re.match(r".{30,150}?[.!?](?=\s)", text, re.DOTALL) or re.match(r".{1,80}", text, re.DOTALL))[0].split()
    turns = []
    while sum(map(len, turns)) < 60:
        turn = list(sentence)
        turn[draw.randrange(len(turn))] = draw.choice(words)
        turns.append(turn)
    return " ".join(word for turn in turns for word in turn)


def drifted(text, draw):
    """Its first third, and then sentences of another language, from the middle of one on."""
    words = text.split()
    sentences = draw.choice(list(LANGUAGES.values())).split(". ")
    draw.shuffle(sentences)
    return " ".join([*words[: max(5, min(len(words), 45) // 3)], *" ".join(sentences).split()[3:40]])


def subjects(target, data, seed=0):
    """(choice, held out), each name -> examples."""
    draw = random.Random(seed)
    labelled = completions(data)
    sides = [[entry for entry in labelled if entry[0] % 2 == side] for side in (1, 0)]
    choice = {"XSTest": cut(target, [example for _, example, _ in draw.sample(sides[0], 200)])}
    drawn = draw.sample(sides[1], 130)
    held_out = {
        f"XSTest, {name}": cut(target, [example for _, example, label in drawn if label == key])
        for name, key in (("answered", "1_full_compliance"), ("refused", "2_full_refusal"))
    }
    long = [example for some in held_out.values() for example in some if len(example.response.split()) >= 12]

    def changed(some, change):
        return cut(target, [Example(prompt=e.prompt, response=change(e.response, draw)) for e in some])

    held_out |= {"XSTest, shuffled": changed(long, shuffled)}
    held_out |= {"XSTest, looped": changed(long[::2], looped), "XSTest, drifted": changed(long[::2], drifted)}
    for name, some in others(data).items():
        some = cut(target, draw.sample(some, 90))
        choice[name], held_out[name] = some[:45], some[45:]
        held_out[f"{name}, shuffled"] = changed([e for e in some[45:] if len(e.response.split()) >= 8], shuffled)
    return choice, held_out


def measured(target, some):
    """Nats per token (0 where there are too few tokens), and whether the cheap statistics call it incoherent."""
    found = nats_per_token(target, read_prompts(some, keep_duplicates=True), batch_size=16, progress=False)
    nats = [value if num >= FEW else 0.0 for value, num in found]
    return np.array(nats), np.array([incoherence(example.response) is not None for example in some])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--original", default="smollm2")
    options = parser.parse_args()
    target = sl.load(options.original)
    choice, held_out = subjects(target, options.data)
    threshold = 0.0
    for name, some in choice.items():
        nats, _ = measured(target, some)
        needed = np.sort(nats)[::-1][int(ALLOWED * len(nats))]
        print(f"{name:28} n={len(nats):<4} at most 1 % above {needed:.2f}", flush=True)
        threshold = max(threshold, math.ceil(needed * 10) / 10)
    print(f"threshold: {threshold:.1f} nats per token")
    for name, some in held_out.items():
        nats, cheap = measured(target, some)
        above, num = nats > threshold, len(nats)
        low, middle, high = np.quantile(nats[nats > 0], (0.05, 0.5, 0.95))
        print(
            f"{name:28} n={num:<4} nats {low:.2f} {middle:.2f} {high:.2f}  cheap {proportion(int(cheap.sum()), num)}  "
            f"surprise {proportion(int(above.sum()), num)}  either {proportion(int((above | cheap).sum()), num)}",
            flush=True,
        )


if __name__ == "__main__":
    main()
