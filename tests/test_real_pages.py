"""The pages of the real model hold what the cells beside them say; see benchmarks/real/pages.py."""

from importlib import import_module
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from safelocus.run.files import write_text

REAL = Path(__file__).parents[1] / "benchmarks" / "real"


@pytest.mark.slow
def test_pages_are_those_of_their_cells(scripts, monkeypatch, tmp_path):
    """Tables and verdicts of every page, and the README's table; pictures go where they are not looked at."""
    scripts(REAL)
    pages, sets, locate = map(import_module, ("pages", "sets", "topics.locate"))
    if not (sets.DATA / sets.FILES["xstest"]).is_file():
        pytest.skip(f"the data sets are not beside the repository: {sets.FILES['xstest']}")
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: None)
    monkeypatch.setattr(locate, "write_picture", lambda file, *_: write_text(tmp_path / file.name, ""))
    found = dict(pages.written())
    assert len(found) > 10
    for file, text in found.items():
        assert file.read_text(encoding="utf-8") == text, f"{file.name}: run `python benchmarks/real/pages.py`"
