"""One thread per test process (the tensors are tiny, and they share the cores), one width, and the command line."""

import gc
import itertools
import os
import pkgutil
import signal
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["COLUMNS"] = "120"  # consoles take the width that they find when they are made

import pytest

from safelocus.cli import main
from safelocus.resources.rehearsal import Rehearsal, Subject

# a shell that runs tests in the background has them, and whatever they start, ignore Ctrl-C
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module", autouse=True)
def unrehearsed(request):
    """Whatever a command is asked for fits; modules with REHEARSES rehearse what passes need."""
    with pytest.MonkeyPatch.context() as patched:
        if not getattr(request.module, "REHEARSES", False):
            patched.setattr(Subject, "rehearse", lambda *_, **__: Rehearsal(peak=1 << 20, operations=1 << 20))
            patched.setattr(Subject, "cache", lambda *_: 1 << 10)
        yield


def pytest_runtest_setup():
    """What is imported stays: every training collects garbage, and need not search through modules for it."""
    if len(sys.modules) > pytest_runtest_setup.imported + 100:
        pytest_runtest_setup.imported = len(sys.modules)
        gc.collect()
        gc.freeze()


pytest_runtest_setup.imported = 0


@pytest.fixture
def run(capsys):
    """Run a command; returns (exit code, standard output, error stream with white space collapsed)."""

    def run(*arguments):
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return stop.value.code or 0, out, " ".join(err.split())

    return run


@pytest.fixture
def scripts(monkeypatch):
    """Makes the modules of a folder of scripts importable, for one test: other folders have some of their names."""
    names, kept = set(), {}

    def here():
        return [name for name in sys.modules if name.partition(".")[0] in names]

    def importable(folder):
        names.update(path.stem for path in folder.glob("[!_]*"))
        kept.update({name: sys.modules.pop(name) for name in here()})
        monkeypatch.syspath_prepend(folder)

    yield importable
    for name in here():
        del sys.modules[name]
    sys.modules.update(kept)


@pytest.fixture
def interrupt(run, monkeypatch):
    """Run a command, and press Ctrl-C in this very process when the function at `place` is called the n-th time."""

    def interrupt(place, *arguments, at):
        function, calls = pkgutil.resolve_name(place), itertools.count(1)

        def pressed(*given, **options):
            if next(calls) == at:
                signal.raise_signal(signal.SIGINT)
            return function(*given, **options)

        with monkeypatch.context() as patched:
            patched.setattr(place, pressed)
            code, _, err = run(*arguments)
        assert code == 130, err
        assert "interrupted" in err

    return interrupt
