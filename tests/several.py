"""Processes for tests: a group of them in one go, torchrun as a user would, and models that are shared in rows."""

import gc
import os
import socket
import subprocess
import sys
import time
from multiprocessing import set_forkserver_preload
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing

from safelocus import distributed
from safelocus.cli import main
from safelocus.model.target import Target
from tiny_targets import dense

STREAMS = ("out", "err")
# the server that copies are made of has no sys.path of ours
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))


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


def copies():
    """A context of multiprocessing whose processes start as copies of one that has imported."""
    set_forkserver_preload(["imported"])
    return torch.multiprocessing.get_context("forkserver")


def together(num_processes, function, folder, *arguments):
    """Run `function(folder, *arguments)` in every process of a group; they start as copies of one that has imported."""
    copies()
    torch.multiprocessing.start_processes(
        _join, (num_processes, function, folder, arguments), nprocs=num_processes, start_method="forkserver"
    )


def _join(rank, num_processes, function, folder, arguments):
    torch.set_num_threads(1)
    gc.freeze()
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=num_processes)
    function(folder, *arguments)
    distributed.barrier()
    dist.destroy_process_group()


def command(num_processes, folder, *arguments, first=None):
    """A command of safelocus in a group of processes, as `torchrun -m safelocus` runs it, but imported already.

    Each process calls `first`, if given, before the command. Returns (exit codes, standard outputs, error streams), in
    the order of the processes.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    context = copies()
    given = (num_processes, port, str(folder), [str(argument) for argument in arguments], first)
    processes = [context.Process(target=_launched, args=(rank, *given)) for rank in range(num_processes)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + 240
    while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
        if any(process.exitcode for process in processes):  # one has failed: torchrun ends the others
            for process in processes:
                process.terminate()
        time.sleep(0.02)
    for process in processes:
        process.join(30)
    out, err = ([Path(folder, f"{stream}.{rank}").read_text() for rank in range(num_processes)] for stream in STREAMS)
    return [process.exitcode for process in processes], out, err


def _launched(rank, num_processes, port, folder, arguments, first):
    torch.set_num_threads(1)
    gc.freeze()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_processes)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    for number, stream in enumerate(STREAMS, start=1):
        with Path(folder, f"{stream}.{rank}").open("w") as file:
            os.dup2(file.fileno(), number)
    if first is not None:
        first()
    main(arguments)


def launch(num_processes, *arguments):
    """torchrun, as a user would; returns what it left."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, env=environment, timeout=240, check=False
    )
