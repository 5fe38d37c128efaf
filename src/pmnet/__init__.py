"""pmnet: Phasor Memory Networks (arXiv 2605.13370) for PyTorch and Hugging Face transformers."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from pmnet.config import PMNetConfig, pmnet_30m, pmnet_119m
from pmnet.model import PMNetCache, PMNetForCausalLM, PMNetModel

AutoConfig.register("PMNet", PMNetConfig)
AutoModel.register(PMNetConfig, PMNetModel)
AutoModelForCausalLM.register(PMNetConfig, PMNetForCausalLM)

__all__ = ["PMNetCache", "PMNetConfig", "PMNetForCausalLM", "PMNetModel", "pmnet_119m", "pmnet_30m"]
