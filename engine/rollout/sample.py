"""Sampling: the semantic-level chain of thought (text) and the token-level one (image tokens).

Each sample is a pure function of (weights, its prompt, seed, its sample id): what else is in the
batch changes nothing but floating-point rounding.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine.model.generator import Generator
from engine.rollout.decoder import decode
from engine.rollout.request import Request
from engine.settings.errors import UserError
from kernels.state import Draw

# Text and image draws of one sample must not share noise: image steps are numbered from here.
IMAGE_STEP = 1 << 20


@dataclass(slots=True)
class TextRollout:
    """Completions of B prompts.

    Attributes:
        ids: (B, T) int64; the end-of-sequence token is included, what follows it is pad.
        mask: (B, T) bool, True on generated tokens up to and including end-of-sequence.
        logprobs: (B, T) fp32 nats, 0 where masked.
    """

    ids: Tensor
    mask: Tensor
    logprobs: Tensor


@dataclass(slots=True)
class ImageRollout:
    """Image tokens of B prompts.

    Attributes:
        ids: (B, N) int64.
        logprobs: (B, N) fp32 nats under the conditional distribution.
        guided_logprobs: (B, N) fp32 nats under the distribution that was sampled.
    """

    ids: Tensor
    logprobs: Tensor
    guided_logprobs: Tensor


def _check(
    generator: Generator, prompts: Sequence[Tensor], new_tokens: int, temperature: float
) -> None:
    if not prompts:
        raise UserError("prompts: wanted at least one, got none")
    if not temperature > 0:
        raise UserError(f"temperature: wanted > 0, got {temperature}")
    for i, prompt in enumerate(prompts):
        if len(prompt) < 2:
            raise UserError(f"prompt {i}: wanted at least 2 tokens, got {len(prompt)}")
        if len(prompt) + new_tokens > generator.context_length:
            raise UserError(
                f"prompt {i}: {len(prompt)} tokens and {new_tokens} to generate exceed the "
                f"model's context of {generator.context_length}"
            )


def _sample_ids(given: Tensor | None, count: int, device: torch.device) -> Tensor:
    ids = torch.arange(count, device=device) if given is None else given.to(device)
    if ids.shape != (count,):
        raise ValueError(f"sample_ids: wanted ({count},), got {tuple(ids.shape)}")
    return ids


def text_request(sample_ids: Tensor, max_new_tokens: int, draw: Draw) -> Request:
    """A completion in text for each of (B,) int64 sample ids."""
    return Request(
        level="semantic", steps=max_new_tokens, guided=False, sample_ids=sample_ids, draw=draw
    )


def image_request(generator: Generator, sample_ids: Tensor, draw: Draw) -> Request:
    """A picture under guidance for each of (B,) int64 sample ids."""
    return Request(
        level="token",
        steps=generator.image_tokens,
        guided=True,
        sample_ids=sample_ids,
        draw=replace(draw, first_step=IMAGE_STEP),
    )


@torch.no_grad()
def sample_text(
    generator: Generator,
    prompts: Sequence[Tensor],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
    greedy: bool = False,
    sample_ids: Tensor | None = None,
) -> TextRollout:
    """Sample a text completion for each prompt until end-of-sequence or max_new_tokens.

    Args:
        policy: the generator.
        prompts: B tensors (L_i,) int64; equal prompts share their prefix in the cache.
        sample_ids: (B,) int64 identities for the noise; None: 0 .. B - 1.
    Raises: UserError naming the prompt that does not fit the context; FloatingPointError naming
        row and step of non-finite logits.
    """
    _check(generator, prompts, max_new_tokens, temperature)
    ids = _sample_ids(sample_ids, len(prompts), generator.device)
    draw = Draw(temperature=temperature, seed=seed, greedy=greedy)
    drawn = decode(generator, prompts, text_request(ids, max_new_tokens, draw))
    return TextRollout(drawn.ids, drawn.mask, drawn.logprobs)


@torch.no_grad()
def sample_images(
    generator: Generator,
    prompts: Sequence[Tensor],
    *,
    cfg_weight: float = 5.0,
    temperature: float = 1.0,
    seed: int = 0,
    greedy: bool = False,
    top_k: int = 0,
    top_p: float = 1.0,
    sample_ids: Tensor | None = None,
) -> ImageRollout:
    """Sample the image tokens of each prompt under guidance.

    Args:
        policy: the generator.
        prompts: B tensors (L_i,) int64, each ending with image-start.
        cfg_weight: guidance weight; the unconditional prompt is [BOS, pad, ..., image-start] of
            the same length.
        sample_ids: (B,) int64 identities for the noise; None: 0 .. B - 1.
    Raises: UserError naming the prompt that does not fit the context; FloatingPointError naming
        row and step of non-finite logits.
    """
    _check(generator, prompts, generator.image_tokens, temperature)
    draw = Draw(
        cfg_weight=cfg_weight,
        temperature=temperature,
        seed=seed,
        top_k=top_k,
        top_p=top_p,
        greedy=greedy,
    )
    ids = _sample_ids(sample_ids, len(prompts), generator.device)
    drawn = decode(generator, prompts, image_request(generator, ids, draw))
    return ImageRollout(drawn.ids, drawn.logprobs, drawn.guided_logprobs)
