"""The sets of the real model's tables: what is measured with was never found, trained or chosen with."""

import importlib
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "benchmarks" / "real"


@pytest.fixture(scope="module")
def scripts():
    sys.path.insert(0, str(SCRIPTS))
    try:
        sets, preserving = (importlib.import_module(name) for name in ("sets", "preserving"))
    finally:
        sys.path.remove(str(SCRIPTS))
    if missing := [file for file in sets.FILES.values() if not (sets.DATA / file).is_file()]:
        pytest.skip(f"the data sets are not beside the repository: {missing[0]}")
    return sets, preserving


def _hashes(parts):
    return {value for part in parts for value in part.prompt_hashes}


@pytest.mark.slow
def test_parts_are_disjoint(scripts):
    sets, preserving = scripts
    measured = [*sets.harmful(), *sets.harmless(), sets.texts()]
    trained = [sets.find(), sets.refusals(), sets.benign(), sets.refused(), *sets.answered()]
    trained += [preserving.lesson(task)[0] for task, *_ in preserving.PLAN]
    assert not _hashes(measured) & _hashes(trained)
    assert not _hashes([sets.find()]) & _hashes([sets.refusals(), sets.refused()])
    choosing = [part for parts in sets.validation().values() for part in parts]
    chosen_from = [sets.refusals(), sets.refused(), *sets.answered(whole=False)]
    assert not _hashes(choosing) & _hashes([*measured, sets.find(), *chosen_from])
    for task, *_ in preserving.PLAN:
        data, held_out = preserving.lesson(task)
        assert not _hashes([data]) & _hashes([held_out])


def test_sizes_are_those_that_the_pages_name(scripts):
    sets, *_ = scripts
    assert [len(part) for part in sets.harmful()] == [78, 200, 200]
    assert [len(part) for part in sets.harmless()] == [250, 200]
    assert len(sets.find()) == 128
    homonyms = sets.read("xstest", label="safe", type="homonyms").texts
    assert [
        t for t, kind in zip(sets.harmless()[0].texts, sets.alarms(), strict=True) if kind == "homonyms"
    ] == homonyms
