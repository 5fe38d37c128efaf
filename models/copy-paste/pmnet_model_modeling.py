"""The Hugging Face classes: `PMNetModel`, `PMNetForCausalLM`.

Shapes: B sequences, T positions of this call, D hidden size, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import can_return_tuple

from .pmnet_config import PMNetConfig
from .pmnet_memory import Anchors, empty_memory, enter
from .pmnet_model_block import PMNetBlock
from .pmnet_model_cache import PMNetCache
from .pmnet_model_checks import (
    check_cache,
    check_hidden,
    check_ids,
    check_kept,
    check_labels,
    check_others,
    check_sizes,
)
from .pmnet_model_chunk import read_chunk
from .pmnet_model_generation import PMNetGenerationMixin
from .pmnet_model_step import try_step
from .pmnet_ops import Int8Linear, Linear, RMSNorm, rotary_table


class PMNetPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation shared by the model classes."""

    config: PMNetConfig
    config_class = PMNetConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["PMNetBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_attention_backend = True
    _is_stateful = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        config = self.config
        if isinstance(module, nn.Linear) and config.initializer_gain is not None:
            init.normal_(module.weight, std=config.initializer_gain * module.in_features**-0.5)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.ParameterList):
            for anchors in module:
                init.normal_(anchors, std=config.anchor_initializer_range)
        else:
            super()._init_weights(module)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, *arguments: Any, **kwargs: Any
    ) -> None:
        """Compute activations again in backward instead of keeping them.

        Raises:
            ValueError: for `use_reentrant=True`, which would lose the gradient of everything but the hidden states.
        """
        if (gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            raise ValueError("a PMNet hands more than hidden states from layer to layer: use_reentrant must be False")
        super().gradient_checkpointing_enable(gradient_checkpointing_kwargs, *arguments, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PMNetPreTrainedModel":
        """Move or cast; ValueError, with nothing changed, for a cast of 8-bit weights."""
        for module in self.modules():
            if isinstance(module, Int8Linear):
                module.check_cast(fn)
        super()._apply(fn, recurse)
        return self

    def save_pretrained(self, *arguments: Any, **kwargs: Any) -> None:
        """Write configuration and weights.

        Raises:
            ValueError: for 8-bit weights, which are for inference in this process only.
        """
        if any(isinstance(module, Int8Linear) for module in self.modules()):
            raise ValueError("8-bit weights cannot be saved: save the model before quantize_int8")
        super().save_pretrained(*arguments, **kwargs)


class PMNetModel(PMNetPreTrainedModel):
    """The stack of decoder layers with its memory tree; returns hidden states."""

    def __init__(self, config: PMNetConfig):
        config.validate_architecture()  # again: values may have been set since it was made
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.memory_embeddings = Anchors(
            nn.Parameter(torch.empty(config.memory_shape(level))) for level in range(config.num_levels)
        )
        self.layers = nn.ModuleList(PMNetBlock(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: PMNetCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        document_ids: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Read T positions, continuing `past_key_values` if given.

        Args:
            input_ids: int64 in `[0, V)`, `[B, T]`; or give `inputs_embeds`, `[B, T, D]`.
            attention_mask: 1 for real positions, 0 for padding, `[B, T]` (or longer; the last T columns count).
                Padding may stand anywhere; it neither writes nor reads, and a row's result is that of the row alone.
            position_ids: `[B, T]`. A position that does not increase starts a new document: it sees nothing
                before it, in attention or memory. Without it, positions continue the cache.
            past_key_values: the state to continue; advanced in place.
            use_cache: return the state (a fresh one if none was given). Defaults to `config.use_cache` outside
                training.
            document_ids: `[B, T]`; a change of value starts a new document. The first position continues the
                document of the cache.
            output_hidden_states: also return the hidden states after the embedding and after each layer, the last of
                them normed. Defaults to the value in `config`.
            kwargs: other `transformers` keywords (`return_dict`, ...) are accepted and ignored.

        Returns:
            `last_hidden_state` `[B, T, D]` (meaningless at padding), `past_key_values`, `hidden_states`.

        Raises:
            ValueError: if ids are out of range, shapes do not agree, or the state is another model's.
            NotImplementedError: inside forward-mode differentiation, which the operators do not have.
        """
        check_others(position_ids, document_ids, kwargs)
        if inputs_embeds is not None and input_ids is None:
            hidden = inputs_embeds
        elif input_ids is not None and inputs_embeds is None:
            check_ids(input_ids, self.config.vocab_size)
            hidden = self.embed_tokens(input_ids)
        else:
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        check_hidden(hidden, self.config)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if past_key_values is not None:
            check_cache(past_key_values, self.config, hidden)
        elif use_cache:
            past_key_values = PMNetCache(self.config, hidden.shape[0], hidden.device, self.dtype)

        if not (self.training or output_hidden_states or document_ids is not None):
            stepped = try_step(
                self.config, self.layers, self.memory_embeddings, self.norm, hidden, attention_mask, position_ids,
                past_key_values,
            )  # fmt: skip
            if stepped is not None:
                return BaseModelOutputWithPast(last_hidden_state=stepped, past_key_values=past_key_values)
        check_sizes(self.layers, self.memory_embeddings, self.config)
        dropout = self.config.attention_dropout if self.training else 0.0
        chunk = read_chunk(self.config, hidden, attention_mask, position_ids, document_ids, past_key_values, dropout)
        hidden = chunk.compact(hidden)
        if chunk.tokens.valid is not None:  # whatever stands at padding: a weight of zero does not undo a NaN
            hidden = hidden.masked_fill(~chunk.tokens.valid.unsqueeze(2), 0)
        rotary = rotary_table(chunk.positions, self.config.head_dim, self.config.rope_theta, hidden)
        if past_key_values is None:
            memory = empty_memory(self.config, hidden.shape[0], hidden.device)
        else:
            memory = past_key_values.memory
        geometry, below = None, enter(hidden)
        trace = [hidden] if output_hidden_states else []
        after_memory, after_window = list(memory), []
        for i, layer in enumerate(self.layers):
            level = self.config.level_of(i)
            past = past_key_values.window[i] if past_key_values is not None and past_key_values.columns else None
            hidden, geometry, below, after_memory[level], past = layer(
                hidden, geometry, below, self.memory_embeddings(level), after_memory[level], past, rotary,
                chunk.window, chunk.tokens,
            )  # fmt: skip
            if past_key_values is not None:
                after_window.append(past)
            if output_hidden_states:
                trace.append(hidden)
        if past_key_values is not None:
            chunk.advance(past_key_values, after_memory, after_window)
        last = chunk.restore(self.norm(hidden))
        return BaseModelOutputWithPast(
            last_hidden_state=last,
            past_key_values=past_key_values,
            hidden_states=(*map(chunk.restore, trace[:-1]), last) if output_hidden_states else None,
        )


class PMNetForCausalLM(PMNetPreTrainedModel, PMNetGenerationMixin):
    """PMNet with the output head tied to the byte embedding; a causal language model for `generate`."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: PMNetConfig):
        super().__init__(config)
        self.model = PMNetModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: PMNetCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        document_ids: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Next-token logits, and the loss when labels are given.

        Args:
            labels: `[B, T]`, usually `input_ids`; shifted inside, -100 is ignored, and so is what would be predicted
                from padding. The loss is the mean cross-entropy in nats.
            logits_to_keep: compute logits of the last so many positions only (0: all), or of these indices.
            kwargs: passed to the loss function (`num_items_in_batch`, ...).

        The other arguments are those of `PMNetModel.forward`.

        Returns:
            `logits` `[B, T, V]`, `loss`, `past_key_values`, `hidden_states`.

        Raises:
            ValueError: as `PMNetModel.forward`.
        """
        ignored = kwargs.get("ignore_index", -100)
        given = inputs_embeds if input_ids is None else input_ids
        if given is not None:
            check_kept(logits_to_keep, given.shape[1])
            if labels is not None:
                check_labels(labels, self.config.vocab_size, ignored, given.shape[:2], logits_to_keep)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            document_ids=document_ids,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            if attention_mask is not None:
                real = attention_mask[:, -outputs.last_hidden_state.shape[1] :][:, keep]
                labels = torch.cat([labels[:, :1], labels[:, 1:].masked_fill(real[:, :-1] == 0, ignored)], dim=1)
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )

    def _get_resized_lm_head(self, *arguments: Any, **kwargs: Any) -> nn.Linear:
        """Hook of `resize_token_embeddings`, which would put a `torch.nn.Linear` there."""
        new = super()._get_resized_lm_head(*arguments, **kwargs)
        head = Linear(new.in_features, new.out_features, bias=False, device="meta")
        head.weight = new.weight
        return head


# by this name the Trainer knows that labels are to be shifted where it computes a loss itself (label smoothing)
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[PMNetConfig.model_type] = PMNetForCausalLM.__name__

__all__ = ["PMNetForCausalLM", "PMNetModel", "PMNetPreTrainedModel"]
