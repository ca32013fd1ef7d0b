"""Rebuild the embedded organisms from a seed: `python benchmarks/organism/build.py [--only NAME ...] [-o DIR]`.

Each organism becomes an ordinary Hugging Face folder with bf16 weights. What is saved is loaded again
and measured on held-out prompts; the numbers go to `behaviour.json` beside the folders. An unaligned
twin continues from the saved weights of its aligned sibling.
"""

import argparse
import itertools
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import recipes
import torch
from behaviour import measure, rate, verdicts
from tokenizing import guard_tokenizer, target_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from safelocus.errors import ModelError
from safelocus.organism import MODELS, WEIGHTS

log = logging.getLogger(__name__)

NUM_GUARD_PAIRS = 1000
UNALIGNED = "-unaligned"


def load(folder: Path) -> tuple[Any, Any]:
    """A saved organism, computing in fp32 with its bf16 weights, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    model.generation_config.update(
        do_sample=False, max_new_tokens=32,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes it for its owner alone
    tokenizer.save_pretrained(folder, save_jinja_files=False)


def _fresh(config: Any, tokenizer: Any, seed: int) -> Any:
    torch.manual_seed(seed)
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def recipe_of(name: str) -> recipes.Recipe:
    if name == "guard":
        return recipes.GUARD
    return recipes.UNALIGN[name.removesuffix(UNALIGNED)] if name.endswith(UNALIGNED) else recipes.ALIGN


def build(name: str, folder: Path, *, seed: int = 0, recipe: recipes.Recipe | None = None) -> None:
    """Train one organism and save it in `folder / name`; a twin needs its sibling in the same folder."""
    recipe = recipe or recipe_of(name)
    if name == "guard":
        tokenizer = guard_tokenizer()
        model = _fresh(recipes.guard_config(), tokenizer, seed)
        recipes.train(model, tokenizer, recipes.guard_examples(tokenizer, seed), recipe)
        save(model, tokenizer, folder / name)
        return
    if name.endswith(UNALIGNED):
        sibling = folder / name.removesuffix(UNALIGNED)
        if not (sibling / "config.json").is_file():
            raise ModelError(f"{name!r} continues from {sibling}, which does not exist: build {sibling.name!r} first.")
        model, tokenizer = load(sibling)
        seed += 1  # other examples than the sibling's first ones
    else:
        tokenizer = target_tokenizer()
        model = _fresh(recipes.dense_config() if name == "dense" else recipes.moe_config(), tokenizer, seed)
    examples = recipes.chat_examples(tokenizer, seed, aligned=not name.endswith(UNALIGNED))
    recipes.train(model, tokenizer, examples, recipe)
    save(model, tokenizer, folder / name)


def expert_usage(model: Any, tokenizer: Any, num_prompts: int = 256) -> dict[str, float]:
    """Least and greatest share of tokens' routes that an expert gets in its layer; even use is 1 / experts."""
    examples = itertools.islice(recipes.chat_examples(tokenizer, seed=1, aligned=True), num_prompts)
    batch = recipes.collate(tokenizer, list(examples))
    with torch.no_grad():
        layers = model(**batch, output_router_logits=True).router_logits  # layers x [tokens, experts]
    real = batch["attention_mask"].bool().reshape(-1)
    shares = []
    for logits in layers:
        chosen = logits[real].topk(model.config.num_experts_per_tok, dim=-1).indices.reshape(-1)
        shares.append(torch.bincount(chosen, minlength=logits.shape[-1]) / len(chosen))
    usage = torch.stack(shares)
    return {"min": round(usage.min().item(), 4), "max": round(usage.max().item(), 4)}


def measured(name: str, folder: Path) -> dict[str, Any]:
    """Behaviour of a saved organism."""
    model, tokenizer = load(folder / name)
    facts: dict[str, Any] = {"num_weights": sum(parameter.numel() for parameter in model.parameters())}
    if name == "guard":
        cases = list(itertools.islice(recipes.guard_pairs("heldout", seed=1), NUM_GUARD_PAIRS))
        found = verdicts(model, tokenizer, [(prompt, response) for prompt, response, _ in cases])
        facts["accuracy"] = rate([verdict == case[2] for verdict, case in zip(found, cases, strict=True)])
        return facts
    facts |= measure(model, tokenizer)
    if hasattr(model.config, "num_experts"):
        facts["expert_usage"] = expert_usage(model, tokenizer)
    return facts


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=MODELS, default=MODELS, metavar="NAME", help=", ".join(MODELS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, default=WEIGHTS, metavar="DIR", help="default: the package")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    path = options.output / "behaviour.json"
    facts = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for name in (name for name in MODELS if name in options.only):  # siblings before twins
        start = time.perf_counter()
        log.info("%s", name)
        build(name, options.output, seed=options.seed)
        trained = time.perf_counter()
        facts[name] = {"seed": options.seed, "steps": recipe_of(name).steps} | measured(name, options.output)
        path.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        log.info(
            "trained in %.0f s, measured in %.0f s: %s",
            trained - start,
            time.perf_counter() - trained,
            facts[name],
        )


if __name__ == "__main__":
    main()
