"""The class of transformers that makes a model, of those that its own tables name for a configuration.

Text models first; a vision-language model that is not among them is loaded whole, and used with text alone.
"""

from typing import Any


def auto_class(config: Any) -> Any:
    """`AutoModelForCausalLM` or another; None where transformers names none that generates text.

    Example:
        >>> from transformers import AutoConfig
        >>> auto_class(AutoConfig.for_model("qwen2_5_vl")).__name__
        'AutoModelForImageTextToText'
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM

    if getattr(config, "is_encoder_decoder", False):
        return AutoModelForSeq2SeqLM if type(config) in AutoModelForSeq2SeqLM._model_mapping else None
    autos = (AutoModelForCausalLM, AutoModelForImageTextToText)
    return next((auto for auto in autos if type(config) in auto._model_mapping), None)
