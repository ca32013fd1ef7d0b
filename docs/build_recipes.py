"""Write the table of docs/recipes.md: what `safelocus plan` says that each file of recipes/ takes.

python docs/build_recipes.py

Models are known here by their published sizes, so nothing is downloaded.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from io import StringIO
from pathlib import Path

PAGE, RECIPES = Path(__file__).parent / "recipes.md", Path(__file__).parents[1] / "recipes"
BEGIN, END = "<!-- planned, by docs/build_recipes.py -->\n", "<!-- end of the plan -->"
# by the beginning of a recipe's name
DEVICES = {
    "smollm2": "T4", "llama-3.1-8b": "H100", "qwen2.5-7b": "H100", "qwen3-30b-a3b": "4xH100", "mixtral-8x7b": "8xH100",
}  # fmt: skip

_LLAMA = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072,
}  # fmt: skip
_SMOLLM2 = {
    "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192, "tie_word_embeddings": True,
}  # fmt: skip
# hub name -> (weights, configuration), as published
MODELS = {
    "smollm2": (134_515_008, _SMOLLM2),
    "smollm2:aligned": (134_515_008, _SMOLLM2),
    "meta-llama/Llama-3.1-8B-Instruct": (8_030_261_248, _LLAMA),
    "meta-llama/Llama-Guard-3-8B": (8_030_261_248, _LLAMA),
    "Qwen/Qwen2.5-7B-Instruct": (7_615_616_512, {
        "model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
        "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 32768,
    }),
    "Qwen/Qwen3-30B-A3B": (30_532_122_624, {
        "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144,
        "moe_intermediate_size": 768, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4,
        "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True,
        "max_position_embeddings": 40960,
    }),
    "mistralai/Mixtral-8x7B-Instruct-v0.1": (46_702_792_704, {
        "model_type": "mixtral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8,
        "num_experts_per_tok": 2, "max_position_embeddings": 32768,
    }),
}  # fmt: skip


def recipes() -> list[Path]:
    """Model by model, in the order of `DEVICES`."""
    models = list(DEVICES)
    return sorted(RECIPES.glob("*.toml"), key=lambda file: (models.index(model_of(file)), file.stem))


def model_of(recipe: Path) -> str:
    return next(model for model in DEVICES if recipe.stem.startswith(f"{model}-"))


@contextmanager
def stand_ins() -> Iterator[Path]:
    """Within: the current folder, where each name is a model's folder without weights (tokenizers are borrowed)."""
    from safelocus import organism

    before, tokenizer = Path.cwd(), Path(organism.resolve_model("dense"))
    with tempfile.TemporaryDirectory() as folder:
        for name, (_, config) in MODELS.items():
            (at := Path(folder, name)).mkdir(parents=True)
            plain = {"tie_word_embeddings": False, "dtype": "bfloat16", **config}
            (at / "config.json").write_text(json.dumps(plain), encoding="utf-8")
            for file in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(tokenizer / file, at)
        os.chdir(folder)
        try:
            yield Path(folder)
        finally:
            os.chdir(before)


def planned(recipe: Path) -> dict[str, object]:
    """What `plan` says of the recipe's stage, on the device of the table; in the folder of `stand_ins`."""
    from safelocus import cli

    command = ["plan", "--config", str(recipe), "--device", DEVICES[model_of(recipe)], "--json"]
    with redirect_stdout(StringIO()) as out, suppress(SystemExit):
        cli.main(command)
    ((_, stage),) = json.loads(out.getvalue())["stages"].items()
    return stage


def row(recipe: Path, stage: dict[str, object]) -> str:
    from safelocus.resources import in_bytes, in_words

    assert stage["fits"], f"{recipe}: {stage['problem']}"
    cells = [
        f"`{recipe.stem}`", DEVICES[model_of(recipe)], in_bytes(stage["bytes"]),
        in_bytes(stage["host"]) if stage["host"] else "", stage["placement"], str(stage["batch_size"]),
        in_words(stage["seconds"]),
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |\n"


def main() -> None:
    head = (
        "| recipe | planned on | bytes on each | on the CPU | placement | rows at a time | time |\n"
        "|---|---|---:|---:|---|---:|---:|\n"
    )
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    with stand_ins():
        rows = [row(recipe, planned(recipe)) for recipe in recipes()]
    PAGE.write_text(f"{before}{BEGIN}{head}{''.join(rows)}{rest[rest.index(END) :]}", encoding="utf-8")


if __name__ == "__main__":
    main()
