"""Attention backends: named as transformers does, the same numbers, and one line where they lack."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F

from engine.model import attention as module
from engine.model.attention import attention
from engine.settings.errors import UserError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def fresh():
    attention.cache_clear()
    yield
    attention.cache_clear()


def plain(q, k, v):
    """Query i of Q sees keys up to K - Q + i; heads are grouped."""
    repeat = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(repeat, 1) for x in (k, v))
    asking, answering = q.shape[2], k.shape[2]
    seen = torch.arange(answering) <= torch.arange(asking)[:, None] + answering - asking
    scores = q @ k.mT * q.shape[-1] ** -0.5
    return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v


def inputs(asking: int, answering: int, kv_heads: int = 2):
    rng = torch.Generator().manual_seed(asking)
    shapes = [(3, 4, asking, 8), (3, kv_heads, answering, 8), (3, kv_heads, answering, 8)]
    return [torch.randn(s, generator=rng) for s in shapes]


@pytest.mark.parametrize(("asking", "answering"), [(6, 6), (2, 9), (1, 5)])
def test_sdpa_is_causal_at_the_lower_right(asking, answering):
    tensors = inputs(asking, answering)
    torch.testing.assert_close(attention("sdpa", CPU, torch.float32)(*tensors), plain(*tensors))


@pytest.mark.parametrize("name", ["flash_attention_2", "xformers"])
def test_a_backend_is_refused_in_one_line_where_it_cannot_be(name, monkeypatch):
    for device, dtype, said in (
        (CPU, torch.float32, "runs on CUDA, the policy is on cpu"),
        (CUDA, torch.bfloat16, "cannot load"),
    ):
        monkeypatch.setitem(sys.modules, "flash_attn", None)
        monkeypatch.setitem(sys.modules, "xformers", None)
        monkeypatch.setitem(sys.modules, "xformers.ops", None)
        with pytest.raises(UserError, match=f"--attn_implementation {name}: {said}") as caught:
            attention(name, device, dtype)
        assert "\n" not in str(caught.value)


def test_flash_attention_takes_16_bits():
    with pytest.raises(UserError, match="takes --dtype bfloat16 or float16"):
        attention("flash_attention_2", CUDA, torch.float32)


def test_backends_are_asked_in_their_own_layout(monkeypatch):
    """Stand-ins with the packages' signatures: (B, T, H, D), lower-right causal, grouped or not."""

    def flash_attn_func(q, k, v, causal):
        assert causal
        return plain(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    class LowerTriangularFromBottomRightMask:
        pass

    def memory_efficient_attention(q, k, v, attn_bias):
        assert isinstance(attn_bias, LowerTriangularFromBottomRightMask)
        assert q.shape[2] == k.shape[2]  # no grouped heads
        return plain(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    def put(name: str, **content: object) -> None:
        found = types.ModuleType(name)
        vars(found).update(content)
        monkeypatch.setitem(sys.modules, name, found)

    put("flash_attn", flash_attn_func=flash_attn_func)
    put("xformers"), put("xformers.ops", memory_efficient_attention=memory_efficient_attention)
    put("xformers.ops.fmha")
    put(
        "xformers.ops.fmha.attn_bias",
        LowerTriangularFromBottomRightMask=LowerTriangularFromBottomRightMask,
    )
    for load in (module._flash, module._xformers):
        for shape in ((6, 6), (2, 9)):
            tensors = inputs(*shape)
            torch.testing.assert_close(load()(*tensors), plain(*tensors))


def test_half_precision_on_a_cpu_is_rounded_once(monkeypatch):
    tensors = [x.bfloat16() for x in inputs(4, 4, kv_heads=4)]
    monkeypatch.setattr(module, "wants_fp32", lambda x: x.dtype == torch.bfloat16)
    wide = F.scaled_dot_product_attention(*(x.float() for x in tensors), is_causal=True)
    assert attention("sdpa", CPU, torch.bfloat16)(*tensors).equal(wide.bfloat16())
