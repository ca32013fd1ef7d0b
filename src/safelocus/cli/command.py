"""A command from a frozen dataclass: its fields are the options, in help, in `--config` and in `run.toml`.

    @dataclass(frozen=True, kw_only=True)
    class Shorten(RunOptions):                     # bases are groups of options that commands share
        share: float = option("What to keep.", "-s", default=0.5, min=0, max=1)

    @command
    def shorten(given: Shorten) -> None:           # `safelocus shorten --share 0.3 -o DIR`; its docstring is the help
        shortened = library.shorten(target, **given.part(Shorten))

The name of a command is that of its function, and so is the name in `run.toml`.
"""

from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, field, fields
from functools import wraps
from inspect import Parameter, Signature, get_annotations, signature
from math import isfinite
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, ClassVar, TypeVar, get_args, get_type_hints

import typer

from safelocus.errors import RunError
from safelocus.inert import without_secrets
from safelocus.run.folder import read_config

_NOT_KEPT = {"output", "overwrite", "json", "config"}  # in run.toml: where the run goes, and how it is told


def option(help: str, *names: str, default: Any = MISSING, shown: str | bool = True, **how: Any) -> Any:
    """A field that is an option.

    Args:
        names: other ones than --that-of-the-field, or short ones beside it; "--" stands for it.
        default: without one it is None; where the type does not allow that, the option has to be given.
        shown: in help, in place of the default.
        how: see `typer.Option`.
    """
    how = {"kind": typer.Option, "names": names, "help": help, "show_default": shown, **how}
    return field(default=default, metadata=how)


def flag(help: str, name: str = "--") -> Any:
    """A field that is an option without a value, and false where it is not given.

    Where it may come from a run.toml, --no-that-field takes it back.
    """
    return option(help, name, default=False)


def argument(help: str) -> Any:
    """A field that is an argument."""
    return field(metadata={"kind": typer.Argument, "names": (), "help": help})


@dataclass(frozen=True, kw_only=True)
class Options:
    """What was given on the command line."""

    command_name: ClassVar[str]  # set by `command`

    def part(self, group: "type[Options]") -> dict[str, Any]:
        """The options of a group by name, as a function of the library takes them."""
        return {field.name: getattr(self, field.name) for field in fields(group)}


T = TypeVar("T", bound=Options)


def command(tell: Callable[[T], int | None]) -> Callable[..., None]:
    """A function of options as one that typer makes a command of."""
    (given,) = signature(tell).parameters.values()
    given.annotation.command_name = tell.__name__

    @wraps(tell)
    def run(**options: Any) -> None:
        tell(given.annotation(**{name: _checked(name, value) for name, value in options.items()}))

    run.__signature__ = Signature(_parameters(given.annotation))  # type: ignore[attr-defined]
    return run


def _parameters(kind: type[Options]) -> list[Parameter]:
    """Required ones first."""
    hints = get_type_hints(kind)
    kept = set(hints) - _NOT_KEPT if "config" in hints else set()
    found = [_parameter(field, hints[field.name], is_kept=field.name in kept, **how) for field, how in _in_order(kind)]
    return sorted(found, key=lambda parameter: parameter.default is not Parameter.empty)


def _in_order(kind: type[Options]) -> list[tuple[Field, dict[str, Any]]]:
    """Fields and how they are options: a command's own before those of its groups, each where it was declared first."""
    places, how = {}, dict[str, Any]()
    for depth, each in enumerate(kind.__mro__[:-1]):
        for place, name in enumerate(get_annotations(each)):
            places[name] = (depth, place)
            how[name] = how.get(name) or each.__dataclass_fields__[name].metadata  # type: ignore[attr-defined]
    return [(field, how[field.name]) for field in sorted(fields(kind), key=lambda field: places[field.name])]


def _checked(name: str, value: Any) -> Any:
    """A path with its ~ read, also where no shell was there to do that; RunError for NaN and infinity."""
    if isinstance(value, list):
        return [_checked(name, each) for each in value]
    if isinstance(value, float) and not isfinite(value):
        raise RunError(f"--{name.replace('_', '-')} {value}: expected a finite number")
    return value.expanduser() if isinstance(value, Path) else value


def _parameter(
    field: Field, hint: Any, *, kind: Callable[..., Any], names: tuple[str, ...], is_kept: bool, **how: Any
) -> Parameter:
    own = f"--{field.name.replace('_', '-')}"
    names = tuple(own if name == "--" else name for name in names)
    if names and not any(name.startswith("--") for name in names):
        names = (own, *names)
    if hint is bool and is_kept:
        names = tuple(f"{name}/--no-{name.removeprefix('--')}" for name in names)
    without = None if NoneType in get_args(hint) else Parameter.empty
    default = without if field.default is MISSING else field.default
    return Parameter(
        field.name, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[hint, kind(*names, **how)]
    )  # fmt: skip


def load_config(context: typer.Context, value: Path | None) -> Path | None:
    """Make the values of a run.toml the defaults of this command; options given beside it win."""
    if value is None:
        return None
    values = read_config(value)
    file = value / "run.toml" if value.is_dir() else value
    name = values.pop("command", context.info_name)
    if name != context.info_name:
        raise RunError(f"{file}: is the configuration of `safelocus {name}`, not of `{context.info_name}`")
    known = {parameter.name for parameter in context.command.params}
    if unknown := sorted(set(values) - known):
        raise RunError(f"{file}: unknown keys {', '.join(unknown)}; known are {', '.join(sorted(map(str, known)))}")
    context.default_map = values
    return value


@dataclass(frozen=True, kw_only=True)
class JsonOption(Options):
    json: bool = flag("Print one JSON document instead of tables.")


@dataclass(frozen=True, kw_only=True)
class ConfigOptions(JsonOption):
    config: Path | None = option(
        "Take options from a run.toml (or the run folder that holds one).", is_eager=True, callback=load_config
    )


@dataclass(frozen=True, kw_only=True)
class SeedOption(Options):
    seed: int = option("Seed of everything random.", default=0)


@dataclass(frozen=True, kw_only=True)
class RunOptions(SeedOption, ConfigOptions):
    output: Path = option("Folder to write the run into.", "-o")
    overwrite: bool = flag("Replace an earlier run in the output folder.")

    def resolved(self) -> dict[str, Any]:
        """What `run.toml` says: all but where it goes, and how it is told."""
        names = [field.name for field, _ in _in_order(type(self)) if field.name not in _NOT_KEPT]
        return {"command": self.command_name} | {name: _plain(name, getattr(self, name)) for name in names}


def _plain(name: str, value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(name, each) for each in value]
    if not isinstance(value, str | Path):
        return value
    return without_secrets(str(value)) if name.endswith("endpoint") else str(value)
