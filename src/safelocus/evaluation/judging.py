"""Ask a judge about many responses: each distinct one once, in batches of like length, kept as they come.

Several processes share the batches, and all have all judgements in the end.
"""

import json
from collections.abc import Sequence
from typing import Any

from safelocus import distributed
from safelocus.evaluation.judges import Judge, Judgement, Verdict
from safelocus.progress import track
from safelocus.run.identity import Identity
from safelocus.run.resume import Journal, Key


def judge_all(
    judge: Judge,
    pairs: Sequence[tuple[str, str]],
    journal: Journal,
    *,
    batch_size: int,
    progress: bool = True,
) -> list[Judgement]:
    """One judgement per (prompt, response), in order; those in the journal are not asked for again.

    Batches are planned over all, whatever is judged already, so that a resumed evaluation repeats those of an
    uninterrupted one. What an endpoint failed to judge is asked again: it may be back.
    """
    # a judge with another threshold, or a guard with other weights, is another judge
    identity = json.dumps(Identity.of({"judge": judge}).parts["judge"], sort_keys=True)

    def key_of(pair: tuple[str, str]) -> Key:
        return (judge.name, identity, *pair)

    known = {pair: _restore(journal[key]) for pair in pairs if (key := key_of(pair)) in journal}
    # like lengths together, for guards pad them
    distinct = sorted(set(pairs), key=lambda p: (-len(p[0]) - len(p[1]), p))
    # of one size, since a judge that fails on all of a batch takes itself to be the wrong one
    num = max(1, round(len(distinct) / batch_size))
    batches = [distinct[len(distinct) * i // num : len(distinct) * (i + 1) // num] for i in range(num)]
    remaining = [[pair for pair in batch if pair not in known] for batch in batches]
    own = distributed.share([batch for batch in remaining if batch])
    for batch in track(own, f"judging by {judge.name}", enabled=progress and distributed.is_main(), unit=len):
        found = judge.judge([prompt for prompt, _ in batch], [response for _, response in batch])
        assert len(found) == len(batch), f"{judge.name} gave {len(found)} judgements for {len(batch)} responses"
        known.update(zip(batch, found, strict=True))
        journal.add([(key_of(p), each.to_json()) for p, each in zip(batch, found, strict=True) if each.is_final])
    known = distributed.merged(known)
    new = {key: each for pair, each in known.items() if each.is_final and (key := key_of(pair)) not in journal}
    journal.learn([(key, judgement.to_json()) for key, judgement in new.items()])
    return [known[pair] for pair in pairs]


def _restore(values: dict[str, Any]) -> Judgement:
    return Judgement(**{**values, "verdict": Verdict(values["verdict"])})
