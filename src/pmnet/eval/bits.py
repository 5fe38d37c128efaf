"""Bits per byte of files, each streamed once with its state carried from the first byte to the last."""

import math
from collections.abc import Callable

import torch
from torch.nn import functional as F

from pmnet.data.files import ByteFiles
from pmnet.model import PMNetCache, PMNetForCausalLM
from pmnet.model.tokenizer import first_id

CHUNK = 2048


@torch.no_grad()
def bits_per_byte(
    model: PMNetForCausalLM,
    files: ByteFiles,
    limit: int | None = None,
    on_bytes: Callable[[int], None] = lambda count: None,
) -> tuple[float, int]:
    """Stream every file through the model with constant memory.

    Args:
        model: in eval mode.
        files: documents; the state starts empty at each.
        limit: read at most so many bytes of each file.
        on_bytes: called with the number of bytes of each finished chunk.

    Returns:
        Mean bits per byte over all bytes read, and their number.
    """
    nats, count = 0.0, 0
    for file, size in enumerate(files.sizes):
        cache = PMNetCache(model.config, 1, model.device, model.dtype)
        before = first_id(model.config)
        size = min(size, limit or size)
        for start in range(0, size, CHUNK):
            data = files.read(file, start, min(size, start + CHUNK))
            target = torch.tensor([list(data)], device=model.device)
            ids = torch.cat([target.new_tensor([[before]]), target[:, :-1]], dim=1)
            logits = model(ids, past_key_values=cache).logits
            nats += F.cross_entropy(logits[0].double(), target[0], reduction="sum").item()
            count, before = count + len(data), data[-1]
            on_bytes(len(data))
    return nats / count / math.log(2), count
