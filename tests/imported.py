"""What the processes of `several` start as copies of: all that they import, and the families of models."""

import torch.distributed.fsdp
import torch.distributed.tensor  # noqa: F401
import transformers.models.llama.modeling_llama
import transformers.models.qwen3_moe.modeling_qwen3_moe  # noqa: F401

import safelocus.enhancement.run
import safelocus.preservation.run
import safelocus.report.page
import safelocus.scoring.run  # noqa: F401
from safelocus.model.layout.rules import families

families()
