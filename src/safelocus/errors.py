"""Errors that a user can act on.

Every message says what went wrong, where, what was expected, what was found and what to do next.
The command line prints such an error as one message, without a traceback; anything else is a bug
in safelocus. Invariants inside the package are `assert`s, not these.
"""

from collections.abc import Sequence


class SafelocusError(ValueError):
    """Base of all errors raised for bad input."""


# What values raise that have another shape than a file of their kind should have: to be caught where they are put
# together, and told in words. (All of `SafelocusError` are among them.)
MALFORMED = (LookupError, TypeError, AttributeError, ValueError, AssertionError, ArithmeticError, RecursionError)


class LayoutError(SafelocusError):
    """The model's tensors are not understood, or do not have the described shape."""


class ArchitectureError(LayoutError):
    """No model can be built from the configuration alone, as by remote code; whether it loads is another matter."""


class ModelError(SafelocusError):
    """A model, tokenizer or guard cannot be loaded or does not fit its use."""


class PromptError(SafelocusError):
    """Prompts or chat data cannot be read, or hold nothing usable."""


class WordListError(SafelocusError):
    """A list of expressions cannot be read, or holds nothing usable."""


class JudgeError(SafelocusError):
    """A judge is unknown, cannot be set up, or its endpoint refuses every request."""


class SelectionError(SafelocusError):
    """A selection is impossible, matches nothing, or belongs to another model."""


class PatchError(SafelocusError):
    """A patch file is damaged, or a patch does not belong to this model."""


class TrainingError(SafelocusError):
    """A training run cannot be set up as asked."""


class NumericalError(SafelocusError):
    """NaN or infinity in weights, gradients or scores; the message names the tensor and the batch."""


class RunError(SafelocusError):
    """A run folder cannot be written, resumed or read."""


class ResourceError(SafelocusError):
    """Too little memory or disk; the message says what to try."""


class PlanError(SafelocusError):
    """A run cannot be planned: the model's own code does not run on tensors without data."""


def some(names: Sequence[str], most: int = 5) -> str:
    """The first of many names, and how many there are beside them: for a message that should name them.

    >>> some(["a", "b", "c"], 2)
    'a, b and 1 more'
    """
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def first_line(error: BaseException) -> str:
    """Of what an error says; its kind, where it says nothing."""
    return str(error).strip().split("\n", 1)[0] or type(error).__name__
