"""Processes for tests: a group of them in one go, torchrun as a user would, and models that are shared in rows."""

import os
import subprocess
import sys
from multiprocessing import set_forkserver_preload

import torch
import torch.distributed as dist
import torch.multiprocessing

from safelocus import distributed
from safelocus.target import Target
from tiny_targets import dense

PRELOADED = [
    "safelocus.enhancement.enhancing",
    "safelocus.preservation.preserving",
    "safelocus.scoring",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen3_moe.modeling_qwen3_moe",
]


def odd():
    """Tied embeddings, and rows that neither two nor three processes can share evenly."""
    return dense(tie_word_embeddings=True, intermediate_size=49, hidden_size=40, num_key_value_heads=1, head_dim=6)


def sharded(target):
    """The same target, spread over the processes."""
    from torch.distributed.fsdp import fully_shard

    for layer in target.model.model.layers:
        fully_shard(layer)
    fully_shard(target.model)
    return Target.of(target.model, target.tokenizer, name=target.name)


def together(num_processes, function, folder, *arguments):
    """Run `function(folder, *arguments)` in every process of a group; they start as copies of one that has imported."""
    set_forkserver_preload(PRELOADED)
    torch.multiprocessing.start_processes(
        _join, (num_processes, function, folder, arguments), nprocs=num_processes, start_method="forkserver"
    )


def _join(rank, num_processes, function, folder, arguments):
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=num_processes)
    function(folder, *arguments)
    distributed.barrier()
    dist.destroy_process_group()


def launch(num_processes, *arguments):
    """torchrun, as a user would; returns what it left."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, env=environment, timeout=240, check=False
    )
