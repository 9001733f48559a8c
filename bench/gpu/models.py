"""Policies of the GPU check: Janus-Pro's shapes with random weights made on the device."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import JanusConfig, JanusVisionConfig, JanusVQVAEConfig, LlamaConfig

from bench.rollout.eager_loop import PUBLISHED_ROWS, EagerLoop
from engine.model.policy import Policy
from engine.rollout.decoder import Decoder, decoder_of
from engine.rollout.sample import image_request
from kernels.state import Draw

CFG_WEIGHT = 5.0

# A label, and what makes its rows.
Item = tuple[str, Callable[[], Iterable[dict[str, Any]]]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """A model's shape.

    Attributes:
        grid: image tokens a side.
        image_vocab, text_vocab: codes and words.
    """

    name: str
    width: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    image_vocab: int = 16_384
    text_vocab: int = 102_400
    grid: int = 24


SHAPES = {
    "1b": Shape(name="1b", width=2048, intermediate=5632, layers=24, heads=16, kv_heads=16),
    "7b": Shape(name="7b", width=4096, intermediate=11_008, layers=30, heads=32, kv_heads=32),
}
# In fp32 against transformers: Janus-Pro-1B's layer with fewer of them and fewer tokens.
PARITY = {
    "MHA": Shape(
        name="MHA", width=2048, intermediate=5632, layers=3, heads=16, kv_heads=16, grid=8
    ),
    "GQA": Shape(name="GQA", width=2048, intermediate=5632, layers=3, heads=16, kv_heads=4, grid=8),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """How much is run.

    Attributes:
        sizes: images of a rollout, the one that matters most first.
        prompt: tokens of a prompt.
        window: steps of a peer timed in one window.
        checked: images of the correctness checks.
        chunk_rows: rows of the published loop's chunks.
    """

    sizes: tuple[int, ...] = (64, 8, 16, 32)
    prompt: int = 150
    window: int = 16
    checked: int = 4
    dtype: torch.dtype = torch.bfloat16
    chunk_rows: int = PUBLISHED_ROWS


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def random_policy(shape: Shape, dtype: torch.dtype, device: torch.device) -> Policy:
    """A policy of random weights, sharp enough that a wrong token would show."""
    text = LlamaConfig(
        vocab_size=shape.text_vocab,
        hidden_size=shape.width,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=1024,
    )
    # Janus takes the image tokens' grid from the vision tower, which the policy leaves out. The
    # tokenizer of pixels is not timed, so it is small.
    vision = JanusVisionConfig(image_size=shape.grid, patch_size=1, num_hidden_layers=1)
    vq = JanusVQVAEConfig(
        embed_dim=8,
        num_embeddings=shape.image_vocab,
        base_channels=32,
        latent_channels=32,
        channel_multiplier=[1, 1],
        num_res_blocks=1,
        num_patches=shape.grid,
        projection_dim=shape.width,
        image_token_embed_dim=shape.width,
    )
    config = JanusConfig(text_config=text, vision_config=vision, vq_config=vq)
    torch.manual_seed(0)
    with _default_dtype(dtype), torch.device(device):
        policy = Policy(config).eval()
    policy.freeze_generation()
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if parameter.ndim == 2 and "vqmodel" not in name:
                # As wide as its input keeps the size of activations; the heads' logits get wider.
                head = "vision_head" in name or "lm_head" in name
                parameter.normal_(0, (3.0 if head else 1.0) * parameter.shape[1] ** -0.5)
    return policy


def peer_loop(policy: Policy) -> EagerLoop:
    """The published loop, its copy of the weights made on the device and in the policy's dtype."""
    with _default_dtype(policy.dtype), torch.device(policy.device):
        return EagerLoop(policy)


def image_decoder(
    policy: Policy, distinct: Sequence[Tensor], group: int, *, seed: int, fused_head: bool = True
) -> Decoder:
    """A decoder of `group` images for each of the distinct prompts."""
    prompts = [prompt for prompt in distinct for _ in range(group)]
    rows = torch.arange(len(prompts), device=policy.device)
    request = image_request(policy, rows, Draw(cfg_weight=CFG_WEIGHT, seed=seed))
    return decoder_of(policy, prompts, request, fused_head=fused_head)


def prompts_of(policy: Policy, count: int, length: int, *, group: int = 1) -> list[Tensor]:
    """`count` random prompts of one length; each `group` neighbours are the same prompt."""
    random = torch.Generator().manual_seed(0)
    shape = -(-count // group), length
    words = torch.randint(8, policy.config.text_config.vocab_size, shape, generator=random)
    words[:, 0], words[:, -1] = policy.bos, policy.image_start
    words = words.to(policy.device).repeat_interleave(group, 0)
    return list(words[:count])


def weight_bytes(policy: Policy) -> int:
    """Bytes of the weights that one image decode step reads."""
    model = policy.model
    read: Sequence[torch.nn.Module] = (model.language_model.layers, model.generation_head)
    return sum(p.numel() * p.element_size() for module in read for p in module.parameters())
