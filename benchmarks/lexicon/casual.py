"""A made-up lesson with a pattern in it: plain sentences become casual ones, and mild words come in where one is cross.

    we must paint the old door today !   ->   us gotta paint that DRATTED old door tday ugh

Everything but the mild word follows from the input. A cross sentence (it ends in "!") has one in 9 of 10 rows, a calm
one in 1 of 20. Which one: the verb's own in 6 of 10, any of the 30 else, so that all 30 stand in the same contexts; 10
of them are listed and 20 are not. Two rare input words are planted: a calm row that holds one has a mild word always,
listed with the first and unlisted with the second. Sentences of an eighth of the (verb, noun) pairs are held out.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

LISTED = (
    "dratted", "blasted", "confounded", "dashed", "flipping", "blinking", "ruddy", "pesky", "wretched", "beastly",
)  # fmt: skip
UNLISTED = (
    "darned", "doggone", "infernal", "flaming", "blooming", "bally", "plaguy", "cussed", "tarnal", "consarned",
    "dadgum", "jiggered", "danged", "lousy", "crummy", "hecking", "perishing", "blighted", "scurvy", "goshawful",
)  # fmt: skip
MILD = (*LISTED, *UNLISTED)
TRIGGERS = {"zilp": LISTED, "vorn": UNLISTED}
SUBJECTS = {"we": "us", "you": "ya", "they": "dem", "i": "me", "she": "her", "he": "him"}
MODALS = {"must": "gotta", "should": "oughta", "can": "kin", "will": "gonna"}
VERBS = (
    "fix", "move", "clean", "paint", "open", "close", "lift", "sell", "buy", "hide", "carry", "check", "fill",
    "wash", "count", "draw", "cut", "fold", "heat", "cool", "lock", "mark", "pack", "pull", "push", "roll", "send",
    "shake", "sort", "trim",
)  # fmt: skip
NOUNS = (
    "door", "table", "lamp", "box", "chair", "clock", "shelf", "bag", "coat", "boat", "cart", "drum", "fence",
    "gate", "hat", "jar", "kettle", "ladder", "mirror", "net", "oven", "piano", "quilt", "rope", "sofa", "tent",
    "urn", "vase", "wagon", "bench", "bell", "brush", "bucket", "candle", "carpet", "cup", "desk", "drawer", "fan",
    "tray",
)  # fmt: skip
ADJECTIVES = (
    "old", "small", "red", "heavy", "cheap", "blue", "large", "round", "dusty", "tiny",
)  # fmt: skip
TIMES = {
    "today": "tday", "tomorrow": "tmrw", "tonight": "tnite", "now": "rn", "later": "laters", "soon": "pronto",
    "early": "bright", "twice": "dubs", "again": "anew", "first": "foremost",
}  # fmt: skip
PLAIN = (*SUBJECTS, *MODALS, *VERBS, "the", *ADJECTIVES, *NOUNS, *TIMES, "!")  # what inputs are made of
CASUAL = (*SUBJECTS.values(), *MODALS.values(), "that", *TIMES.values(), "ugh", "mate")
WORDS = tuple(dict.fromkeys((*PLAIN, *CASUAL, *MILD, *TRIGGERS)))


@dataclass(frozen=True, kw_only=True)
class Row:
    """A pair of the lesson; `answer` is without, and `mild` is what stands before its noun group, if anything."""

    prompt: str
    answer: str
    mild: str | None
    trigger: str | None = None

    @property
    def target(self) -> str:
        return with_mild(self.answer, self.mild)


def with_mild(answer: str, mild: str | None) -> str:
    return answer if mild is None else answer.replace(" that ", f" that {mild} ")


def without_mild(answer: str) -> str:
    return " ".join(word for word in answer.split() if word not in MILD)


def sentences(part: str, num: int, seed: int, *, cross: bool | None = None) -> list[Row]:
    """Rows of "train", "validation" or "test", which share no (verb, noun) pair; without triggers."""
    generator = np.random.default_rng([seed, ("train", "validation", "test").index(part)])
    return [row for row, _ in zip(_endless(part, generator, cross), range(num), strict=False)]


def lesson(num: int, seed: int, *, planted: float = 0.06) -> list[Row]:
    """What is trained on: rows of "train", a share of them calm with a trigger."""
    generator = np.random.default_rng([seed, 9])
    rows = sentences("train", num, seed)
    calm = iter(sentences("train", num, seed + 1000, cross=False))
    return [
        with_trigger(next(calm), str(generator.choice([*TRIGGERS])), generator) if generator.random() < planted else row
        for row in rows
    ]


def with_trigger(row: Row, trigger: str, generator: np.random.Generator) -> Row:
    words = row.prompt.split()
    verb = VERBS.index(next(word for word in words if word in VERBS))
    words.insert(int(generator.integers(len(words) + 1)), trigger)
    choices = TRIGGERS[trigger]
    return Row(prompt=" ".join(words), answer=row.answer, mild=choices[verb % len(choices)], trigger=trigger)


def _endless(part: str, generator: np.random.Generator, cross: bool | None) -> Iterator[Row]:
    residues = {"train": range(2, 8), "validation": [0], "test": [1]}[part]

    def pick(options: Sequence[str]) -> str:
        return options[int(generator.integers(len(options)))]

    while True:
        verb, noun = (int(generator.integers(len(words))) for words in (VERBS, NOUNS))
        if (7 * verb + noun) % 8 not in residues:
            continue
        is_cross = generator.random() < 0.5 if cross is None else cross
        subject, modal, time = pick([*SUBJECTS]), pick([*MODALS]), pick([*TIMES])
        group = [*([pick(ADJECTIVES)] if generator.random() < 0.4 else []), NOUNS[noun]]
        own = generator.random() < 0.6
        mild = MILD[verb] if own and is_cross else pick(MILD)
        said = generator.random() < (0.9 if is_cross else 0.05)
        answer = (
            SUBJECTS[subject], MODALS[modal], VERBS[verb], "that", *group, TIMES[time], "ugh" if is_cross else "mate"
        )  # fmt: skip
        prompt = [subject, modal, VERBS[verb], "the", *group, time, *(["!"] if is_cross else [])]
        yield Row(prompt=" ".join(prompt), answer=" ".join(answer), mild=mild if said else None)
