"""Byte-by-byte continuation of a live state."""

import math
from collections.abc import Callable, Iterator

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
    on_read: Callable[[int], None] = lambda count: None,
) -> Iterator[bytes]:
    """Read a prompt into `cache` and yield `count` further bytes, each of which the state has read then.

    Args:
        model: in eval mode.
        prompt: bytes to read first, in chunks. An empty cache starts with the model's BOS.
        cache: state of one sequence; whoever stops early has one that continues what was yielded.
        count: bytes to draw; special tokens are never drawn, even where they share their ids with bytes.
        temperature: 0 is greedy; finite.
        top_p: nucleus of the draw.
        on_read: called with the number of ids of each finished chunk of the prompt.

    Raises:
        TypeError: if the prompt is a string.
        ValueError: if there is no prompt to continue a state with, the temperature is negative or not finite in
            float32, or the scores of the model are not finite.
    """
    if isinstance(prompt, str):
        raise TypeError("a prompt is bytes: encode the string")
    config = model.config
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    special = [i for i in (config.pad_token_id, config.bos_token_id, *ends) if i is not None and i < 256]
    ids = ([first_id(config)] if cache.columns == 0 else []) + list(prompt)
    if not ids:
        raise ValueError("continuing a saved state needs a prompt of at least one byte")
    temperature = torch.tensor(temperature, dtype=torch.float32).item()  # as the scores see it: 1e-50 is 0
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be finite and not negative, got {temperature}")
    warpers = LogitsProcessorList()
    if temperature not in (0.0, 1.0):
        warpers.append(TemperatureLogitsWarper(temperature))
    if top_p < 1.0:
        warpers.append(TopPLogitsWarper(top_p))
    for chunk in torch.tensor([ids], device=model.device).split(_CHUNK, dim=1):
        logits = model(chunk, past_key_values=cache, logits_to_keep=1).logits
        on_read(chunk.shape[1])
    for _ in range(count):
        scores = logits[:, -1, :256].float()
        if not scores.isfinite().all():
            raise ValueError("the scores of the model are not finite")
        scores[:, special] = -math.inf
        if temperature == 0.0:
            step = scores.argmax(-1, keepdim=True)
        else:
            scores -= scores.max()  # divided by however small a temperature, the best stays finite
            step = torch.multinomial(warpers(chunk, scores).softmax(-1), 1)
        logits = model(step, past_key_values=cache, logits_to_keep=1).logits
        yield bytes([int(step)])
