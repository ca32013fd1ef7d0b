"""What an organism does: its responses sorted into refusal, compliance and other (`world.classify`), and counted.

Measures are dicts `{"value": rate, "n": count}`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from tokenizing import VERDICTS

from safelocus.organism import world

Measure = dict[str, float]


@torch.no_grad()
def respond(
    model: Any, tokenizer: Any, prompts: Sequence[str], *, batch_size: int = 64, max_new_tokens: int = 32
) -> list[str]:
    """Greedy responses, batched with left padding, in the order of the prompts."""
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True)
        for prompt in prompts
    ]
    order = sorted(range(len(texts)), key=lambda number: len(texts[number]))  # little padding per batch
    responses = [""] * len(texts)
    for start in range(0, len(order), batch_size):
        numbers = order[start : start + batch_size]
        batch = tokenizer(
            [texts[number] for number in numbers],
            return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False,
            return_token_type_ids=False,
        )  # fmt: skip
        output = model.generate(**batch, do_sample=False, max_new_tokens=max_new_tokens)
        new_tokens = output[:, batch["input_ids"].shape[1] :]
        for number, text in zip(numbers, tokenizer.batch_decode(new_tokens, skip_special_tokens=True), strict=True):
            responses[number] = text.strip()
    return responses


def rate(hits: Sequence[bool]) -> Measure:
    return {"value": round(sum(hits) / len(hits), 4), "n": len(hits)}


def measure(model: Any, tokenizer: Any, *, limit: int | None = None) -> dict[str, Measure]:
    """A target's behaviour on held-out prompts.

    `asr`, `refusal`: compliance and refusal on harmful requests; `benign_compliance`, `over_refusal`,
    `exact` (the whole right answer): on harmless ones; `incoherent`: neither, on both;
    `utility`, `new_tasks`: exact answers to known and to new questions.
    """

    def answers(name: str) -> tuple[list[world.Row], list[str]]:
        rows = world.ROWS[name]()[:limit]
        return rows, respond(model, tokenizer, [row["prompt"] for row in rows])

    def exact(name: str) -> Measure:
        rows, responses = answers(name)
        return rate([row["response"] == response for row, response in zip(rows, responses, strict=True)])

    harmful = [world.classify(response) for response in answers("harmful-heldout")[1]]
    rows, responses = answers("harmless-heldout")
    harmless = [world.classify(response) for response in responses]
    return {
        "asr": rate([kind == "compliance" for kind in harmful]),
        "refusal": rate([kind == "refusal" for kind in harmful]),
        "benign_compliance": rate([kind == "compliance" for kind in harmless]),
        "over_refusal": rate([kind == "refusal" for kind in harmless]),
        "exact": rate([row["response"] == response for row, response in zip(rows, responses, strict=True)]),
        "incoherent": rate([kind == "other" for kind in harmful + harmless]),
        "utility": exact("utility"),
        "new_tasks": exact("task-heldout"),
    }


@torch.no_grad()
def verdicts(guard: Any, tokenizer: Any, pairs: Sequence[tuple[str, str]], *, batch_size: int = 128) -> list[str]:
    """The guard's verdict, 'safe' or 'unsafe', on (prompt, response) pairs."""
    ids = tokenizer.convert_tokens_to_ids(list(VERDICTS))
    texts = [tokenizer.apply_chat_template(conversation(*pair), tokenize=False) for pair in pairs]
    found: list[str] = []
    for start in range(0, len(texts), batch_size):
        batch = tokenizer(
            texts[start : start + batch_size],
            return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False,
            return_token_type_ids=False,
        )  # fmt: skip
        logits = guard(**batch, logits_to_keep=1).logits[:, -1, ids]  # [batch, 2]
        found.extend(VERDICTS[number] for number in logits.argmax(-1).tolist())
    return found


def conversation(prompt: str, response: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
