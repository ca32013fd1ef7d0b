"""Embedded organisms: tiny trained chat models and data whose safety behaviour is known and measurable.

They are addressed like any other model or data, with the prefix `organism:` that callers strip:
`organism:dense`, `organism:moe`, their `-unaligned` twins and `organism:guard` are ordinary Hugging
Face folders inside the package; `organism:harmful` and the other rows are chat data of the same
world. `make organism` (`benchmarks/organism/`) rebuilds the models from their seed.
"""

from pathlib import Path

from safelocus.errors import ModelError, PromptError
from safelocus.organism import world

WEIGHTS = Path(__file__).parent / "weights"
MODELS = ("dense", "dense-unaligned", "moe", "moe-unaligned", "guard")
ROWS = tuple(world.ROWS)


def resolve_model(name: str) -> Path:
    """Folder of an organism, to be loaded like any local Hugging Face model.

    >>> resolve_model("dense").name
    'dense'
    """
    if name not in MODELS:
        raise ModelError(f"There is no organism {name!r}. There are: {', '.join(MODELS)}.")
    folder = WEIGHTS / name
    if not (folder / "model.safetensors").is_file():
        raise ModelError(
            f"The organism {name!r} has no weights: expected {folder / 'model.safetensors'}, found none. "
            "Reinstall the package, or rebuild them in a clone with `make organism`."
        )
    return folder


def rows(name: str) -> list[dict[str, str]]:
    """Chat data of the organisms' world: dicts with `prompt`, `response`, `category` and `task`.

    >>> rows("harmful")[0]["task"]
    'request'
    """
    if name not in world.ROWS:
        raise PromptError(f"The organism has no data {name!r}. There are: {', '.join(ROWS)}.")
    return world.ROWS[name]()
