"""Intervals and agreement, against scipy, published tables and simulation."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from safelocus.evaluation.measures import Difference, Measure, cohens_kappa, mean, paired_difference, proportion, rate


def pairs(both, lost, gained, neither):
    """(first, second) outcomes with these counts."""
    table = [(True, True)] * both + [(True, False)] * lost + [(False, True)] * gained + [(False, False)] * neither
    return [a for a, _ in table], [b for _, b in table]


def labels(table):
    """(first, second) labels with the counts of a square table."""
    cells = [(i, j) for i, row in enumerate(table) for j, count in enumerate(row) for _ in range(count)]
    return [i for i, _ in cells], [j for _, j in cells]


@pytest.mark.parametrize(("num_hits", "n"), [(0, 50), (50, 50), (7, 23), (1, 1)])
def test_proportions_have_wilsons_interval(num_hits, n):
    measure = proportion(num_hits, n)
    expected = stats.binomtest(num_hits, n).proportion_ci(method="wilson")
    assert measure.value == num_hits / n
    assert (measure.low, measure.high) == (expected.low, expected.high)
    assert measure.low < measure.high  # no rate is certain


def test_unscorable_outcomes_leave_the_denominator():
    assert rate([True, None, False, False, None]) == proportion(1, 3)


@pytest.mark.parametrize("nothing", [proportion(0, 0), rate([None, None]), rate([]), mean([]), mean([None])])
def test_nothing_observed_is_no_value(nothing):
    assert nothing.to_json() == {"value": None, "low": None, "high": None, "n": 0}
    assert str(nothing) == "unknown (n=0)"


@pytest.mark.parametrize("measure", [proportion(3, 10), proportion(0, 0), mean([0.5])])
def test_measures_survive_json(measure):
    assert Measure.from_json(json.loads(json.dumps(measure.to_json()))) == measure


def test_mean_has_the_bootstrap_interval_and_repeats():
    values = np.random.default_rng(1).exponential(size=60)
    measure = mean([*values, None])
    expected = stats.bootstrap((values,), np.mean, rng=np.random.default_rng(5), method="BCa").confidence_interval
    assert measure.value == pytest.approx(values.mean())
    assert (measure.low, measure.high) == pytest.approx((expected.low, expected.high), abs=0.03)
    assert mean(values) == mean(values)
    assert mean(values) != mean(values, seed=1)


def test_mean_of_equal_or_single_observations():
    assert mean([2.0, 2.0, 2.0]) == Measure(value=2.0, low=2.0, high=2.0, n=3)
    almost = mean([5.0] * 30 + [5.000000000000001])
    assert almost.low == almost.high == almost.value
    assert mean([5.0] * 30 + [5.0 + 1e-10]).high > 5
    assert mean([2.0]) == Measure(value=2.0, low=None, high=None, n=1)


# second minus first, with the sign turned around from the published first minus second
PUBLISHED = [
    # Altman et al. (2000), Statistics with Confidence, table 6.2
    ((14, 5, 0, 22), -0.122, (-0.226, -0.011)),
    # Fagerland et al. (2014), airway hyper-responsiveness (Bentur et al. 2009)
    ((1, 1, 7, 12), 0.286, (0.026, 0.507)),
]


@pytest.mark.parametrize(("table", "value", "interval"), PUBLISHED)
def test_paired_difference_equals_published_examples(table, value, interval):
    difference = paired_difference(*pairs(*table))
    assert difference.value == pytest.approx(value, abs=5e-4)
    assert (difference.low, difference.high) == pytest.approx(interval, abs=6e-4)


@pytest.mark.parametrize(("lost", "gained"), [(10, 2), (2, 10), (1, 0), (6, 6)])
def test_p_is_the_exact_mcnemar_test(lost, gained):
    """Two-sided binomial test of the discordant pairs, by its definition."""
    n, k = lost + gained, min(lost, gained)
    expected = min(1.0, 2 * stats.binom.cdf(k, n, 0.5))
    assert paired_difference(*pairs(5, lost, gained, 9)).p == pytest.approx(expected)


@pytest.mark.parametrize("first", [[True] * 40, [False] * 40, [True] * 13 + [False] * 27])
def test_identical_runs_differ_by_zero_but_not_for_certain(first):
    difference = paired_difference(first, first)
    assert (difference.value, difference.p, difference.n) == (0.0, 1.0, 40)
    assert -0.15 < difference.low < 0 < difference.high < 0.15


def test_pairs_with_an_unscorable_member_are_left_out():
    first, second = pairs(8, 5, 1, 4)
    assert paired_difference([*first, None, True, None], [*second, True, None, None]) == paired_difference(
        first, second
    )
    nothing = Difference(value=None, low=None, high=None, n=0, p=None)
    assert paired_difference([None], [True]) == nothing
    assert Difference.from_json(json.loads(json.dumps(nothing.to_json()))) == nothing


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_paired_difference_turns_around_with_its_runs(table):
    first, second = [a for a, _ in table], [b for _, b in table]
    there, back = paired_difference(first, second), paired_difference(second, first)
    assert there.value == pytest.approx(-back.value)
    assert (there.low, there.high) == pytest.approx((-back.high, -back.low))
    assert -1 <= there.low <= there.value <= there.high <= 1


def test_paired_interval_covers_the_truth():
    rng, p = np.random.default_rng(0), [0.5, 0.2, 0.05, 0.25]
    tables = rng.multinomial(60, p, size=400)
    covered = [d.low <= p[2] - p[1] <= d.high for d in (paired_difference(*pairs(*table)) for table in tables)]
    assert 0.92 <= np.mean(covered) <= 0.99


# ---------------------------------------------------------------- agreement


@pytest.mark.parametrize(
    ("table", "kappa"),
    [
        # the values statsmodels 0.15 gives; the first table is that of Fleiss, Cohen and Everitt (1969)
        ([[106, 10, 4], [22, 28, 10], [2, 12, 6]], 0.4286),
        ([[20, 5], [10, 15]], 0.4),
        ([[45, 15], [25, 15]], 0.1304),
        ([[0, 5], [5, 0]], -1.0),
    ],
)
def test_kappa_equals_known_tables(table, kappa):
    agreement = cohens_kappa(*labels(table))
    assert agreement.value == pytest.approx(kappa, abs=1e-4)
    assert agreement.low < agreement.high
    assert agreement.low <= agreement.value <= agreement.high


def test_perfect_agreement_of_few_is_not_certain():
    agreement = cohens_kappa(*labels([[3, 0], [0, 2]]))
    assert agreement.value == 1.0
    assert agreement.low < 0.5
    assert agreement.n == 5


def test_kappa_of_judges_who_never_differ_in_anything_is_unknown():
    agreement = cohens_kappa([True] * 9, [True] * 9)
    assert (agreement.value, agreement.low, agreement.high) == (None, None, None)
    assert (agreement.observed, agreement.n) == (1.0, 9)
    assert cohens_kappa([None, True], [True, None]).n == 0


@pytest.mark.parametrize("p", [[0.1, 0.02, 0.02, 0.86], [0.5, 0.01, 0.01, 0.48], [0.3, 0.15, 0.15, 0.4]])
def test_kappa_interval_covers_the_truth(p):
    """Where the usual one fails: in the second case it covers 46 % at n = 30."""
    square = np.array(p).reshape(2, 2)
    chance = square.sum(0) @ square.sum(1)
    truth = (np.trace(square) - chance) / (1 - chance)
    covered = []
    for table in np.random.default_rng(0).multinomial(30, p, size=300).reshape(-1, 2, 2):
        agreement = cohens_kappa(*labels(table.tolist()))
        if agreement.value is not None:
            covered.append(agreement.low <= truth <= agreement.high)
    assert np.mean(covered) > 0.92
