"""Every command and every example in README and docs runs."""

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from safelocus.cli import app, main

REHEARSES = True
ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path, language: str, heading: str = "") -> list[str]:
    text = page.read_text(encoding="utf-8").partition(heading)[2] if heading else page.read_text(encoding="utf-8")
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [text for found, text in fenced if found == language]


def commands(page: Path, heading: str = "") -> list[str]:
    """Commands and synopses; one that goes on in the next line (after a backslash, or indented) is one."""
    text = "\n".join(blocks(page, "", heading))
    lines = [line.split("#")[0].strip() for line in re.sub(r"\\?\n[ \t]+", " ", text).splitlines()]
    return [line for line in lines if line.startswith("safelocus ")]


def options_in(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", text))


README_COMMANDS = commands(ROOT / "README.md")
QUICKSTART = ROOT / "docs" / "quickstart.md"
EXAMPLES = [
    pytest.param(page, code, id=f"{page.relative_to(ROOT)}:{number}")
    for page in PAGES
    for number, code in enumerate(blocks(page, "python"))
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "less",
    [
        {"--limit": "6", "--steps": "2", "--seeds": "1", "--max-new-tokens": "12"},
        pytest.param({}, marks=pytest.mark.long),
    ],
)
def test_every_command_runs_once(tmp_path, monkeypatch, less):
    """The quickstart's list, in order and in one folder, as a reader would, but with less of what they ask for."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    listed = commands(QUICKSTART, "## Every command, once")
    verbs = {command.split()[1] for command in listed}
    assert verbs == set(get_command(app).commands) - {"demo", "stability"}  # which have tests of their own
    for command in listed:
        words = shlex.split(command)[1:]
        words += [word for option in less if option in words for word in (option, less[option])]
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert not stop.value.code, command


@pytest.mark.parametrize("command", README_COMMANDS)
def test_commands_of_the_readme_are_well_formed(command, capsys):
    """Some need the network or a GPU, so of all of them the options are checked."""
    words = shlex.split(command)[1:]
    with pytest.raises(SystemExit):
        main([words[0], "--help"])
    assert options_in(command) <= options_in(capsys.readouterr().out)


@pytest.mark.slow
def test_commands_of_the_readme_on_the_real_model_go_together(tmp_path, monkeypatch):
    """In order and in one folder, with an organism in its place, and with less of what takes time."""
    monkeypatch.chdir(tmp_path)
    less = {"enhance": "--steps 2 --batch-size 2 --max-new-tokens 4 --limit 8"}
    listed = [command for command in README_COMMANDS if "smollm2" in command]
    assert [command.split()[1] for command in listed] == ["score", "enhance", "patch"]
    for command in listed:
        words = shlex.split(f"{command} {less.get(command.split()[1], '')}".replace("smollm2", "organism:dense"))[1:]
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert not stop.value.code, command


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
