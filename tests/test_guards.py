"""Kernels take addresses, so tensors of another type, shape or layout have to be met before."""

import pytest
import torch
from accelerate.utils import send_to_device
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import pmnet
from pmnet.model.window import plan_window
from pmnet.ops import Linear, RMSNorm, norm_rotate, phase_write, silu_product, use_backend, window_attention
from pmnet.ops.phase import _read_slots_backward
from pmnet.ops.scan import _plan
from tests.conftest import random_ids, small_model


def strided(x):
    """The same values, every second number in memory."""
    return nn.Parameter(torch.stack([x.detach(), x.detach()], dim=-1)[..., 0], requires_grad=False)


@pytest.mark.parametrize("rows", [2, 40])
@pytest.mark.parametrize("width", [32, 128])
def test_a_linear_map_refuses_another_width(rows, width):
    for layer in (Linear(64, 32), pmnet.ops.Int8Linear(Linear(64, 32))):
        with pytest.raises(ValueError, match="64 inputs"), torch.no_grad():
            layer(torch.randn(rows, width))


def test_row_operators_do_what_torch_does_with_other_shapes():
    with pytest.raises(RuntimeError):
        RMSNorm(64)(torch.randn(2, 128))
    gate, up = torch.randn(4, 64), torch.randn(1, 64)
    torch.testing.assert_close(silu_product(gate, up), nn.functional.silu(gate) * up)
    layer = Linear(64, 32)
    layer.bias = nn.Parameter(layer.bias.bfloat16())
    with pytest.raises(RuntimeError), torch.no_grad():
        layer(torch.randn(2, 64))


@pytest.mark.parametrize("eps", [None, 0.0, 0.1])
def test_a_norm_takes_epsilon_as_torch_does(eps):
    norm, x = RMSNorm(16, eps=eps), 1e-4 * torch.randn(5, 16)
    torch.testing.assert_close(norm(x), nn.functional.rms_norm(x, (16,), eps=eps))
    ones, zeros = torch.ones(1, 5, 1, 16), torch.zeros(1, 5, 1, 16)
    torch.testing.assert_close(norm_rotate(x.view(1, 5, 1, 16), norm, ones, zeros)[0, :, 0], norm(x))


def test_rotations_of_other_positions_are_refused():
    x, norm = torch.randn(2, 5, 3, 16), RMSNorm(16)
    for shape in ((1, 4, 1, 16), (3, 5, 1, 16), (1, 5, 1, 8), (1, 5, 3, 16)):
        with pytest.raises(ValueError, match="norm_rotate: expected x"):
            norm_rotate(x, norm, torch.ones(shape), torch.ones(shape))


def test_attention_refuses_what_does_not_fit():
    query, keys, span = torch.randn(2, 3, 4, 16), torch.randn(2, 7, 2, 16), torch.ones(1, 3, dtype=torch.int64)
    wrong = [
        (query, keys, span.int()), (query, keys[:1], span), (query, keys[..., :8], span), (query, keys[:, :2], span),
        (query[:, :, :3], keys, span), (query, keys, span[:, :2]), (query, keys[:, :, :0], span),
    ]  # fmt: skip
    for of_queries, of_keys, spans in wrong:
        with pytest.raises(ValueError, match="attention: query"):
            window_attention(of_queries, of_keys, of_keys, spans, 1.0)
    with pytest.raises(ValueError, match="attention: query"):
        window_attention(query, keys, keys[:, 1:], span, 1.0)


def test_compilers_are_told_the_layout_that_comes_back():
    query, weights, upstream = torch.randn(2, 5, 3, 8), torch.rand(2, 5, 4, 3), torch.randn(2, 5, 24)
    inputs = query, torch.randn(2, 5, 4, 16), torch.randn(16, 48).t(), torch.randn(48), weights, upstream
    torch.library.opcheck(_read_slots_backward, inputs, test_utils="test_faketensor")
    groups, valid = torch.randint(4, (6, 2)).t(), torch.ones(6, 2, dtype=torch.bool).t()
    torch.library.opcheck(_plan, (groups, 4, None, valid), test_utils="test_faketensor")


@torch.no_grad()
def test_a_model_stays_on_its_device_whatever_the_default():
    model, ids = small_model("deep"), random_ids(2, 9)
    expected = model(ids).logits
    with torch.device("meta"):
        for arguments in ({"use_cache": False}, {}, {"position_ids": torch.arange(9, device="cpu").view(1, 9)}):
            assert torch.equal(model(ids, **arguments).logits, expected)


@pytest.mark.parametrize("how", ["hook", "backward hook"])
def test_norms_of_heads_are_called_where_somebody_listens(how):
    model, calls = small_model("deep"), []
    norm = model.model.layers[0].self_attn.q_norm
    register = norm.register_forward_hook if how == "hook" else norm.register_full_backward_hook
    register(lambda *_: calls.append(1))
    model(random_ids(1, 5)).logits.sum().backward()
    assert calls == [1]


def test_norms_of_heads_can_be_replaced():
    class Doubled(RMSNorm):
        def forward(self, x):
            return 2 * super().forward(x)

    model, ids = small_model("deep"), random_ids(1, 9)
    attention = model.model.layers[0].self_attn
    expected = model(ids).logits
    doubled = Doubled(attention.k_norm.weight.numel(), eps=attention.k_norm.eps)
    doubled.load_state_dict(attention.k_norm.state_dict())
    attention.k_norm = doubled
    found = model(ids).logits
    assert not torch.equal(found, expected)
    with use_backend("torch"):
        torch.testing.assert_close(found, model(ids).logits, atol=1e-5, rtol=0)


def test_a_write_refuses_masks_and_documents_of_another_kind():
    weights, raw, groups = torch.full((2, 5, 4), 0.25), torch.randn(2, 5, 3), torch.zeros(2, 5, dtype=torch.int64)
    memory = torch.zeros(2, 1, 4, 3, dtype=torch.int32)
    for extra in ({"valid": torch.ones(2, 5, dtype=torch.int64)}, {"documents": torch.zeros(1, 5, dtype=torch.int64)}):
        with pytest.raises(ValueError, match=next(iter(extra))):
            phase_write(weights, raw, groups, memory, **extra)


@torch.no_grad()
def test_weights_may_lie_apart_in_memory():
    model, ids = small_model("period"), random_ids(2, 20)
    expected = model(ids).logits
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 1:
                setattr(module, name, strided(parameter))
    for part in (slice(None), slice(0, 3)):
        assert torch.equal(model(ids[:, part]).logits, expected[:, part])


@torch.no_grad()
def test_embeddings_in_double_precision_are_read_as_such():
    model, ids = small_model("period"), random_ids(2, 20)
    found = model(inputs_embeds=model.model.embed_tokens(ids).double()).logits
    torch.testing.assert_close(found.float(), model(ids).logits, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_state_shared_between_rows_is_copied_before_a_step():
    model, ids, step = small_model("period"), random_ids(1, 20), random_ids(4, 1)
    cache = pmnet.PMNetCache(model.config)
    model(ids, past_key_values=cache)
    shared = [tensor.expand(4, *tensor.shape[1:]) for tensor in cache.tensors()]
    shared = pmnet.PMNetCache.from_tensors(model.config, shared, columns=20)
    cache.batch_repeat_interleave(4)
    for _ in range(2):
        found, expected = (model(step, past_key_values=state).logits for state in (shared, cache))
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["memory", "seen"])
def test_a_state_of_other_integers_is_refused(name):
    model = small_model("period")
    cache = pmnet.PMNetCache(model.config)
    if name == "memory":
        cache.memory = [level.short() for level in cache.memory]
    else:
        cache.seen = cache.seen.int()
    with pytest.raises(ValueError, match="int32 turns and int64 counters"), torch.no_grad():
        model(random_ids(1, 1), past_key_values=cache)


def test_eight_bit_weights_are_not_cast():
    mixed = small_model("period")
    mixed.model.layers[-1].mlp.down_proj.bfloat16()
    with pytest.raises(ValueError, match=r"float32 weights on the CPU, down_proj has torch\.bfloat16"):
        pmnet.quantize_int8(mixed)
    assert not [module for module in mixed.modules() if isinstance(module, pmnet.ops.Int8Linear)]
    with pytest.raises(ValueError, match="before quantize_int8"):
        pmnet.quantize_int8(small_model("period")).bfloat16()


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 8, 24])
def test_tracers_see_operators_and_not_addresses(length):
    model = small_model("period")
    hidden = torch.randn(3, 1, length, model.config.hidden_size)
    together = torch.vmap(lambda x: model(inputs_embeds=x, use_cache=False).logits)(hidden)
    for one, found in zip(hidden, together, strict=True):
        torch.testing.assert_close(found, model(inputs_embeds=one).logits)
    with FakeTensorMode(allow_non_fake_inputs=True):
        cache = pmnet.PMNetCache(model.config)
        assert (
            model(inputs_embeds=torch.zeros(1, length, hidden.shape[-1]), past_key_values=cache).logits.shape[1]
            == length
        )
        ids = torch.zeros(2, length, dtype=torch.int64)
        assert model(ids, labels=ids).loss.shape == ()
    ids = random_ids(3, length)
    together = torch.vmap(lambda row: model(row.unsqueeze(0), use_cache=False).logits)(ids)
    torch.testing.assert_close(together.squeeze(1), model(ids).logits)


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev])
def test_transforms_that_differentiate_are_refused(transform):
    model, ids = small_model("period"), random_ids(1, 5)
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    with pytest.raises(NotImplementedError, match=r"torch\.func\.grad"):
        transform(lambda found: torch.func.functional_call(model, found, (ids,), {"labels": ids}).loss)(weights)


def test_attention_weights_are_refused():
    with pytest.raises(ValueError, match="no attention weights"):
        small_model("period")(random_ids(1, 3), output_attentions=True)


@torch.no_grad()
def test_no_rows_are_no_error():
    model = small_model("period")
    assert model(random_ids(2, 7)[:0]).logits.shape == (0, 7, model.config.vocab_size)


@torch.no_grad()
def test_a_geometry_cast_on_the_way_is_read_in_float32():
    model, ids = small_model("period").bfloat16(), random_ids(1, 12)
    reader = model.model.layers[1].memory_read_module
    hidden, geometry = torch.randn(1, 12, reader.norm.weight.numel()).bfloat16(), torch.randn(1, 12, 4, 2 * reader.size)
    for backend in ("auto", "torch"):
        with use_backend(backend):
            assert torch.equal(reader(hidden, geometry.bfloat16()), reader(hidden, geometry.bfloat16().float()))
    assert model(ids).logits.dtype == torch.bfloat16


def test_a_plan_of_attention_moves_to_the_device_of_its_layer():
    plan = plan_window(4, (1, 40), torch.device("cpu"), torch.zeros(1, dtype=torch.int64), None, None, None, True)
    moved = send_to_device(plan, "meta")
    tensors = [moved.span, moved.blocks.allowed, moved.blocks.query_index]
    assert [tensor.device.type for tensor in tensors] == ["meta"] * 3
    assert (moved.width, moved.length) == (4, 40)


def test_a_larger_vocabulary_keeps_the_exact_head():
    model = small_model("period", tie_word_embeddings=False)
    model.resize_token_embeddings(400)
    assert type(model.lm_head) is Linear
    cache, ids = pmnet.PMNetCache(model.config), random_ids(1, 9)
    with torch.no_grad():
        steps = torch.cat([model(part, past_key_values=cache).logits for part in ids.split(1, dim=1)], dim=1)
        assert torch.equal(steps, model(ids).logits)


def test_labels_of_another_kind_or_length_are_refused_before_the_state_moves():
    model, ids = small_model("period"), random_ids(1, 7)
    cache = pmnet.PMNetCache(model.config)
    model(ids, past_key_values=cache)
    for labels, keep, wanted in (
        (ids.int(), 0, 7),
        (ids.float(), 0, 7),
        (ids[:, :5], 0, 7),
        (ids, 2, 2),
        (ids, torch.tensor([3]), 1),
        (ids[0], 0, 7),
    ):
        with pytest.raises(ValueError, match=rf"labels must be int64 \[1, {wanted}\]"):
            model(ids, past_key_values=cache, labels=labels, logits_to_keep=keep)
    assert cache.columns == 7
    assert torch.isfinite(model(ids, labels=ids[:, -3:], logits_to_keep=3).loss)


def test_labels_under_padding_are_ignored_by_the_given_number():
    model, ids = small_model("period"), random_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    labels = ids.masked_fill(mask == 0, 256)
    usual = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
    assert torch.equal(model(ids, attention_mask=mask, labels=labels, ignore_index=256).loss, usual)


def test_the_base_model_refuses_packing_that_only_other_kernels_know():
    with pytest.raises(ValueError, match="cu_seq_lens_q alone"):
        small_model("period").model(random_ids(1, 6), cu_seq_lens_q=torch.tensor([0, 3, 6], dtype=torch.int32))


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_no_rows_have_no_gradient(backend):
    for model in (small_model("period").train(), small_model("period").bfloat16()):
        with use_backend(backend):
            model(random_ids(2, 40)[:0]).logits.sum().backward()
        assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@torch.no_grad()
def test_negative_positions_beside_padding_continue_their_document():
    model, ids = small_model("period"), random_ids(1, 12)
    mask = torch.ones_like(ids)
    mask[:, 4:6] = 0
    positions = torch.where(mask == 1, mask.cumsum(1) - 21, 0)
    whole = model(ids, attention_mask=mask, position_ids=positions).logits
    cache, parts = pmnet.PMNetCache(model.config), []
    for cut in (slice(0, 6), slice(6, 12)):
        parts.append(
            model(
                ids[:, cut], attention_mask=mask[:, cut], position_ids=positions[:, cut], past_key_values=cache
            ).logits
        )
    assert torch.equal(torch.cat(parts, 1)[mask == 1], whole[mask == 1])
