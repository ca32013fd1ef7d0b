"""Evaluate: how often a model answers harmfully, refuses, refuses needlessly, is useful, or makes no sense.

`evaluate` answers prompts and questions with a target or an endpoint and returns an `Evaluation`: measures
with intervals and every response they rest on. `compare_evaluations` pairs two of them.
"""

from safelocus.evaluation.attack import Ablation, Attacked, askings
from safelocus.evaluation.paired import EvaluationComparison, compare_evaluations
from safelocus.evaluation.responding import EndpointResponder, Reply, Request, Responder, TargetResponder
from safelocus.evaluation.result import Evaluation
from safelocus.evaluation.run import evaluate
from safelocus.evaluation.tasks import Task, TaskExample, read_task

__all__ = [
    "Ablation", "Attacked", "EndpointResponder", "Evaluation", "EvaluationComparison", "Reply", "Request", "Responder",
    "TargetResponder", "Task", "TaskExample", "askings", "compare_evaluations", "evaluate", "read_task",
]  # fmt: skip
