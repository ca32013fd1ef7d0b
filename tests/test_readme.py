"""Every command and every example in README and docs runs."""

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from safelocus.cli import app, main

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [text for found, text in fenced if found == language]


def commands(page: Path) -> list[str]:
    """Commands and synopses; one that goes on in the next line (after a backslash, or indented) is one."""
    text = "\n".join(blocks(page, ""))
    lines = [line.split("#")[0].strip() for line in re.sub(r"\\?\n[ \t]+", " ", text).splitlines()]
    return [line for line in lines if line.startswith("safelocus ")]


def options_in(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", text))


README_COMMANDS = commands(ROOT / "README.md")
EMBEDDED = [c for c in README_COMMANDS if "organism:" in c or "runs/" in c.split("-o")[0]]
EXAMPLES = [
    pytest.param(page, code, id=f"{page.relative_to(ROOT)}:{number}")
    for page in PAGES
    for number, code in enumerate(blocks(page, "python"))
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "less", [{"--limit": "6", "--steps": "2", "--seeds": "1"}, pytest.param({}, marks=pytest.mark.long)]
)
def test_the_readmes_commands_run(tmp_path, monkeypatch, less):
    """Those on embedded models, in order and in one folder, as a reader would, but with less of what they ask for."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert len(EMBEDDED) >= 4
    for command in EMBEDDED:
        words = shlex.split(command)[1:]
        words += [word for option in less if option in words for word in (option, less[option])]
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert not stop.value.code, command


@pytest.mark.parametrize("command", [c for c in README_COMMANDS if c not in EMBEDDED])
def test_commands_on_other_models_are_well_formed(command, capsys):
    """They need the network, so only their options are checked."""
    words = shlex.split(command)[1:]
    with pytest.raises(SystemExit):
        main([words[0], "--help"])
    assert options_in(command) <= options_in(capsys.readouterr().out)


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_of_the_docs_have_only_options_that_exist(page):
    for command in commands(page):
        known, found = {"--help"}, get_command(app)
        for word in command.split()[1:]:
            if word not in getattr(found, "commands", {}):
                break
            found = found.commands[word]
        leaves = getattr(found, "commands", {"": found}).values()
        known |= {name for leaf in leaves for option in leaf.params for name in (*option.opts, *option.secondary_opts)}
        assert options_in(command) <= known, command


def test_anchors_lead_somewhere():
    for page in PAGES:
        for target, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", page.read_text(encoding="utf-8")):
            text = ((page.parent / target) if target else page).read_text(encoding="utf-8")
            headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.MULTILINE)
            known = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
            known += [f"{name}-1" for name in known if known.count(name) == 2]
            assert anchor in known, f"{page.name}: {target}#{anchor}"


@pytest.mark.slow
@pytest.mark.parametrize(("page", "code"), EXAMPLES)
def test_examples_run(page, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, str(page), "exec"), {"__name__": "example"})


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_make_targets_of_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = re.findall(r"^make ([\w-]+)", "\n".join(blocks(ROOT / "README.md", "")), re.MULTILINE)
    assert set(named) >= {"demo", "test"}
    assert all(re.search(rf"^{name}:", makefile, re.MULTILINE) for name in named)
    assert "make check" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_the_files_table_is_complete():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = readme.partition("## The files")[2].partition("##")[0]
    for path in (ROOT / "src" / "safelocus").iterdir():
        if path.name.startswith("_") or path.suffix not in ("", ".py"):
            continue
        assert f"`{path.name}{'/' if path.is_dir() else ''}`" in table, path.name
