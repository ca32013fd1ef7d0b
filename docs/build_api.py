"""Writes docs/api.md: every name that `safelocus` exports, in pipeline order, from its own source and docstring.

    python docs/build_api.py     (or: make docs)

Signatures are read from the source as they were written, not from evaluated annotations: those print differently in
every version of Python. `tests/test_api_docs.py` compares the committed page with what this makes.
"""

import ast
import inspect
import re
import textwrap
from pathlib import Path
from typing import Any, TypeGuard

import safelocus as sl

PAGE = Path(__file__).parent / "api.md"
WIDTH = 110
HEAD = """# API

What `import safelocus as sl` offers, in pipeline order. This page is built from the docstrings by `make docs`; change
those, not this. The commands do the same from a shell (`safelocus COMMAND --help`).

"""
_SECTIONS = ("Args", "Attributes", "Returns", "Raises", "Example")


def page() -> str:
    """The whole text of docs/api.md."""
    links: list[str] = []
    seen: list[str] = []
    for name in sl.__all__:  # as GitHub makes anchors: in lower case, numbered where two headings are alike
        anchor = name.lower()
        links.append(f"[{name}](#{anchor}{f'-{seen.count(anchor)}' if anchor in seen else ''})")
        seen.append(anchor)
    return HEAD + " ·\n".join(links) + "\n\n" + "\n\n".join(entry(name) for name in sl.__all__) + "\n"


def entry(name: str) -> str:
    """One exported name: heading, signature, docstring, and the members of a class."""
    thing = getattr(sl, name)
    node = definition(thing)
    parts = [f"## {name}", fence(signature(name, node, thing)), document(node)]
    if isinstance(node, ast.ClassDef):
        found = {part.name: member(part) for base in bases(thing) for part in definition(base).body if is_public(part)}
        members = list(found.values())
        parts += ["Members:", "\n".join(members).rstrip()] if members else []
    return "\n\n".join(part for part in parts if part)


def bases(thing: type) -> list[type]:
    """The dataclasses that it extends, and itself."""
    return [base for base in reversed(thing.__mro__) if base is thing or "__dataclass_fields__" in vars(base)]


def definition(thing: Any) -> ast.ClassDef | ast.FunctionDef:
    [node] = ast.parse(textwrap.dedent(inspect.getsource(thing))).body
    assert isinstance(node, ast.ClassDef | ast.FunctionDef)
    return node


def is_public(node: ast.stmt) -> TypeGuard[ast.FunctionDef]:
    """Without an underscore; of the special methods those that are described."""
    if not isinstance(node, ast.FunctionDef):
        return False
    special = node.name.startswith("__") and node.name != "__init__"
    return not node.name.startswith("_") or (special and ast.get_docstring(node) is not None)


def member(node: ast.FunctionDef) -> str:
    """A method or property as an item of a list."""
    kinds = {ast.unparse(decorator).rpartition(".")[2] for decorator in node.decorator_list}
    if kinds & {"property", "cached_property"}:
        head = f"- `{node.name}: {annotation(node.returns)}`"
    else:
        note = " (class method)" if "classmethod" in kinds else ""
        head = f"- `{signature(node.name, node, width=10_000)}`{note}"
    text = document(node)
    return head if not text else f"{head}\n\n{textwrap.indent(text, '  ')}\n"


def signature(name: str, node: ast.ClassDef | ast.FunctionDef, thing: Any = None, width: int = WIDTH) -> str:
    """`name(parameters) -> result`, on one line if that fits, else one parameter a line."""
    if isinstance(node, ast.ClassDef):
        parameters, result = constructor(node, thing), ""
    else:
        parameters, result = arguments(node), f" -> {annotation(node.returns)}"
    line = f"{name}({', '.join(parameters)}){result}"
    if len(line) <= width:
        return line
    return f"{name}(\n" + "".join(f"    {parameter},\n" for parameter in parameters) + f"){result}"


def annotation(node: ast.expr | None) -> str:
    """A type as written, without the quotes of a forward reference."""
    return str(node.value) if isinstance(node, ast.Constant) else ast.unparse(node) if node else "Any"


def constructor(node: ast.ClassDef, thing: type) -> list[str]:
    """What makes an object: the fields of a dataclass and of those it extends, or the arguments of `__init__`."""
    if "__dataclass_fields__" not in vars(thing):
        made = (part for part in node.body if isinstance(part, ast.FunctionDef) and part.name == "__init__")
        return next((arguments(part) for part in made), [])
    fields: dict[str, str] = {}
    for base in bases(thing):
        given = [part for part in definition(base).body if isinstance(part, ast.AnnAssign)]
        fields.update((ast.unparse(part.target), field(part)) for part in given)
    return ["*", *(text for name, text in fields.items() if not name.startswith("_"))]


def field(node: ast.AnnAssign) -> str:
    """A field as an argument; its default is what `field(default=...)` or `field(default_factory=...)` says."""
    if not (isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == "field"):
        return ast.unparse(node)
    said = {keyword.arg: ast.unparse(keyword.value) for keyword in node.value.keywords}
    if "default_factory" in said:
        said["default"] = f"{said['default_factory']}()"
    default = f" = {said['default']}" if "default" in said else ""
    return f"{ast.unparse(node.target)}: {annotation(node.annotation)}{default}"


def arguments(node: ast.FunctionDef) -> list[str]:
    """The parameters as written, without `self` and `cls`, the bare star among them."""
    given = node.args
    positional = [*given.posonlyargs, *given.args]
    defaults = [None] * (len(positional) - len(given.defaults)) + list(given.defaults)
    parts = [parameter(*pair) for pair in zip(positional, defaults, strict=True) if pair[0].arg not in ("self", "cls")]
    if given.vararg:
        parts.append(f"*{parameter(given.vararg)}")
    elif given.kwonlyargs:
        parts.append("*")
    parts += [parameter(*pair) for pair in zip(given.kwonlyargs, given.kw_defaults, strict=True)]
    return [*parts, f"**{parameter(given.kwarg)}"] if given.kwarg else parts


def parameter(node: ast.arg, default: ast.expr | None = None) -> str:
    equals = " = " if node.annotation else "="
    return ast.unparse(node) + (equals + ast.unparse(default) if default else "")


def document(node: ast.ClassDef | ast.FunctionDef) -> str:
    """A docstring as markdown: its sections as lists, its examples as code."""
    blocks = re.split(rf"^({'|'.join(_SECTIONS)}):\n", ast.get_docstring(node) or "", flags=re.MULTILINE)
    parts = [prose(blocks[0])]
    for title, body in zip(blocks[1::2], blocks[2::2], strict=True):
        indented = re.match(r"(?:[ ].*\n?|\n)*", body)
        inside = textwrap.dedent(indented.group()).strip("\n") if indented else ""
        after = body[len(indented.group()) :] if indented else body
        text = inside if title == "Example" else items(inside)
        parts += [f"{title}:", prose(text) if title == "Example" else text, prose(after)]
    return "\n\n".join(part for part in parts if part)


def items(text: str) -> str:
    """`name: what it is`, with further lines indented, as a list."""
    found = re.split(r"\n(?=\S)", text)
    named = [re.match(r"([\w*, `]+): (.*)", item, re.DOTALL) for item in found]
    if not all(named):
        return prose(text)
    return "\n".join(f"- `{match[1]}`: {' '.join(match[2].split())}" for match in named if match)


def prose(text: str) -> str:
    """Paragraphs as they are; runs of `>>>` in a fence."""
    parts = [part.strip("\n") for part in re.split(r"\n\s*\n", text) if part.strip()]
    return "\n\n".join(example(part) for part in parts)


def example(paragraph: str) -> str:
    before, prompt, after = paragraph.partition(">>> ")
    if not prompt:
        return paragraph
    code = re.sub(r"\s*# doctest: \+\w+", "", prompt + after)
    return "\n\n".join(part for part in (before.strip(), fence(code)) if part)


def fence(code: str) -> str:
    return f"```py\n{textwrap.dedent(code)}\n```"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
