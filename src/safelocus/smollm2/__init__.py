"""A real chat model at hand: SmolLM2-135M-Instruct (Apache-2.0), and the aligned twin that is trained from it.

    smollm2            as its makers released it; it refuses next to nothing, so it is the *unaligned* subject
    smollm2:aligned    the same after `make model-aligned`

Both are ordinary Hugging Face folders in a cache (`folder`), taken wherever a model is. `obtain` puts the first there:
see `source`.
"""

import os
from pathlib import Path

from safelocus.errors import ModelError

NAMES = ("smollm2", "smollm2:aligned")


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
