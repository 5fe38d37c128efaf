"""What `generate` has to know about a PMNet: its state, its positions, its documents."""

from typing import Any

import torch
from transformers import GenerationMixin
from transformers.generation import GenerationConfig

from .pmnet_model_cache import PMNetCache


class PMNetGenerationMixin(GenerationMixin):
    """`generate` with a `PMNetCache`."""

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """`generate` must not build a growing key/value cache."""
        return False

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Start from a PMNetCache unless the user brought one or switched caching off."""
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            rows = batch_size * max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
            model_kwargs["past_key_values"] = PMNetCache(self.config, rows, self.device, self.dtype)

    def _prepare_position_ids_for_generation(self, *_: Any) -> None:
        """None: a state knows its own positions, which begin again with every document."""

    def prepare_inputs_for_generation(
        self, input_ids: torch.Tensor, next_sequence_length: int | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """As every cache: `generate` takes all ids from the first one on and skips what the state has read.

        Raises:
            ValueError: if nothing is left then.
        """
        if next_sequence_length is not None and next_sequence_length < 1:
            raise ValueError(
                f"generate takes everything from the beginning, and this state has read all {input_ids.shape[1]} ids: "
                "pmnet.stream_bytes continues a state with new bytes alone"
            )
        found: dict[str, Any] = super().prepare_inputs_for_generation(input_ids, next_sequence_length, **kwargs)
        return found

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *arguments: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """What is generated belongs to the last document, which the state continues."""
        documents = model_kwargs.pop("document_ids", None)
        if documents is not None and outputs.get("past_key_values") is None:
            model_kwargs["document_ids"] = torch.cat([documents, documents[:, -1:]], dim=1)
        found: dict[str, Any] = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *arguments, **kwargs)
        return found
