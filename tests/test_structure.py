"""Data flows one way: a module may import what stands before it in the pipeline, not what comes after."""

import ast
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import safelocus

SOURCE = Path(safelocus.__file__).parent
ORDER = [
    {"errors", "inert", "progress"},
    {"distributed"},
    {"run"},
    {"wordlist"},
    {"organism", "smollm2"},
    {"prompts"},
    {"model"},
    {"selection"},
    {"objective"},
    {"scoring"},
    {"evaluation"},
    {"patch"},
    {"training"},
    {"verification"},
    {"enhancement"},
    {"preservation"},
    {"resources"},
    {"analysis"},
    {"report"},
    {"demo"},
    {"cli"},
]
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def named_in(path: Path) -> set[str]:
    """Whatever a file imports, at its top or anywhere in it."""
    nodes = list(ast.walk(parsed(path)))
    named = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return named | {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}


@cache
def imports(path: Path) -> set[str]:
    """Rooms of safelocus that a file imports when it runs (not under TYPE_CHECKING)."""
    tree = parsed(path)
    skipped = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.dump(block.test)
        for node in ast.walk(block)
    }
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and id(node) not in skipped and (node.module or "").startswith("safelocus"):
            parts = (node.module or "").split(".")
            found |= {parts[1]} if len(parts) > 1 else {a.name for a in node.names if a.name in RANK}
    return found


def test_every_room_is_in_the_pipeline():
    rooms = {path.stem for path in SOURCE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert rooms - {"__init__", "__main__"} == set(RANK)


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_point_backwards(path):
    room = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    if room in ("__init__", "__main__"):
        return
    later = {name for name in imports(path) if RANK[name] > RANK[room]}  # neighbours may use one another
    assert not later, f"{room} imports {later}, which come after it"


def test_no_two_modules_import_each_other_not_even_for_their_types():
    files = {".".join(path.relative_to(SOURCE.parent).with_suffix("").parts): path for path in SOURCE.rglob("*.py")}
    modules = {name.removesuffix(".__init__"): path for name, path in files.items()}
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        nodes = [node for node in ast.walk(parsed(path)) if isinstance(node, ast.ImportFrom)]
        named = [(node.module or "", f"{node.module}.{alias.name}") for node in nodes for alias in node.names]
        graph[name] = {member if member in modules else module for module, member in named} & modules.keys() - {name}
    graph["safelocus"] = set()  # exports everything, late
    TopologicalSorter(graph).prepare()  # CycleError names the circle


def test_analysis_knows_nothing_of_how_it_is_shown():
    for path in (SOURCE / "analysis").glob("*.py"):
        named = {name.partition(".")[0] for name in named_in(path)}
        assert not named & {"rich", "jinja2", "markupsafe", "html"}, path


def test_pictures_need_no_chart_library():
    for path in SOURCE.rglob("*.py"):
        assert not {name.partition(".")[0] for name in named_in(path)} & {"matplotlib", "plotly"}, path


@pytest.mark.parametrize("room", ["verification", "enhancement", "preservation"])
def test_the_three_uses_of_a_selection_know_nothing_of_one_another(room):
    others = {"verification", "enhancement", "preservation"} - {room}
    for path in (SOURCE / room).rglob("*.py"):
        assert not imports(path) & others, path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rooms", "libraries"),
    [
        ("cli", "torch transformers"),
        ("scoring.run verification evaluation resources analysis.acceptance report.page", "trl peft datasets"),
    ],
    ids=["the command line without torch", "what does not train without the trainer's libraries"],
)
def test_starts_quickly(rooms, libraries):
    imported = "; ".join(f"import safelocus.{room}" for room in rooms.split())
    code = f"import sys; {imported}; print(sorted({{*{libraries.split()}}} & {{*sys.modules}}))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"


def test_exports_exist_and_are_documented():
    for name in safelocus.__all__:
        found = getattr(safelocus, name)
        assert found.__module__.startswith("safelocus."), name
        assert found.__doc__, name
        assert not found.__doc__.startswith(f"{name}("), f"{name} has no words but those that dataclass writes"


def test_nothing_here_loads_pickles():
    for path in SOURCE.rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        assert "torch.load(" not in source, path
        assert "import pickle" not in source, path


def test_names_are_told_apart_and_functions_fit_a_screen():
    """No two public classes of one name, no function of over 80 lines besides its docstring."""
    places: dict[str, list[str]] = {}
    long = []
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(str(path.relative_to(SOURCE)))
            if isinstance(node, ast.FunctionDef):
                said = len((ast.get_docstring(node, clean=False) or "").splitlines())
                if (node.end_lineno or 0) - node.lineno + 1 - said > 80:
                    long.append(f"{path.relative_to(SOURCE)}: {node.name}")
    assert {name: where for name, where in places.items() if len(where) > 1} == {}
    assert long == []
