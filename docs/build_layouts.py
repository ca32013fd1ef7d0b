"""Write the table of docs/layouts.md: what is understood of each model type that transformers can generate text with.

python docs/build_layouts.py            # about a minute: every type's default configuration, built without weights
python docs/build_layouts.py --check    # exit code 1 where the table is not what this would write, or anything failed
"""

import re
import sys
import warnings
from pathlib import Path

PAGE = Path(__file__).parent / "layouts.md"
BEGIN, END = "<!-- table of model types, by docs/build_layouts.py -->\n", "<!-- end of the table -->"


def understood(model_type: str) -> tuple[str, str]:
    """(verdict, why): "understood" and the family, "refused" and what is not known, or "failed": never expected."""
    from transformers import AutoConfig

    from safelocus.errors import LayoutError
    from safelocus.model.layout import Layout

    try:
        config = AutoConfig.for_model(model_type)
    except Exception as error:  # noqa: BLE001 (whatever the class itself says to no settings at all)
        return "refused", f"no default configuration ({type(error).__name__})"
    try:
        layout = Layout.from_config(config)
    except LayoutError as error:
        return "refused", _why(str(error))
    except Exception as error:  # noqa: BLE001 (what must not happen is told as such)
        return "failed", f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return "understood", f"{layout.family}, {layout.num_eligible / layout.num_weights:.0%} eligible"


def _why(message: str) -> str:
    if "transformers cannot build" in message:
        return f"its class fails on its default configuration ({message.split(': ')[1]})"
    if "describes no model" in message:
        return "no class that generates text from text"
    if found := re.match(r"(\d+) of (\d+) tensors", message):
        return f"{found[1]} of {found[2]} tensors unknown"
    return "names or shapes that mean something else: " + message.split(":")[0]


def model_types() -> dict[str, str]:
    """Type -> "text" or "image and text"."""
    from transformers.models.auto import modeling_auto

    text = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    image = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return {**dict.fromkeys(image, "image and text"), **dict.fromkeys(text, "text")}


def table() -> tuple[str, int]:
    """The table, and how many types failed."""
    import transformers

    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    kinds = model_types()
    found = {model_type: understood(model_type) for model_type in sorted(kinds)}
    number = sum(verdict == "understood" for verdict, _ in found.values())
    outside = sum("its class fails" in why or "no class" in why or "no default" in why for _, why in found.values())
    failed = sum(verdict == "failed" for verdict, _ in found.values())
    rows = [f"| `{name}` | {kinds[name]} | {verdict} | {why} |" for name, (verdict, why) in found.items()]
    head = (
        f"transformers {transformers.__version__}: {number} of {len(found)} model types understood, "
        f"{len(found) - number - failed} refused ({outside} because transformers itself builds no such model by "
        f"default, or none that writes text), {failed} failed.\n\n| type | reads | | |\n|---|---|---|---|\n"
    )
    return head + "\n".join(rows) + "\n", failed


def page(written: str) -> str:
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    return before + BEGIN + written + END + rest.partition(END)[2]


if __name__ == "__main__":
    rows, number_failed = table()
    if "--check" in sys.argv:
        sys.exit(bool(number_failed) or page(rows) != PAGE.read_text(encoding="utf-8"))
    PAGE.write_text(page(rows), encoding="utf-8")
