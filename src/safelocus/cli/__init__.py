"""The command line: names and paths in, artefacts and tables out. The only place that parses either.

Nothing heavy is imported here or at the top of a command's module: `--help` must not wait for torch.

Exit codes: 0 done; 1 done, but a requirement (`--require`) is not met, or `check` found a file that is not as it was
written, or else a bug in safelocus, which says so; 2 bad usage or bad input; 130 interrupted by Ctrl-C.
"""

import os
import sys
import traceback
from collections.abc import Sequence
from errno import EACCES, EDQUOT, EFBIG, EIO, ENOSPC, EPERM, EROFS

import typer

from safelocus.cli import (
    check,
    compare,
    demo,
    enhance,
    evaluate,
    inspect,
    patch,
    plan,
    preserve,
    report,
    score,
    select,
    stability,
    verify,
)
from safelocus.cli.output import complain, cut, errors
from safelocus.errors import RunError, SafelocusError, first_line

_INTERRUPTED = 130
_IN_SEVERAL_PROCESSES = ("score", "evaluate", "verify", "enhance", "preserve")

app = typer.Typer(
    name="safelocus",
    help="Find the weights that carry a language model's safety, and act on exactly those.",
    epilog="Any command: --debug shows the traceback of an error.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _options(
    context: typer.Context, version: bool = typer.Option(False, "--version", help="Print the version and exit.")
) -> None:
    if version:
        from safelocus import __version__

        typer.echo(__version__)
        raise typer.Exit
    num_processes = os.environ.get("WORLD_SIZE", "1")
    for_help = {"-h", "--help"} & set(context.obj or ())
    if num_processes != "1" and not for_help and context.invoked_subcommand not in (None, *_IN_SEVERAL_PROCESSES):
        raise RunError(
            f"`safelocus {context.invoked_subcommand}` runs in one process, and {num_processes} were launched; "
            f"start it without torchrun. In several run: {', '.join(_IN_SEVERAL_PROCESSES)}"
        )


# in pipeline order
app.command()(inspect.inspect)
app.command()(plan.plan)
app.command()(score.score)
app.command()(select.select)
app.command()(compare.compare)
app.command()(evaluate.evaluate)
app.command()(verify.verify)
app.command()(stability.stability)
app.command()(enhance.enhance)
app.command()(preserve.preserve)
app.add_typer(patch.app)
app.command()(report.report)
app.command()(check.check)
app.command()(demo.demo)


def _is_of_the_disk(error: Exception) -> bool:
    """Whether something could not be read or written, for no fault of the program."""
    if isinstance(error, OSError):
        return error.errno in (ENOSPC, EDQUOT, EROFS, EACCES, EPERM, EIO, EFBIG)
    return "PytorchStreamWriter" in str(error)  # torch tells no more


def _is_of_the_memory(error: Exception) -> bool:
    """Whether it ran out, on whichever device; by name, since torch may not be there yet."""
    said = str(error)
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "allocate memory" in said


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave with its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [argument for argument in given if argument != "--debug"]
    # quieter neighbours: warnings and bars of libraries would drown our own
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        code = app(given, standalone_mode=False, prog_name="safelocus", obj=given)
    except (typer.Abort, KeyboardInterrupt):
        code = _INTERRUPTED
    except SafelocusError as error:
        if debug:
            traceback.print_exc()
        complain(str(error))
        sys.exit(2)
    except Exception as error:  # noqa: BLE001 (last resort: one message instead of a traceback)
        usage = getattr(error, "format_message", None)
        if usage is not None:  # click's own errors: wrong options and arguments
            context = getattr(error, "ctx", None)
            if context is not None:
                errors.print(context.get_usage(), markup=False, highlight=False)
            complain(usage())
            sys.exit(getattr(error, "exit_code", 2))
        if debug:
            traceback.print_exc()
        if _is_of_the_disk(error):
            wanted = "the right to read or write it" if getattr(error, "errno", 0) in (EACCES, EPERM) else "space"
            complain(f"{error}. With {wanted}, the same command begins again or resumes the run")
            sys.exit(2)
        if _is_of_the_memory(error):
            complain(
                f"out of memory: {first_line(error)}. Try a smaller --batch-size; `safelocus plan` says what fits. The "
                "same command begins again or resumes the run"
            )
            sys.exit(2)
        errors.print("[bold red]unexpected error[/]:", end=" ")
        errors.print(cut(f"{type(error).__name__}: {error}"), markup=False, highlight=False, soft_wrap=True)
        errors.print("This is a bug in safelocus; run again with --debug for the traceback.")
        sys.exit(1)
    if code == _INTERRUPTED:  # typer turns Ctrl-C into this code, not into an exception
        errors.print("[bold]interrupted[/]: nothing half-written was left; the same command begins or resumes the run")
    sys.exit(code if isinstance(code, int) else 0)
