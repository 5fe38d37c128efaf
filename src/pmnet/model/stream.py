"""Byte-by-byte continuation of a live state."""

import math
from collections.abc import Iterator

import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from pmnet.model.cache import PMNetCache
from pmnet.model.modeling import PMNetForCausalLM
from pmnet.model.tokenizer import first_id

_CHUNK = 1024  # positions of a prompt read at once: memory does not grow with it


@torch.no_grad()
def stream_bytes(
    model: PMNetForCausalLM,
    prompt: bytes,
    cache: PMNetCache,
    count: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> Iterator[bytes]:
    """Read a prompt into `cache` and yield `count` further bytes as they are drawn.

    Args:
        model: in eval mode.
        prompt: bytes to read first, in chunks. An empty cache starts with the model's BOS.
        cache: state of one sequence; it has read everything yielded when the iterator ends.
        count: bytes to draw; special tokens are never drawn, even where they share their ids with bytes.
        temperature: 0 is greedy.
        top_p: nucleus of the draw.

    Raises:
        ValueError: if there is no prompt to continue a state with, or the scores of the model are not finite.
    """
    config = model.config
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    special = [i for i in (config.pad_token_id, config.bos_token_id, *ends) if i is not None and i < 256]
    ids = ([first_id(config)] if cache.columns == 0 else []) + list(prompt)
    if not ids:
        raise ValueError("continuing a saved state needs a prompt of at least one byte")
    temperature = torch.tensor(temperature, dtype=torch.float32).item()  # as the scores see it: 1e-50 is 0
    warpers = LogitsProcessorList()
    if temperature not in (0.0, 1.0):
        warpers.append(TemperatureLogitsWarper(temperature))
    if top_p < 1.0:
        warpers.append(TopPLogitsWarper(top_p))
    *before, step = torch.tensor([ids], device=model.device).split(_CHUNK, dim=1)
    for chunk in before:
        model(chunk, past_key_values=cache, logits_to_keep=1)
    for _ in range(count):
        scores = model(step, past_key_values=cache, logits_to_keep=1).logits[:, -1, :256].float()
        if not scores.isfinite().all():
            raise ValueError("the scores of the model are not finite")
        scores[:, special] = -math.inf
        if temperature == 0.0:
            step = scores.argmax(-1, keepdim=True)
        else:
            scores -= scores.max()  # divided by however small a temperature, the best stays finite
            step = torch.multinomial(warpers(step, scores).softmax(-1), 1)
        yield bytes([int(step)])
    model(step, past_key_values=cache)
