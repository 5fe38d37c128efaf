"""What `generate` has to know about a PMNet: its state, its positions, its documents."""

from typing import Any, NoReturn

import torch
from transformers import GenerationMixin, StoppingCriteriaList
from transformers.generation import GenerationConfig, GenerationMode

from pmnet.model.cache import PMNetCache
from pmnet.model.chunk import changes
from pmnet.model.window import positions_within


class _Ends(StoppingCriteriaList):
    """Criteria that remember which rows had ended before the last ids were chosen: theirs are pads.

    Attributes:
        padded: bool `[B]`; None before the second id.
    """

    padded: torch.Tensor | None = None
    _ended: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Which rows end, bool `[B]`."""
        found: torch.Tensor = super().__call__(input_ids, scores, **kwargs)
        if any(hasattr(criterion, "eos_token_id") for criterion in self):  # else `generate` pads nothing
            self.padded, self._ended = self._ended, found if self._ended is None else found | self._ended
        return found


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
        """Start from a PMNetCache unless the user brought one, which gets its rows repeated, or switched caching off.

        Documents become positions that begin again: those have a place for what is generated, and can be cut anywhere.

        Rows that end before others are padded then; these pads are masked where the state is for the caller.

        Raises:
            ValueError: if documents and positions are given; if a state would be given again what it has read.
        """
        brought = model_kwargs.get("past_key_values")
        rows = batch_size * max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
        if brought is not None:
            if generation_config.use_cache is False:
                raise ValueError("generate with use_cache=False reads everything again at every step, into no state")
            if generation_config.prefill_chunk_size is not None and brought.get_seq_length():
                raise ValueError(
                    "generate with prefill_chunk_size reads everything again: a state that has read cannot be given"
                )
            if isinstance(brought, PMNetCache) and brought.batch_size == batch_size:  # beams, or several answers
                brought.batch_repeat_interleave(rows // batch_size)
            brought._is_user_defined = True  # `generate` undoes no step behind it
        in_turns = generation_mode in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
        if in_turns and (brought is not None or generation_config.return_dict_in_generate):
            model_kwargs["ends"] = generation_config._ends = _Ends()
        documents = model_kwargs.pop("document_ids", None)
        if documents is not None:
            if model_kwargs.get("position_ids") is not None:
                raise ValueError("generate takes document_ids or position_ids, not both")
            model_kwargs["position_ids"] = positions_within(changes(documents), None)
        if brought is None and generation_config.use_cache is not False:
            given = (value.device for value in model_kwargs.values() if isinstance(value, torch.Tensor))
            device = next(given, self.device)  # the model's own says nothing where its weights are offloaded
            model_kwargs["past_key_values"] = PMNetCache(self.config, rows, device, self.dtype)

    def init_continuous_batching(self, *_: Any, **__: Any) -> NoReturn:
        """Refuse: continuous batching pages keys and values, and the memory of a PMNet is no page of them.

        Raises:
            ValueError: always.
        """
        raise ValueError("continuous batching (generate_batch) pages keys and values: a PMNet has generate for batches")

    def _get_stopping_criteria(
        self, generation_config: GenerationConfig, *arguments: Any, **kwargs: Any
    ) -> StoppingCriteriaList:
        """Those that remember, where they are needed."""
        criteria: StoppingCriteriaList = super()._get_stopping_criteria(generation_config, *arguments, **kwargs)
        ends: _Ends | None = getattr(generation_config, "_ends", None)
        if ends is None:
            return criteria
        ends.extend(criteria)
        return ends

    def _prepare_position_ids_for_generation(self, *_: Any) -> None:
        """None: a state knows its own positions, which begin again with every document."""

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        next_sequence_length: int | None = None,
        inputs_embeds: torch.Tensor | None = None,
        ends: _Ends | None = None,
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
        if ends is not None and ends.padded is not None and ends.padded.any():
            mask = found["attention_mask"].clone()
            mask[ends.padded.to(mask.device), -1] = 0
            found["attention_mask"] = mask
        return found
