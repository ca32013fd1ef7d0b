"""Files that were changed: carelessly, so that their digests show it, or with the digests that belong to the change."""

import json

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from safelocus.run.tensors import own_digest


def rewrite(path, change_header=None, change_tensors=None):
    """Change what a selection or patch says, and give it the digest that belongs to that."""
    with safe_open(path, framework="pt") as file:
        ((kind, text),) = file.metadata().items()
    header, tensors = json.loads(text), load_file(path)
    if change_header:
        change_header(header)
    if change_tensors:
        change_tensors(tensors)
    header["xxh3_128"] = "0" * 32
    save_file(tensors, path, metadata={kind: json.dumps(header)})
    digest = own_digest(path)
    raw = bytearray(path.read_bytes())
    raw[digest.place : digest.place + 32] = digest.found.encode()
    path.write_bytes(raw)


def flip(path, bit):
    """Turn one bit of a file."""
    raw = bytearray(path.read_bytes())
    raw[bit // 8 % len(raw)] ^= 1 << bit % 8
    path.write_bytes(raw)


def drop(name):
    return lambda values: values.pop(name)
