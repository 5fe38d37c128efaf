"""Optimizers of a recipe, and the course of their learning rate."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel, get_scheduler

from pmnet.train.recipes import Recipe


class Muon(torch.optim.Muon):
    """PyTorch's, with every product in float32.

    It rounds to bfloat16 to be fast, and is the slowest part of a step on processors that cannot multiply bfloat16.
    """

    def step(self, closure: Any = None) -> Any:
        """As in PyTorch."""
        with _Float32():
            return super().step(closure)


class _Float32(TorchFunctionMode):
    """Makes `tensor.bfloat16()` a copy in float32."""

    def __torch_function__(
        self, function: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is torch.Tensor.bfloat16:
            return args[0].to(torch.float32, copy=True)
        return function(*args, **(kwargs or {}))


def build_optimizers(model: PreTrainedModel, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """AdamW, with weight decay on matrices and anchors only; with `muon`, Muon for the matrices of linear maps.

    The decay rates of a Mamba (`A_log`) are a matrix that is not decayed, as its authors have it.
    """
    linear = {module.weight for module in model.modules() if isinstance(module, nn.Linear)} if recipe.muon else set()
    linear -= {model.get_output_embeddings().weight}
    named = [(p, p.dim() < 2 or name.endswith("A_log")) for name, p in model.named_parameters() if p not in linear]
    decayed, plain = ([p for p, is_plain in named if is_plain is wanted] for wanted in (False, True))
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=recipe.betas, fused=True)
    if not linear:
        return [adamw]
    matrices = [p for p in model.parameters() if p in linear]
    muon = Muon(matrices, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw")
    return [adamw, muon]


def build_schedule(optimizer: torch.optim.Optimizer, recipe: Recipe) -> torch.optim.lr_scheduler.LambdaLR:
    """Warm-up, constant for `hold` of the steps, cosine decay to `final_rate` of the peak."""
    held = max(0, int(recipe.hold * recipe.steps) - recipe.warmup)
    return get_scheduler(
        "warmup_stable_decay",
        optimizer,
        num_warmup_steps=recipe.warmup,
        scheduler_specific_kwargs={
            "num_stable_steps": held,
            "num_decay_steps": max(1, recipe.steps - recipe.warmup - held),
            "min_lr_ratio": recipe.final_rate,
        },
    )
