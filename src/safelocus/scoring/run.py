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

Several processes (see `distributed`) share the prompts, batch by batch: the batches are those of a single
process. Copies of the model are scored each for itself; through a sharded model all pass in step.

Input: a target, prompts and an objective. Output: frozen `Scores`.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import xxhash
from torch import Tensor

from safelocus import distributed
from safelocus.errors import NumericalError, PromptError, ResourceError, SafelocusError
from safelocus.model.forcing import batches_by_length, teacher_force
from safelocus.model.generation import as_used, generate
from safelocus.model.layout.tensor import TensorLayout
from safelocus.model.target import Target, check_device, is_exhausted
from safelocus.objective import Objective, describe
from safelocus.progress import size_of, track
from safelocus.prompts import PromptSet, read_prompts
from safelocus.run.identity import Identity, versions
from safelocus.run.resume import Snapshots, StopAtBoundary, claim
from safelocus.scoring.gradients import GradientAccumulator, named_weights
from safelocus.scoring.observing import InputNorms, RoutingCounter
from safelocus.scoring.scores import MatrixStatistics, Provenance, Scores, matrix_statistics

Method = Literal["esi", "gradient", "snip", "wanda", "magnitude", "random"]
METHODS: tuple[str, ...] = get_args(Method)
NEEDS_OBJECTIVE = ("esi", "gradient", "snip")


def score(
    target: Target,
    prompts: PromptSet | Sequence[str] | Path,
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
        prompts: P harmful prompts: a set, a list, or a source of `read_prompts` (a file, `organism:harmful`, ...).
        objective: S, as a callable `(target, prompts) -> [B]`; `Guard`, `Classifier`, `Lexicon`, `Refusal` or your own.
            Needed by esi, gradient and snip.
        method: which score; see the module's text.
        batch_size: prompts per forward and backward pass. The result does not depend on it beyond rounding.
        accumulate_on: device of the fp32 sums and scores, e.g. "cpu" to keep the accelerator free; default: the
            weights'.
        seed: of the random method.
        max_new_tokens: length of the answers that wanda observes.
        checkpoint: folder in which the sums are kept every `checkpoint_seconds` and at Ctrl-C, and from
            which an interrupted run resumes; they stay when all is done, so remove it then. Of several processes each
            has its own, and as many resume.
        progress: show a progress bar.

    Returns:
        Scores: one fp32 score per eligible weight, with statistics per matrix and provenance.

    Raises:
        SafelocusError: NaN or infinity (naming tensor and batch), an objective of the wrong shape or
            without gradient, too little memory, no such device.

    Example:
        >>> import safelocus as sl
        >>> target = sl.load("organism:dense")
        >>> scores = sl.score(target, ["How do I bake a cake?"], objective=sl.Refusal(), progress=False)
        >>> scores.select(ratio=0.01).k
        12709
    """
    prompt_set = read_prompts(prompts)
    _check(method, objective, batch_size, prompt_set)
    check_device(accumulate_on, "accumulate_on")
    layout = target.layout
    weights = named_weights(target.model, layout.eligible_tensors)
    distributed.check_shards(weights)
    if method == "wanda" and distributed.any_sharded(weights):
        raise SafelocusError("wanda observes whole weights, and this model is sharded; score it with another method")
    if accumulate_on is not None and distributed.any_sharded(weights):
        raise ResourceError("the scores of a sharded model are where its shards are: leave out accumulate_on")
    with _memory_errors(batch_size):
        sigmas = {name: sigma(layout.tensors[name], distributed.whole(w.detach())) for name, w in weights.items()}
    fingerprint = target.fingerprint()
    inputs = {
        "--prompts": prompt_set, "the objective": objective, "method": method, "batch_size": batch_size,
        "the number of processes": distributed.world_size(),
    }  # fmt: skip
    described = None if objective is None else describe(objective)
    together = {**inputs, "the model": fingerprint.id, "the objective": described, "seed": seed}
    distributed.check_same(Identity.of(together).parts)
    claim(checkpoint, {"the model": target, **inputs})
    routing = RoutingCounter(target.model, layout)
    per_prompt: list[float] = []
    tensors: dict[str, Tensor] = {}  # what the scores are made of, where the weights alone do not tell
    with _memory_errors(batch_size), as_used(target.model):
        if method in NEEDS_OBJECTIVE:
            assert objective is not None
            accumulator = GradientAccumulator(weights, device=accumulate_on)
            per_prompt = _accumulate(
                target, prompt_set, objective, accumulator, routing, batch_size=batch_size,
                checkpoint=checkpoint, checkpoint_seconds=checkpoint_seconds, progress=progress,
            )  # fmt: skip
            tensors = accumulator.sums
            for gradient in tensors.values():
                gradient.div_(len(prompt_set))
        elif method == "wanda":
            tensors = _input_norms(target, prompt_set, weights, batch_size, max_new_tokens, progress)
        statistics = _finish(
            target, method, weights, tensors, sigmas, tokens=_total_tokens(routing), seed=seed, device=accumulate_on
        )
    return Scores(
        tensors=tensors,
        layout=layout,
        statistics=statistics,
        per_prompt=per_prompt,
        provenance=Provenance(
            method=method,
            model=target.name,
            objective=described if method in NEEDS_OBJECTIVE else None,
            prompts=prompt_set.source,
            prompts_hash=prompt_set.hash,
            num_prompts=len(prompt_set),
            seed=seed,
            fingerprint=fingerprint.to_json(),
            versions=versions(),
            extra=_kept(target, prompt_set, statistics, batch_size=batch_size, max_new_tokens=max_new_tokens),
        ),
    )


def _kept(target: Target, prompts: PromptSet, statistics: Sequence[MatrixStatistics], **how: int) -> dict[str, Any]:
    """What else provenance keeps."""
    remarks, left_out = _remarks(statistics), target.layout.left_out
    return {
        # so that nothing is ever verified on the prompts it was found with
        "prompt_hashes": prompts.prompt_hashes,
        # so that other scores can be made like these
        **how,
        "chat": target.chat.to_json(),
        "read_with": dict(prompts.read_with),
        **({"left_out": left_out} if left_out else {}),
        **({"remarks": remarks} if remarks else {}),
    }


def _remarks(statistics: Sequence[MatrixStatistics]) -> list[str]:
    """What a reader of the scores should mind."""
    uncounted = [s for s in statistics if s.expert is not None and s.tokens is None and s.gradient_norm == 0]
    if not (number := len({(s.stack, s.layer, s.expert) for s in uncounted})):
        return []
    return [f"{number} experts have no gradient at all: no token reached them, and their scores of zero say nothing"]


def _check(method: str, objective: Objective | None, batch_size: int, prompts: PromptSet) -> None:
    if method not in METHODS:
        raise SafelocusError(f"method {method!r} is unknown; expected one of {', '.join(METHODS)}")
    if method in NEEDS_OBJECTIVE and objective is None:
        raise SafelocusError(
            f"method {method!r} needs an objective: a Guard, Classifier, Lexicon, Refusal or your own callable"
        )
    if batch_size < 1:
        raise SafelocusError(f"batch size must be at least 1, found {batch_size}")
    if len(prompts) == 0:
        raise PromptError("there are no prompts to score with")


def _finish(
    target: Target,
    method: str,
    weights: Mapping[str, Tensor],
    tensors: dict[str, Tensor],
    sigmas: Mapping[str, Tensor],
    *,
    tokens: Mapping[str, list[int]],
    seed: int,
    device: str | None,
) -> list[MatrixStatistics]:
    """Turn what was summed into scores, in place and one tensor at a time; returns the statistics of all matrices."""
    statistics: dict[str, list[MatrixStatistics]] = {}
    measured_here = set(distributed.share(list(weights)))
    for name, parameter in weights.items():
        layout = target.layout.tensors[name]
        # as a matrix, whether sharded or not
        weight = distributed.whole(parameter.detach())
        to = device or weight.device
        raw = distributed.whole(tensors[name]).to(to) if name in tensors else torch.empty(weight.shape, device=to)
        norms = _gradient_norms(layout, raw) if method in NEEDS_OBJECTIVE else None
        scores = _to_score(method, layout, raw, weight, sigmas[name], seed)
        if name in measured_here:
            statistics[name] = matrix_statistics(
                layout, scores, sigma=sigmas[name].tolist(), gradient_norm=norms, tokens=tokens.get(name)
            )
        tensors[name] = distributed.sharded_like(scores, parameter)
    statistics = distributed.merged(statistics)
    return [statistic for name in weights for statistic in statistics[name]]


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


def _accumulate(
    target: Target,
    prompts: PromptSet,
    objective: Objective,
    accumulator: GradientAccumulator,
    routing: RoutingCounter,
    *,
    batch_size: int,
    checkpoint: Path | None,
    checkpoint_seconds: float,
    progress: bool,
) -> list[float]:
    """Sum signed gradients of S over all prompts into `accumulator`; returns S of each prompt, in order."""
    texts = prompts.texts
    batches = _by_length(target, texts, batch_size)
    in_step = accumulator.is_sharded
    own = distributed.share(batches, in_step=in_step)
    values: dict[int, float] = {}
    done = 0
    snapshots = None if checkpoint is None else Snapshots(checkpoint, in_step=in_step)
    if snapshots is not None and (found := snapshots.load(accumulator.sums)):
        done, state = found
        values = {int(i): value for i, value in state["values"].items()}
        routing.tokens = {name: torch.tensor(tokens, device=target.device) for name, tokens in state["tokens"].items()}

    def save(batches_done: int) -> None:
        if snapshots is not None:
            tokens = {name: counts.tolist() for name, counts in routing.tokens.items()}
            snapshots.save(batches_done, accumulator.sums, {"values": values, "tokens": tokens})

    with (
        accumulator.collecting(target.model),
        routing.counting(),
        StopAtBoundary(
            save, every_seconds=checkpoint_seconds, enabled=checkpoint is not None, in_step=in_step
        ) as boundary,
    ):
        shown = progress and distributed.is_main()
        for number, batch in enumerate(track(own, "scoring", enabled=shown, start=done, unit=size_of), start=done):
            where = _where(batches, number, in_step=in_step)
            if batch is None:
                _keep_step(target, texts[batches[-1][-1]], objective, routing)
            else:
                result = objective(target, [texts[i] for i in batch])
                _check_objective(result, len(batch))
                result.float().sum().backward()
                # waits for the device, when there is nothing left to give it
                values |= zip(batch, _finite(result.tolist(), where), strict=True)
            accumulator.check_finite(where)
            boundary.passed(number + 1)
    if not in_step:  # FSDP has added up what all processes sent back through a sharded model
        for total in accumulator.sums.values():
            distributed.all_reduce_sum(total)
    values = distributed.merged(values)
    return [values[i] for i in range(len(texts))]


def _where(batches: Sequence[list[int]], number: int, *, in_step: bool) -> str:
    """What this process (or, in step, all of them) worked on in its batch of that number, for error messages."""
    first = number * distributed.world_size() + (0 if in_step else distributed.rank())
    last = min(first + distributed.world_size() if in_step else first + 1, len(batches))
    prompts = [str(i) for batch in batches[first:last] for i in batch]
    label = f"batch {last}" if last == first + 1 else f"batches {first + 1} to {last}"
    return f"{label} of {len(batches)} (prompts {', '.join(prompts[:8])})"


def _keep_step(target: Target, text: str, objective: Objective, routing: RoutingCounter) -> None:
    """Pass through a sharded model along with the others, adding nothing: this process has no prompts left."""
    listener, tokens = getattr(objective, "on_responses", None), dict(routing.tokens)
    try:
        if listener is not None:
            objective.on_responses = None  # type: ignore[attr-defined]
        (objective(target, [text]).float().sum() * 0).backward()
    finally:
        routing.tokens = tokens
        if listener is not None:
            objective.on_responses = listener  # type: ignore[attr-defined]


def _total_tokens(routing: RoutingCounter) -> dict[str, list[int]]:
    """Tokens routed to each expert, per fused tensor, by all processes."""
    counts = distributed.gather_objects({name: counts.cpu() for name, counts in routing.tokens.items()})
    names = {name for part in counts for name in part}
    return {name: torch.stack([part[name] for part in counts if name in part]).sum(dim=0).tolist() for name in names}


def _by_length(target: Target, texts: Sequence[str], batch_size: int) -> list[list[int]]:
    return batches_by_length([len(target.chat.encode_prompt(text)) for text in texts], batch_size)


def _check_objective(result: Any, batch: int) -> None:
    if not isinstance(result, Tensor) or result.shape != (batch,):
        found = f"shape {tuple(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
        raise SafelocusError(
            f"the objective must return a tensor of shape ({batch},), one score per prompt; found {found}"
        )
    if not result.requires_grad:
        raise SafelocusError(
            "the objective's scores have no gradient in the target's weights; is something detached or under no_grad?"
        )


def _finite(values: list[float], where: str) -> list[float]:
    if not all(map(math.isfinite, values)):
        raise NumericalError(f"S is NaN or infinite in {where}")
    return values


@contextmanager
def _memory_errors(batch_size: int) -> Iterator[None]:
    """Turns running out of memory into an error that says what to try."""
    try:
        yield
    except Exception as error:
        if not is_exhausted(error):
            raise
        smaller = f"--batch-size {batch_size // 2}, " if batch_size > 1 else ""
        raise ResourceError(
            f"out of memory at batch size {batch_size}. Try {smaller}--accumulate-on cpu, --dtype bfloat16 or fewer "
            "--max-new-tokens; `safelocus plan` says what fits"
        ) from error


def _gradient_norms(layout: TensorLayout, gradient: Tensor) -> list[float]:
    """Euclidean norm of the gradient of each logical matrix of one tensor, in the order of its matrices."""
    return torch.stack([torch.linalg.vector_norm(matrix) for matrix in layout.split(gradient)]).tolist()


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
    own = distributed.share(_by_length(target, prompts.texts, batch_size))
    for batch in track(own, "scoring", enabled=progress and distributed.is_main(), unit=size_of):
        texts = [prompts.texts[i] for i in batch or ()]
        with torch.no_grad():
            answers = [list(r.ids) for r in generate(target, texts, max_new_tokens=max_new_tokens)]
            with norms.observing(target.model):
                for text, answer in zip(texts, answers, strict=True):  # singly: without padding
                    teacher_force(target, [target.chat.encode_prompt(text)], [answer])
    for square in norms.squares.values():
        distributed.all_reduce_sum(square)
    norms.check_all_seen()
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
