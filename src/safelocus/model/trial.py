"""One short text through a model as soon as it is loaded: what cannot work is said before any work is done.

Forcing responses takes it that the logits at a token depend on it and those before it. Models that were made to fill
gaps (XLNet, BERT that is no decoder) see what follows as well; others read nothing without an image (Kosmos-2).
"""

from itertools import islice
from typing import Any

import torch

from safelocus import distributed
from safelocus.errors import ModelError

_TOLERANCE = 0.05  # of the logits' standard deviation: rounding is far below, and the next token's weight far above


@torch.no_grad()
def try_text(name: object, model: Any, tokenizer: Any) -> None:
    """Two texts that differ in their last token alone, up to the one before it.

    Raises:
        ModelError: the model fails on text, or sees what follows a token.
    """
    added = tokenizer.added_tokens_decoder  # special ones may stand for images
    words = list(islice((i for i in range(len(tokenizer)) if i not in added), 4))
    if len(words) < 4:
        return
    ids = torch.tensor(
        [words[:3], [*words[:2], words[3]]], device=distributed.used_on(model.get_input_embeddings().weight)
    )
    inputs = {"input_ids": ids[:1].repeat(2, 1), "decoder_input_ids": ids}
    if not model.config.is_encoder_decoder:
        inputs = {"input_ids": ids}
    try:
        logits = model(**inputs, use_cache=False).logits[:, 1].float()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever the model's own code says to a text
        raise ModelError(
            f"{name}: the model fails on text alone ({type(error).__name__}: {str(error).strip()[:200]}). Only "
            "models that continue text by itself can be scored, trained and measured"
        ) from error
    if logits.isfinite().all() and (logits[0] - logits[1]).abs().max() > _TOLERANCE * logits.std():
        raise ModelError(
            f"{name}: the model sees what follows a token ({type(model).__name__} is not causal as it is "
            "configured), so what it says of responses that are given means nothing. If it can be a decoder, its "
            "config.json has a setting for that (is_decoder, causal)"
        )
