"""Which vocabulary transfer predicts the guard better? Measured by substituting tokens for real.

For answers of a target and every position t, the m likeliest tokens v are put in place of y_t, the new
text is given to the guard, and the true change of its log-odds is compared with the predicted one,
G_t[v] - G_t[y_t]. Two figures per variant, both Spearman's rank correlation:

  tokens    predicted against true change, over all substitutions (mean over answers, bootstrap interval)
  weights   the gradient on the target's weights with G as predicted, against the gradient with the true
            changes in its place: does the ranking of *weights* come out right? (mean over answers)

    python benchmarks/transfer.py [--target organism:dense-unaligned] [--num 24] [--tokens 6]
"""

import argparse

import numpy as np
import torch
from scipy import stats

import safelocus as sl
from safelocus.model.forcing import teacher_force
from safelocus.model.generation import generate
from safelocus.objective.spelling import join
from safelocus.scoring.gradients import named_weights


def substitutions(target, judge, transfer, prompt, response, logits, num_tokens):
    """(positions [n], tokens [n], true change [n]) of the guard's score."""
    likeliest = logits.topk(num_tokens, dim=1).indices.tolist()
    pairs = [(t, v) for t, row in enumerate(likeliest) for v in row if v != response.ids[t] and transfer.spelled[v]]
    texts = []
    for t, v in pairs:
        ids = [*response.ids[:t], v, *response.ids[t + 1 :]]
        texts.append(join([transfer.spelled[i] for i in ids])[0].strip())
    base_text = transfer.response_text(response.ids)[0]
    scores = torch.cat(
        [judge.read([prompt] * len(part), part).score for part in (texts[i : i + 64] for i in range(0, len(texts), 64))]
    )
    base = judge.read([prompt], [base_text]).score
    return [t for t, _ in pairs], [v for _, v in pairs], scores - base


def correlation(first, second):
    return float(stats.spearmanr(first, second).statistic)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="organism:dense-unaligned")
    parser.add_argument("--guard", default="organism:guard")
    parser.add_argument("--prompts", default="organism:harmful")
    parser.add_argument("--num", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=6)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    options = parser.parse_args()

    target = sl.load(options.target, dtype="float32")
    prompts = sl.read_prompts(options.prompts).limit(options.num, seed=0).texts
    weights = list(named_weights(target.model, target.layout.eligible_tensors).values())
    judges = {v: sl.Guard.load(options.guard, variant=v, dtype="float32") for v in ("character", "index")}
    found = {variant: {"tokens": [], "weights": []} for variant in judges}
    num_substitutions = 0
    for prompt in prompts:
        (response,) = generate(target, [prompt], max_new_tokens=options.max_new_tokens)
        if len(response.ids) < 3:
            continue
        forced = teacher_force(target, [target.chat.encode_prompt(prompt)], [list(response.ids)])
        logits = forced.logits
        judge = judges["character"]
        places, tokens, true = substitutions(
            target, judge, judge.transfer_for(target), prompt, response, logits.detach(), options.tokens
        )
        num_substitutions += len(places)
        relaxed = torch.softmax(logits / judge.tau, -1)[places, tokens]
        reference = torch.autograd.grad((true * relaxed).sum(), weights, retain_graph=True)
        reference = torch.cat([g.flatten() for g in reference]).numpy()
        for variant, judge in judges.items():
            transfer = judge.transfer_for(target)
            text, spans = transfer.response_text(response.ids)
            gain = transfer.gain(transfer.align(judge.read([prompt], [text]), [spans]))
            predicted = gain[places, tokens] - gain[places, [response.ids[t] for t in places]]
            found[variant]["tokens"].append(correlation(predicted, true))
            gradient = torch.autograd.grad((predicted * relaxed).sum(), weights, retain_graph=True)
            gradient = torch.cat([g.flatten() for g in gradient]).numpy()
            found[variant]["weights"].append(correlation(gradient, reference))
    count = len(found["character"]["tokens"])
    print(f"{options.target}, {options.guard}: {count} answers, {num_substitutions} substitutions")
    print(f"{'variant':12}{'tokens':>28}{'weights':>28}")
    for variant, figures in found.items():
        cells = []
        for values in (figures["tokens"], figures["weights"]):
            interval = stats.bootstrap((np.array(values),), np.mean, rng=0).confidence_interval
            cells.append(f"{np.mean(values):+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]")
        print(f"{variant:12}{cells[0]:>28}{cells[1]:>28}")


if __name__ == "__main__":
    main()
