"""The commands of quickstart, lexicon and stories are well formed: options exist, values parse. Nothing is run."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from safelocus.cli import app

DOCS = Path(__file__).parents[1] / "docs"
PAGES = [DOCS / "quickstart.md", DOCS / "lexicon.md", *sorted((DOCS / "stories").glob("*.md"))]
COMMANDS = [
    pytest.param(line.partition(" #")[0], id=f"{page.stem}:{number}")
    for page in PAGES
    for number, line in enumerate(re.findall(r"^safelocus .*", page.read_text(encoding="utf-8"), re.MULTILINE))
]


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_parse(line):
    command = typer.main.get_command(app)
    words = shlex.split(line)[1:]
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    command.make_context(command.name, words)


def test_every_page_has_commands():
    assert len(PAGES) == 5
    assert all("safelocus " in page.read_text(encoding="utf-8") for page in PAGES)
