"""docs/api.md is what docs/build_api.py makes of the docstrings, and has every exported name."""

import runpy
from pathlib import Path

import safelocus as sl

DOCS = Path(__file__).parents[1] / "docs"


def test_the_page_is_up_to_date():
    build = runpy.run_path(str(DOCS / "build_api.py"))
    committed = (DOCS / "api.md").read_text(encoding="utf-8")
    assert committed == build["page"](), "docs/api.md is out of date: run `make docs`"


def test_every_name_has_a_docstring_in_the_page():
    sections = (DOCS / "api.md").read_text(encoding="utf-8").split("\n## ")[1:]
    assert [section.partition("\n")[0] for section in sections] == sl.__all__
    for section in sections:
        words = section.split("```")[2].strip()
        assert words[:1].isupper(), section.partition("\n")[0]
