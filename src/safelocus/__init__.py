"""safelocus: find the weights that carry a language model's safety, and act on exactly those.

Names are exported in pipeline order and imported on first use, so that `import safelocus` and the
command line's `--help` stay fast (no torch).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from safelocus.enhancement.optimizer import SparseOptimizer
    from safelocus.enhancement.result import Enhancement
    from safelocus.enhancement.run import enhance
    from safelocus.evaluation import Evaluation, TargetResponder, Task, compare_evaluations, evaluate, read_task
    from safelocus.evaluation.certification import EraseAndCheck, Smoothed
    from safelocus.evaluation.judges import load_judge
    from safelocus.model.layout import Layout, Matrix, TensorLayout
    from safelocus.model.target import Target, load
    from safelocus.objective import Classifier, Guard, Lexicon, Refusal
    from safelocus.patch import Patch
    from safelocus.preservation.attachment import preserve
    from safelocus.preservation.calibration import Calibration
    from safelocus.preservation.mixing import mix
    from safelocus.preservation.protection import Protection
    from safelocus.prompts import Example, PromptSet, read_prompts
    from safelocus.scoring.run import score
    from safelocus.scoring.scores import Scores
    from safelocus.selection.selection import Selection
    from safelocus.training import TrainingSettings
    from safelocus.training.examination import Examination
    from safelocus.verification import Stability, Verification, stability, verify

# name -> the module that defines it, in pipeline order
_EXPORTS = {
    "load": "model.target",
    "Target": "model.target",
    "Layout": "model.layout",
    "TensorLayout": "model.layout",
    "Matrix": "model.layout",
    "read_prompts": "prompts",
    "PromptSet": "prompts",
    "Example": "prompts",
    "Guard": "objective",
    "Classifier": "objective",
    "Refusal": "objective",
    "Lexicon": "objective",
    "score": "scoring.run",
    "Scores": "scoring.scores",
    "Selection": "selection.selection",
    "evaluate": "evaluation",
    "Evaluation": "evaluation",
    "compare_evaluations": "evaluation",
    "read_task": "evaluation",
    "Task": "evaluation",
    "TargetResponder": "evaluation",
    "EraseAndCheck": "evaluation.certification",
    "Smoothed": "evaluation.certification",
    "load_judge": "evaluation.judges",
    "Patch": "patch",
    "verify": "verification",
    "Verification": "verification",
    "stability": "verification",
    "Stability": "verification",
    "TrainingSettings": "training",
    "Examination": "training.examination",
    "enhance": "enhancement.run",
    "Enhancement": "enhancement.result",
    "SparseOptimizer": "enhancement.optimizer",
    "preserve": "preservation.attachment",
    "Protection": "preservation.protection",
    "Calibration": "preservation.calibration",
    "mix": "preservation.mixing",
}

__all__ = [  # noqa: RUF022 (pipeline order)
    "load", "Target", "Layout", "TensorLayout", "Matrix", "read_prompts", "PromptSet", "Example",
    "Guard", "Classifier", "Refusal", "Lexicon", "score", "Scores", "Selection",
    "evaluate", "Evaluation", "compare_evaluations", "read_task", "Task", "TargetResponder",
    "EraseAndCheck", "Smoothed", "load_judge",
    "Patch", "verify", "Verification", "stability", "Stability",
    "TrainingSettings", "Examination", "enhance", "Enhancement", "SparseOptimizer", "preserve", "Protection",
    "Calibration", "mix",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'safelocus' has no attribute {name!r}")
    return getattr(import_module(f"safelocus.{_EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
