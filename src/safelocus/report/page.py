"""One self-contained HTML page of one or more runs.

plotly.js is inlined once, and the page's own policy forbids every network request. Everything that comes from
outside (names of models, runs and tensors, responses) is escaped: in HTML by jinja2, in data by its JSON filter, and
before it reaches plotly, which reads some HTML in its labels, by `page.js`.
"""

from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup, escape

from safelocus import __version__
from safelocus.report import colours
from safelocus.report.runs import ReportRun, with_parts
from safelocus.report.sections import sections_of
from safelocus.report.sections.comparison import comparison_parts
from safelocus.report.sections.provenance import origin_of
from safelocus.report.sections.responses import responses_json
from safelocus.run import write_text

PAGE = "report.html"


def write_run_page(folder: Path, *, place: Path) -> str:
    """The page of the run in a folder, without responses; returns the file's name.

    Args:
        folder: of the run, where everything else is written already.
        place: what the folder will be called when the run is complete.
    """
    write_page([ReportRun.read(folder, place=place)], folder / PAGE)
    return PAGE


def write_page(
    runs: Sequence[ReportRun], path: Path, *, heading: str = "Safety report", responses: bool = False
) -> None:
    """Write the page under a temporary name and rename it.

    Args:
        runs: in the order of the page; a demo brings the runs inside it.
        path: the HTML file to be; about 5 MB, nearly all of it plotly.js.
        heading: of the page.
        responses: bundle prompts and answers, harmful ones among them; folded away.

    Raises:
        RunError: a run's files are damaged.
    """
    from plotly.offline import get_plotlyjs

    runs = with_parts(runs)
    html = _template().render(
        heading=heading,
        sections=[section for run in runs for section in sections_of(run)],
        comparison=comparison_parts(runs),
        origins=[origin_of(run) for run in runs],
        responses=responses_json(runs) if responses else None,
        palette={
            "light": {"heat": colours.LIGHT, "series": colours.SERIES_LIGHT},
            "dark": {"heat": colours.DARK, "series": colours.SERIES_DARK},
        },
        unrouted={"light": colours.UNROUTED_LIGHT, "dark": colours.UNROUTED_DARK},
        plotly=Markup(get_plotlyjs()),
        style=_part("page.css"),
        script=_part("page.js"),
        version=__version__,
    )
    write_text(Path(path), html)


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("safelocus", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # the order of a table's columns is that of its keys; NaN is no JSON
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False, "allow_nan": False, "separators": (",", ":")}
    environment.filters["breakable"] = _breakable
    environment.filters["unbroken"] = lambda line: line.replace(" %", "\N{NO-BREAK SPACE}%")
    return environment.get_template("page.html")


@cache
def _part(name: str) -> Markup:
    return Markup(files("safelocus.report").joinpath(name).read_text(encoding="utf-8"))


def _breakable(name: str) -> Markup:
    """A tensor's name that may break after its dots and underscores, and copies as it is."""
    return escape(name).replace(".", Markup(".<wbr>")).replace("_", Markup("_<wbr>"))
