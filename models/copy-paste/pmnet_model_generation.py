"""What `generate` has to know about a PMNet: its state, its positions, its documents."""

from typing import Any

import torch
from transformers import GenerationMixin
from transformers.generation import GenerationConfig

from .pmnet_model_cache import PMNetCache
from .pmnet_model_chunk import changes
from .pmnet_model_window import positions_within


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
        """Start from a PMNetCache unless the user brought one or switched caching off.

        Documents become positions that begin again: those have a place for what is generated, and can be cut anywhere.

        Raises:
            ValueError: if both are given; if a state that has read something would be given all of it again.
        """
        brought = model_kwargs.get("past_key_values")
        if brought is not None and brought.get_seq_length():
            # what `generate` does then starts at the first id, every time
            again = "use_cache=False" if generation_config.use_cache is False else "prefill_chunk_size"
            if generation_config.use_cache is False or generation_config.prefill_chunk_size is not None:
                raise ValueError(f"generate with {again} reads everything again: a state that has read cannot be given")
        documents = model_kwargs.pop("document_ids", None)
        if documents is not None:
            if model_kwargs.get("position_ids") is not None:
                raise ValueError("generate takes document_ids or position_ids, not both")
            model_kwargs["position_ids"] = positions_within(changes(documents), None)
        if brought is None and generation_config.use_cache is not False:
            rows = batch_size * max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
            given = (value.device for value in model_kwargs.values() if isinstance(value, torch.Tensor))
            device = next(given, self.device)  # the model's own says nothing where its weights are offloaded
            model_kwargs["past_key_values"] = PMNetCache(self.config, rows, device, self.dtype)

    def _prepare_position_ids_for_generation(self, *_: Any) -> None:
        """None: a state knows its own positions, which begin again with every document."""

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        next_sequence_length: int | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As every cache: `generate` takes all ids from the first one on and skips what the state has read.

        Raises:
            ValueError: if nothing is left then.
        """
        if next_sequence_length is not None and next_sequence_length < 1:
            if not input_ids.shape[1]:
                raise ValueError("generate needs a prompt of at least one id")
            raise ValueError(
                f"generate takes everything from the beginning, and this state has read all {input_ids.shape[1]} ids: "
                "pmnet.stream_bytes continues a state with new bytes alone"
            )
        found: dict[str, Any] = super().prepare_inputs_for_generation(
            input_ids, next_sequence_length, inputs_embeds=inputs_embeds, **kwargs
        )
        return found
