"""What a page says of each kind of run: one module per kind, each from a `ReportRun` to `Section`s."""

from collections.abc import Callable

from safelocus.report.blocks import Section
from safelocus.report.runs import ReportRun
from safelocus.report.sections.claims import claims_sections
from safelocus.report.sections.evaluation import evaluation_sections
from safelocus.report.sections.map import map_sections
from safelocus.report.sections.training import training_sections
from safelocus.report.sections.verification import stability_sections, verification_sections

_KINDS: dict[str, Callable[[ReportRun], list[Section]]] = {
    "demo": claims_sections,
    "map": map_sections,
    "verify": verification_sections,
    "stability": stability_sections,
    "evaluate": evaluation_sections,
    "enhance": training_sections,
    "preserve": training_sections,
}


def sections_of(run: ReportRun) -> list[Section]:
    """The sections of one run: one, or one per model."""
    return _KINDS[run.kind](run)
