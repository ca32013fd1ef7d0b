"""Does the interval of Cohen's kappa hold what it promises? Coverage by simulation, ours against the usual one.

Tables of two judges are drawn from known joint probabilities; printed is the share of 95 % intervals that
hold the true kappa: ours (evaluation/measures.py) and that of Fleiss, Cohen and Everitt (1969), which
most packages give. Samples in which kappa is undefined are left out.

    python benchmarks/kappa_interval.py [--num 1500]
"""

import argparse

import numpy as np

from safelocus.evaluation.measures import cohens_kappa

JOINT = [(0.45, 0.05, 0.05, 0.45), (0.1, 0.02, 0.02, 0.86), (0.05, 0.01, 0.04, 0.9), (0.3, 0.15, 0.15, 0.4),
         (0.5, 0.01, 0.01, 0.48)]  # fmt: skip
CELLS = [(0, 0), (0, 1), (1, 0), (1, 1)]


def kappa_of(shares):
    rows, columns = shares.sum(1), shares.sum(0)
    chance = rows @ columns
    return (np.trace(shares) - chance) / (1 - chance), rows, columns, chance


def usual_interval(counts):
    n = counts.sum()
    shares = counts / n
    kappa, rows, columns, chance = kappa_of(shares)
    a = sum(shares[i, i] * (1 - (rows[i] + columns[i]) * (1 - kappa)) ** 2 for i in (0, 1))
    b = (1 - kappa) ** 2 * sum(shares[i, j] * (columns[i] + rows[j]) ** 2 for i, j in ((0, 1), (1, 0)))
    c = (kappa - chance * (1 - kappa)) ** 2
    half = 1.96 * np.sqrt(max(a + b - c, 0) / n) / (1 - chance)
    return kappa - half, kappa + half


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, default=1500)
    num = parser.parse_args().num
    rng = np.random.default_rng(0)
    print("   n  kappa   ours  usual")
    for n in (30, 100):
        for joint in JOINT:
            truth = kappa_of(np.array(joint).reshape(2, 2))[0]
            ours, usual = [], []
            for counts in rng.multinomial(n, joint, size=num):
                labels = [cell for cell, count in zip(CELLS, counts, strict=True) for _ in range(count)]
                agreement = cohens_kappa([a for a, _ in labels], [b for _, b in labels])
                if agreement.value is None:
                    continue
                ours.append(agreement.low <= truth <= agreement.high)
                low, high = usual_interval(counts.reshape(2, 2))
                usual.append(low <= truth <= high)
            print(f"{n:4} {truth:6.2f} {np.mean(ours):6.3f} {np.mean(usual):6.3f}")


if __name__ == "__main__":
    main()
