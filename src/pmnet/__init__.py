"""pmnet: Phasor Memory Networks (arXiv 2605.13370) for PyTorch and Hugging Face transformers."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from pmnet.config import PMNetConfig, pmnet_30m, pmnet_119m
from pmnet.model import ByteTokenizer, PMNetCache, PMNetForCausalLM, PMNetModel
from pmnet.model.graph import DecodeGraph
from pmnet.model.stream import stream_bytes
from pmnet.ops import quantize_int8, use_backend

AutoConfig.register("PMNet", PMNetConfig)
AutoModel.register(PMNetConfig, PMNetModel)
AutoModelForCausalLM.register(PMNetConfig, PMNetForCausalLM)
AutoTokenizer.register(PMNetConfig, slow_tokenizer_class=ByteTokenizer)

__all__ = [
    "ByteTokenizer",
    "DecodeGraph",
    "PMNetCache",
    "PMNetConfig",
    "PMNetForCausalLM",
    "PMNetModel",
    "pmnet_30m",
    "pmnet_119m",
    "quantize_int8",
    "stream_bytes",
    "use_backend",
]
