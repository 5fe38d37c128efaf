"""What a PMNet is compared with: the same parameters, the same bytes, another way to remember, or none."""

from pmnet.baselines.carry import Carry, carries
from pmnet.baselines.controls import CONTROLS, UNTRACED, control
from pmnet.baselines.load import load_any
from pmnet.baselines.lstm import LSTMConfig, LSTMForCausalLM
from pmnet.baselines.mamba2 import matrix_scan
from pmnet.baselines.memories import VariantConfig, VariantForCausalLM
from pmnet.baselines.ntm import NTMConfig, NTMCore, NTMForCausalLM, NTMState

__all__ = [
    "CONTROLS",
    "UNTRACED",
    "Carry",
    "LSTMConfig",
    "LSTMForCausalLM",
    "NTMConfig",
    "NTMCore",
    "NTMForCausalLM",
    "NTMState",
    "VariantConfig",
    "VariantForCausalLM",
    "carries",
    "control",
    "load_any",
    "matrix_scan",
]
