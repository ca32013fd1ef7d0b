"""Training rows: prompts with responses become token ids, with the loss on the response alone.

    {"input_ids": [...], "labels": [-100, ..., response ids, end of turn]}

The chat format is the target's own, the one it is scored and evaluated with.
"""

from typing import TYPE_CHECKING

from safelocus.chat import ChatFormat
from safelocus.errors import PromptError
from safelocus.prompts import PromptSet

if TYPE_CHECKING:
    from datasets import Dataset

IGNORED = -100  # the label of tokens that carry no loss, for transformers


def training_rows(prompts: PromptSet, chat: ChatFormat, *, max_length: int = 1024) -> "Dataset":
    """One row per prompt that has a response.

    Args:
        max_length: responses are cut there; a row whose prompt leaves no room for a response is left out.

    Raises:
        PromptError: no prompt has a response, or none fits.
    """
    from datasets import Dataset

    rows = []
    answered = prompts.with_responses()
    for example in answered:
        assert example.response is not None
        prompt, response = chat.encode_pair(
            example.prompt, example.response, system=example.system, end=example.complete
        )
        ids = [*prompt, *response][:max_length]
        if len(prompt) < max_length:
            rows.append({"input_ids": ids, "labels": [IGNORED] * len(prompt) + ids[len(prompt) :]})
    if not rows:
        raise PromptError(
            f"{prompts.source}: all {len(answered)} prompts are longer than {max_length} tokens; "
            "raise the maximum length"
        )
    return Dataset.from_list(rows)
