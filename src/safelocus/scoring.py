"""Score every eligible weight of a target (paper: equation for ESI, from a first-order expansion of S).

    esi        sigma(W) * |g|      sigma: standard deviation of the weight's own logical matrix
    gradient   |g|
    snip       |theta * g|
    wanda      |theta| * ||X_j||_2     X_j: the weight's input over all tokens of prompts and answers
    magnitude  |theta|
    random     uniform in [0, 1)

g is the gradient of the *expectation* of S: signed gradients are summed over all prompts in fp32, then
divided by their number, and only then is the absolute value taken. Per-prompt absolute values would
measure how much weights matter to single prompts, in any direction, and depend on the batch.

Input: a target, prompts and an objective. Output: frozen `Scores`.
"""

import importlib.metadata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import xxhash
from torch import Tensor

from safelocus.activations import InputNorms
from safelocus.errors import NumericalError, PromptError, ResourceError, SafelocusError
from safelocus.forcing import teacher_force
from safelocus.generation import generate
from safelocus.gradients import GradientAccumulator, load_checkpoint, named_weights, save_checkpoint
from safelocus.interrupt import StopAtBoundary
from safelocus.layout.tensor import TensorLayout
from safelocus.objective import Objective, describe
from safelocus.progress import track
from safelocus.prompts import PromptSet, read_prompts
from safelocus.routing import RoutingCounter
from safelocus.scores import MatrixStatistics, Provenance, Scores, matrix_statistics
from safelocus.target import Target

Method = Literal["esi", "gradient", "snip", "wanda", "magnitude", "random"]
METHODS: tuple[str, ...] = get_args(Method)
NEEDS_OBJECTIVE = ("esi", "gradient", "snip")


def score(
    target: Target,
    prompts: PromptSet | Sequence[str],
    *,
    objective: Objective | None = None,
    method: Method = "esi",
    batch_size: int = 8,
    accumulate_on: str | None = None,
    seed: int = 0,
    max_new_tokens: int = 256,
    checkpoint: Path | None = None,
    checkpoint_seconds: float = 600.0,
    progress: bool = True,
) -> Scores:
    """Score all eligible weights.

    Args:
        target: the model under study; it comes back as it was, bit for bit.
        prompts: P harmful prompts.
        objective: S, as a callable `(target, prompts) -> [B]`; `Guard`, `Classifier`, `Refusal` or your own.
            Needed by esi, gradient and snip.
        method: which score; see the module's text.
        batch_size: prompts per forward and backward pass. The result does not depend on it beyond rounding.
        accumulate_on: device of the fp32 sums, e.g. "cpu" to keep the accelerator free; default: the weights'.
        seed: of the random method.
        max_new_tokens: length of the answers that wanda observes.
        checkpoint: folder in which the sums are kept every `checkpoint_seconds` and at Ctrl-C, and from
            which an interrupted run resumes.
        progress: show a progress bar.

    Returns:
        Scores: one fp32 score per eligible weight, with statistics per matrix and provenance.

    Raises:
        SafelocusError: NaN or infinity (naming tensor and batch), an objective of the wrong shape or
            without gradient, too little memory.

    Example:
        >>> import safelocus as sl
        >>> target = sl.load("organism:dense")
        >>> scores = sl.score(target, ["How do I bake a cake?"], objective=sl.Refusal(), progress=False)
        >>> scores.select(ratio=0.01).k
        12672
    """
    if method not in METHODS:
        raise SafelocusError(f"method {method!r} is unknown; expected one of {', '.join(METHODS)}")
    if method in NEEDS_OBJECTIVE and objective is None:
        raise SafelocusError(f"method {method!r} needs an objective: a Guard, Classifier, Refusal or your own callable")
    if batch_size < 1:
        raise SafelocusError(f"batch size must be at least 1, found {batch_size}")
    prompt_set = prompts if isinstance(prompts, PromptSet) else read_prompts(list(prompts))
    if len(prompt_set) == 0:
        raise PromptError("there are no prompts to score with")

    layout = target.layout
    weights = named_weights(target.model, layout.eligible_tensors)
    sigmas = {name: sigma(layout.tensors[name], weight.detach()) for name, weight in weights.items()}
    fingerprint = target.fingerprint()
    identity = {
        "model": fingerprint.id,
        "prompts": prompt_set.hash,
        "objective": describe(objective) if objective is not None else None,
        "batch_size": batch_size,
    }
    routing = RoutingCounter(target.model, layout)
    per_prompt: list[float] = []
    norms: dict[str, list[float]] = {}
    if method in NEEDS_OBJECTIVE:
        assert objective is not None
        accumulator = GradientAccumulator(weights, device=accumulate_on)
        per_prompt = _accumulate(
            target, prompt_set, objective, accumulator, routing, batch_size=batch_size, identity=identity,
            checkpoint=checkpoint, checkpoint_seconds=checkpoint_seconds, progress=progress,
        )  # fmt: skip
        tensors = accumulator.sums
        for gradient in tensors.values():
            gradient.div_(len(prompt_set))
        norms = _gradient_norms(layout.tensors, tensors)
    elif method == "wanda":
        tensors = _input_norms(target, prompt_set, weights, batch_size, max_new_tokens, progress)
    else:
        tensors = {name: torch.empty(weight.shape, device=weight.device) for name, weight in weights.items()}

    statistics: list[MatrixStatistics] = []
    for name, weight in weights.items():
        tensors[name] = _to_score(method, layout.tensors[name], tensors[name], weight.detach(), sigmas[name], seed)
        statistics += matrix_statistics(
            layout.tensors[name],
            tensors[name],
            sigma=sigmas[name].tolist(),
            gradient_norm=norms.get(name),
            tokens=routing.tokens[name].tolist() if name in routing.tokens else None,
        )
    return Scores(
        tensors=tensors,
        layout=layout,
        statistics=statistics,
        per_prompt=per_prompt,
        provenance=Provenance(
            method=method,
            model=target.name,
            objective=describe(objective) if objective is not None and method in NEEDS_OBJECTIVE else None,
            prompts=prompt_set.source,
            prompts_hash=prompt_set.hash,
            num_prompts=len(prompt_set),
            seed=seed,
            fingerprint=fingerprint.to_json(),
            versions=versions(),
            # so that nothing is ever verified on the prompts it was found with
            extra={"prompt_hashes": prompt_set.prompt_hashes},
        ),
    )


def sigma(layout: TensorLayout, tensor: Tensor) -> Tensor:
    """Standard deviation of each logical matrix of a tensor: fp32 [num_matrices], order of `layout.matrices`.

    Raises:
        NumericalError: the tensor holds NaN or infinity.
    """
    view = tensor.view(layout.view)
    columns = []
    for part in range(len(layout.parts)):
        matrices = view[layout.part_index(part)]
        if layout.axes[0] == "expert":
            # one expert at a time in fp32: a fused tensor can be gigabytes
            columns.append(torch.stack([matrix.float().std(correction=0) for matrix in matrices]))
        else:
            columns.append(matrices.float().std(correction=0)[None])
    result = torch.stack(columns, dim=1).flatten()  # experts in order, and within each its parts
    if not bool(torch.isfinite(result).all()):
        raise NumericalError(f"{layout.name}: the weights hold NaN or infinity; the checkpoint is damaged")
    return result


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    return {package: importlib.metadata.version(package) for package in ("safelocus", "torch", "transformers")}


def _accumulate(
    target: Target,
    prompts: PromptSet,
    objective: Objective,
    accumulator: GradientAccumulator,
    routing: RoutingCounter,
    *,
    batch_size: int,
    identity: dict[str, Any],
    checkpoint: Path | None,
    checkpoint_seconds: float,
    progress: bool,
) -> list[float]:
    """Sum signed gradients of S over all prompts into `accumulator`; returns S of each prompt, in order."""
    texts = prompts.texts
    batches = _by_length(target, texts, batch_size)
    values: list[float | None] = [None] * len(texts)
    done = 0
    if checkpoint is not None and (state := load_checkpoint(checkpoint, accumulator.sums, identity)):
        done, values = state["batches"], state["values"]
        routing.tokens = {name: torch.tensor(tokens, device=target.device) for name, tokens in state["tokens"].items()}

    def save(batches_done: int) -> None:
        if checkpoint is not None:
            tokens = {name: counts.tolist() for name, counts in routing.tokens.items()}
            state = {"identity": identity, "batches": batches_done, "values": values, "tokens": tokens}
            save_checkpoint(checkpoint, accumulator.sums, state)

    with (
        accumulator.collecting(target.model),
        routing.counting(),
        StopAtBoundary(save, every_seconds=checkpoint_seconds, enabled=checkpoint is not None) as boundary,
    ):
        for number, batch in enumerate(track(batches, "scoring", enabled=progress, start=done, unit=len), start=done):
            where = f"batch {number + 1} of {len(batches)} (prompts {', '.join(str(i) for i in batch[:8])})"
            with _memory_errors(batch_size):
                result = objective(target, [texts[i] for i in batch])
                _check_objective(result, len(batch), where)
                result.float().sum().backward()
            accumulator.check_finite(where)
            for i, value in zip(batch, result.tolist(), strict=True):
                values[i] = value
            boundary.passed(number + 1)
    return [value for value in values if value is not None]


def _by_length(target: Target, texts: Sequence[str], batch_size: int) -> list[list[int]]:
    """Indices of prompts in batches of like length, longest first: little padding, and memory peaks at once."""
    lengths = [len(target.chat.encode_prompt(text)) for text in texts]
    order = sorted(range(len(texts)), key=lambda i: (-lengths[i], i))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def _check_objective(result: Any, batch: int, where: str) -> None:
    if not isinstance(result, Tensor) or result.shape != (batch,):
        found = f"shape {tuple(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
        raise SafelocusError(
            f"the objective must return a tensor of shape ({batch},), one score per prompt; found {found}"
        )
    if not result.requires_grad:
        raise SafelocusError(
            "the objective's scores have no gradient in the target's weights; is something detached or under no_grad?"
        )
    if not bool(torch.isfinite(result).all()):
        raise NumericalError(f"S is NaN or infinite in {where}")


@contextmanager
def _memory_errors(batch_size: int) -> Iterator[None]:
    """Turns running out of memory into an error that says what to try."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        exhausted = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
        if not exhausted:
            raise
        smaller = f"--batch-size {batch_size // 2}, " if batch_size > 1 else ""
        raise ResourceError(
            f"out of memory at batch size {batch_size}. Try {smaller}--accumulate-on cpu, --dtype bfloat16 or fewer "
            "--max-new-tokens"
        ) from error


def _gradient_norms(layouts: dict[str, TensorLayout], gradients: dict[str, Tensor]) -> dict[str, list[float]]:
    """Euclidean norm of the gradient of each logical matrix, per tensor in the order of its matrices."""
    return {
        name: [float(torch.linalg.vector_norm(matrix)) for matrix in layouts[name].split(gradient)]
        for name, gradient in gradients.items()
    }


def _input_norms(
    target: Target,
    prompts: PromptSet,
    weights: dict[str, torch.nn.Parameter],
    batch_size: int,
    max_new_tokens: int,
    progress: bool,
) -> dict[str, Tensor]:
    """||X_j|| of every weight's input over prompts and the target's own answers, broadcastable to the weight."""
    norms = InputNorms(weights, target.layout.tensors)
    for batch in track(_by_length(target, prompts.texts, batch_size), "scoring", enabled=progress, unit=len):
        texts = [prompts.texts[i] for i in batch]
        with torch.no_grad(), _memory_errors(batch_size):
            answers = [list(r.ids) for r in generate(target, texts, max_new_tokens=max_new_tokens)]
            with norms.observing(target.model):
                for text, answer in zip(texts, answers, strict=True):  # singly: without padding
                    teacher_force(target, [target.chat.encode_prompt(text)], [answer])
    return {name: square.sqrt() for name, square in norms.squares.items()}


def _to_score(method: str, layout: TensorLayout, raw: Tensor, weight: Tensor, sigmas: Tensor, seed: int) -> Tensor:
    """The final score of one tensor, in place where a gradient was accumulated."""
    if method == "random":
        generator = torch.Generator().manual_seed(xxhash.xxh3_64_intdigest(f"{seed}:{layout.name}".encode()) >> 1)
        return torch.rand(raw.shape, generator=generator).to(raw.device)
    if method == "magnitude":
        return raw.copy_(weight).abs_()
    if method == "wanda":
        return weight.to(raw.device).float().abs() * raw  # a new tensor: `float` copies nothing in fp32
    if method == "snip":
        return raw.mul_(weight.to(raw.device)).abs_()
    raw.abs_()
    if method == "esi":
        view, by_matrix = raw.view(layout.view), sigmas.to(raw.device).view(-1, len(layout.parts))
        for part in range(len(layout.parts)):
            factor = by_matrix[:, part]  # [experts], or [1]
            view[layout.part_index(part)] *= factor.view(-1, *[1] * (len(layout.view) - 1))
    return raw
