"""One self-contained HTML page of one or more runs, and the pictures beside it.

Charts are SVG in the page, and the page's own policy forbids every network request. Everything that comes from outside
(names of models, runs and tensors, responses) is escaped: in HTML by jinja2, in data by its JSON filter, in charts by
`drawing`.
"""

from collections.abc import Callable, Sequence
from functools import cache
from importlib.resources import files
from itertools import count
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from safelocus import __version__
from safelocus.analysis.map import SafetyMap
from safelocus.analysis.words import TIMES
from safelocus.enhancement.result import Enhancement
from safelocus.errors import MALFORMED, RunError, SafelocusError
from safelocus.inert import inert
from safelocus.preservation.result import Preservation
from safelocus.report import colours
from safelocus.report.blocks import Chart, Matrices, Section, Verdicts
from safelocus.report.card import card
from safelocus.report.comparison import comparison_parts
from safelocus.report.drawing import svg, write_picture
from safelocus.report.evaluation import evaluation_sections
from safelocus.report.maps import BARS, map_sections
from safelocus.report.provenance import origin_of
from safelocus.report.runs import ReportRun, responses_json, with_parts
from safelocus.report.training import training_sections
from safelocus.report.verdicts import claims_sections
from safelocus.report.verification import stability_sections, verification_sections
from safelocus.run.files import expected_digest, write_json, write_text
from safelocus.selection.selection import Selection
from safelocus.verification import Verification

PAGE = "report.html"
SELECTION = "selection.safetensors"
_KINDS: dict[str, Callable[[ReportRun], list[Section]]] = {
    "demo": claims_sections,
    "map": map_sections,
    "verify": verification_sections,
    "stability": stability_sections,
    "evaluate": evaluation_sections,
    "enhance": training_sections,
    "preserve": training_sections,
}


def write_map(folder: Path, maps: Sequence[tuple[str, SafetyMap]], *, place: Path, pictures: bool = True) -> list[str]:
    """results.json, page and pictures of one or more models; returns the names of the files.

    Args:
        folder: of the run; selections that lie in it are opened on the page.
        maps: (name of the model as it is to be shown, its map).
        place: what the folder will be called when the run is complete.
        pictures: write the page and the pictures too.
    """
    write_json(folder / "results.json", {"maps": {model: located.to_json() for model, located in maps}})
    return ["results.json", *(write_run_page(folder, place=place) if pictures else [])]


def write_outcome(
    found: Verification | Enhancement | Preservation,
    folder: Path,
    *,
    place: Path,
    selection: Selection | None = None,
    pictures: bool = True,
) -> list[str]:
    """Everything that a run of `verify`, `enhance` or `preserve` consists of; returns the names of page and pictures.

    Args:
        selection: that was trained or protected.
        folder, place, pictures: as of `write_map`.
    """
    found.save(folder)
    if selection is not None:
        selection.save(folder / SELECTION)
    if isinstance(found, Enhancement):
        write_text(folder / "README.md", card(found.to_json()))
    return write_run_page(folder, place=place) if pictures else []


def write_run_page(folder: Path, *, place: Path) -> list[str]:
    """The page of the run in a folder, without responses, and the pictures of its charts; returns the files' names.

    Args:
        folder: of the run, where everything else is written already.
        place: what the folder will be called when the run is complete.
    """
    run = ReportRun.read(folder, place=place)
    sections = sections_of(run)
    _write([run], {run.name: sections}, folder / PAGE, heading="Safety report", responses=False)
    written = [PAGE]
    for section in sections:
        for part in section.parts:
            if part.file and part.charts:  # nothing is drawn where nothing could be scored
                names = (f"{part.file}{f'-{number}' if number > 1 else ''}.svg" for number in count(1))
                file = folder / next(name for name in names if name not in written)  # two scorers may be spelled alike
                written.append(write_picture(file, f"{section.title}: {section.what}", part.charts))
    return written


def write_page(
    runs: Sequence[ReportRun], path: Path, *, heading: str = "Safety report", responses: bool = False
) -> None:
    """Write the page under a temporary name and rename it.

    Args:
        runs: in the order of the page; a demo brings the runs inside it.
        path: the HTML file to be.
        heading: of the page.
        responses: bundle prompts and answers, harmful ones among them; folded away.

    Raises:
        RunError: a run's files are damaged.
    """
    _write(with_parts(runs), {}, path, heading=heading, responses=responses)


def sections_of(run: ReportRun) -> list[Section]:
    """The sections of one run: one, or one per model."""
    return _KINDS[run.kind](run)


def _write(
    runs: Sequence[ReportRun], made: dict[str, list[Section]], path: Path, *, heading: str, responses: bool
) -> None:
    """`made`: sections by name of their run, where they were made already."""
    try:
        html = _template().render(
            heading=heading,
            sections=[section for run in runs for section in made.get(run.name) or sections_of(run)],
            comparison=comparison_parts(runs),
            origins=[origin_of(run) for run in runs],
            responses=responses_json(runs) if responses else None,
            light=colours.LIGHT,
            dark=colours.DARK,
            bars=BARS,
            style=_part("page.css"),
            script=_part("page.js"),
            version=__version__,
        )
    except SafelocusError:
        raise
    except MALFORMED as error:
        strange = [str(run.folder) for run in runs if expected_digest(run.folder / "results.json") is None]
        if not strange:  # what has a digest is as it was written: a bug of ours
            raise
        raise RunError(
            f"{', '.join(strange)}: damaged results or responses ({error!r}); run the command again"
        ) from error
    write_text(Path(path), html)


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("safelocus", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: inert(value) if isinstance(value, str) and not isinstance(value, Markup) else value,
    )
    # the order of a table's columns is that of its keys; NaN is no JSON
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False, "allow_nan": False, "separators": (",", ":")}
    environment.filters |= {
        "svg": lambda chart: Markup(svg(chart)),
        "unbroken": lambda line: line.replace(" %", "\N{NO-BREAK SPACE}%"),
        "scale": _scale,
    }
    environment.tests |= {
        name: lambda block, kind=kind: isinstance(block, kind)
        for name, kind in (("chart", Chart), ("matrices", Matrices), ("verdicts", Verdicts))
    }
    return environment.get_template("page.html")


def _scale(limit: int) -> list[str]:
    """Tick labels from end to end of the scale of so many doublings."""
    labels = [f"{2**power}{TIMES}" if power >= 0 else f"1/{2**-power}{TIMES}" for power in range(-limit, limit + 1)]
    inner = [
        label if limit < 4 or i % 2 else "" for i, label in enumerate(labels[1:-1])
    ]  # that of 1 has an odd i there
    return [f"≤ {labels[0]}", *inner, f"≥ {labels[-1]}"]


@cache
def _part(name: str) -> Markup:
    return Markup(files("safelocus.report").joinpath(name).read_text(encoding="utf-8"))
