"""The model on `transformers`: attention, decoder layer, streaming state, Hugging Face classes, tokenizer."""

from pmnet.model.cache import PMNetCache
from pmnet.model.modeling import PMNetForCausalLM, PMNetModel
from pmnet.model.tokenizer import ByteTokenizer

__all__ = ["ByteTokenizer", "PMNetCache", "PMNetForCausalLM", "PMNetModel"]
