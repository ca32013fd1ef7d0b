"""Utility suites of EleutherAI's lm-evaluation-harness, run by that library on the loaded target.

Optional: `pip install 'safelocus[lm-eval]'`. Every document becomes a row like those of our own tasks, so
suites take part in the measures, the intervals and the paired comparison.
"""

from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from safelocus import distributed
from safelocus.errors import SafelocusError
from safelocus.evaluation.result import UTILITY, Row
from safelocus.model.generation import as_used, read_response
from safelocus.model.target import Target
from safelocus.model.thought import UNFINISHED

_METRICS = ("acc", "exact_match", "em", "mc1")  # those that say right or wrong of one document
_IN_THOUGHT = f"({UNFINISHED})"  # stands for an answer, and is no task's


def check_suites(names: Sequence[str]) -> None:
    """Raise SafelocusError where the library is not installed or knows no such task, and in several processes."""
    if not names:
        return
    if distributed.world_size() > 1:
        raise SafelocusError(f"lm-eval ({names[0]}) runs in one process; start it without torchrun")
    _find(names)


def run_suites(
    target: Target, names: Sequence[str], *, batch_size: int = 8, seed: int = 0
) -> tuple[list[Row], list[dict[str, Any]]]:
    """Rows (set "utility", source "lm-eval:TASK") of every document of these lm-eval tasks; and what each task was.

    Args:
        names: as `lm_eval --tasks` takes them, e.g. "arc_easy"; "arc_easy:100" for its first 100 documents.

    Raises:
        SafelocusError: the library is not installed, knows no such task, or the task has no accuracy.
    """
    lm_eval, models, manager, limits = _find(names)
    model = _talking_as(target, models.HFLM)(pretrained=target.model, tokenizer=target.tokenizer, batch_size=batch_size)
    rows: list[Row] = []
    described = []
    for name, limit in limits.items():
        with as_used(target.model):
            found = lm_eval.simple_evaluate(
                model=model, tasks=[name], limit=limit, log_samples=True, bootstrap_iters=0, task_manager=manager,
                apply_chat_template=target.chat.kind == "chat", system_instruction=target.chat.system or None,
                random_seed=seed, numpy_random_seed=seed, torch_random_seed=seed,
            )  # fmt: skip
        for task, samples in found["samples"].items():
            metric, counted = _counted(task, samples)
            rows += [_row(task, sample, metric) for sample in counted]
            described.append(
                {
                    "name": task, "limit": limit, "metric": metric, "filter": counted[0].get("filter"),
                    "version": found.get("versions", {}).get(task), "few_shot": found.get("n-shot", {}).get(task),
                    "lm_eval": _version(),
                }
            )  # fmt: skip
    return rows, described


def _find(names: Sequence[str]) -> tuple[Any, Any, Any, Mapping[str, int | None]]:
    """(the library, its models, its tasks; the tasks asked for, and how many documents of each)."""
    limits = dict(map(_parse, names))
    try:
        lm_eval, models, registry = map(import_module, ("lm_eval", "lm_eval.models.huggingface", "lm_eval.tasks"))
    except ImportError as error:
        raise SafelocusError(
            f"lm-eval tasks need the library lm-eval ({error}); install it with `pip install 'safelocus[lm-eval]'`"
        ) from error
    manager = registry.TaskManager()
    if unknown := sorted(set(limits) - set(manager.all_tasks)):
        raise SafelocusError(f"lm-eval has no task {', '.join(map(repr, unknown))}; `lm_eval --tasks list` shows all")
    return lm_eval, models, manager, limits


def _version() -> str | None:
    try:
        return version("lm_eval")
    except PackageNotFoundError:  # on the path without its metadata
        return None


def _talking_as(target: Target, library: Any) -> Any:
    """The library's kind of model, with the target's chat options, and with answers in place of thoughts."""
    chat = target.chat

    class Talking(library):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.chat_template_args = dict(chat.template_kwargs)

        def apply_chat_template(self, chat_history: Any, add_generation_prompt: bool = True) -> str:
            if chat_history[0]["role"] == "system" and not chat.system_role:  # as `ChatFormat.render`
                first, asked, *rest = chat_history
                chat_history = [{**asked, "content": f"{first['content']}\n\n{asked['content']}"}, *rest]
            history = chat.chat_template.shaped(chat_history)
            text: str = super().apply_chat_template(history, add_generation_prompt)
            if not add_generation_prompt:
                return text
            # as `ChatFormat.render`: white space of the answer's first token is not the prompt's
            return text + chat.opening if chat.closing else (text + chat.opening).removesuffix(chat.response_prefix)

        def _encode_pair(self, context: str, continuation: str) -> Any:
            """Of an answer that is given, which stands outside of a thought."""
            return super()._encode_pair(context + (chat.closing if chat.kind == "chat" else ""), continuation)

        def tok_decode(self, tokens: Any, skip_special_tokens: bool = True) -> str:
            if isinstance(tokens, int) or not skip_special_tokens:
                return str(super().tok_decode(tokens, skip_special_tokens=skip_special_tokens))
            response = read_response(target, list(tokens))
            if response.thought is None:
                return str(super().tok_decode(tokens))  # with its white space
            return _IN_THOUGHT if response.in_thought else response.text

    return Talking


def _parse(name: str) -> tuple[str, int | None]:
    task, separator, limit = name.partition(":")
    if separator and not (limit.isdigit() and int(limit)):
        raise SafelocusError(f"lm-eval task {name!r}: expected NAME or NAME:COUNT")
    return task, int(limit) if separator else None


def _counted(name: str, samples: Sequence[dict[str, Any]]) -> tuple[str, list[dict[str, Any]]]:
    """The metric that says right or wrong of each document, and the documents as one filter reads them."""
    first = samples[0].get("filter")  # a task may read its responses in several ways
    kept = [sample for sample in samples if sample.get("filter") == first]
    for metric in _METRICS:
        if all(sample.get(metric) in (0, 1) for sample in kept):  # a share or a probability is neither right nor wrong
            return metric, kept
    raise SafelocusError(f"lm-eval task {name!r} says right or wrong of no document; it cannot count as utility")


def _row(name: str, sample: dict[str, Any], metric: str) -> Row:
    said: str | None = str(sample["filtered_resps"])
    row = {
        "set": UTILITY, "source": f"lm-eval:{name}", "prompt": f"{name} {sample['doc_id']}", "system": None,
        "category": None, "response": said, "finished": True, "failure": None, "answer": str(sample["target"]),
        "extracted": said, "correct": bool(sample[metric]),
    }  # fmt: skip
    if _IN_THOUGHT not in str(sample.get("resps")):
        return row
    nothing = dict.fromkeys(("response", "extracted", "correct"))
    return row | nothing | {"finished": False, "failure": UNFINISHED, "thought": ""}
