"""Sampling: the semantic-level chain of thought (text) and the token-level one (image tokens).

Each sample is a pure function of (weights, its prompt, seed, its sample id): what else is in the
batch changes nothing but floating-point rounding.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.decode import Decoder
from engine.decode_cuda import StaticDecoder
from engine.errors import UserError
from engine.kv_cache import KVCache, prefill, share
from engine.policy import Policy
from engine.static_step import Sampling
from kernels import cfg_sample
from kernels.dispatch import use_triton
from kernels.philox import gumbel

# Text and image draws of one sample must not share noise: image steps are numbered from here.
IMAGE_STEP = 1 << 20
NOISE_BLOCK = 1 << 16  # Gumbel variables drawn at a time: few enough to stay in cache


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


class _Noise:
    """Gumbel noise for consecutive steps, drawn a few steps at a time."""

    def __init__(self, seed: int, sample_ids: Tensor, vocab: int, first: int, steps: int) -> None:
        self.seed, self.sample_ids, self.vocab = seed, sample_ids, vocab
        self.first, self.steps = first, steps
        self.ahead = max(1, NOISE_BLOCK // (len(sample_ids) * vocab))
        self.block: Tensor | None = None

    def at(self, step: int) -> Tensor:
        """(B, V) fp32 noise of a step; steps are asked for in order."""
        if step % self.ahead == 0:
            count = min(self.ahead, self.steps - step)
            steps = torch.arange(count, device=self.sample_ids.device) + self.first + step
            self.block = gumbel(self.seed, self.sample_ids, steps, self.vocab)
        return self.block[step % self.ahead]


def _check(policy: Policy, prompts: Sequence[Tensor], new_tokens: int, temperature: float) -> None:
    if not prompts:
        raise UserError("prompts: wanted at least one, got none")
    if not temperature > 0:
        raise UserError(f"temperature: wanted > 0, got {temperature}")
    for i, prompt in enumerate(prompts):
        if len(prompt) < 2:
            raise UserError(f"prompt {i}: wanted at least 2 tokens, got {len(prompt)}")
        if len(prompt) + new_tokens > policy.context_length:
            raise UserError(
                f"prompt {i}: {len(prompt)} tokens and {new_tokens} to generate exceed the "
                f"model's context of {policy.context_length}"
            )


def _group(prompts: Sequence[Tensor]) -> tuple[list[Tensor], Tensor, Tensor]:
    """Distinct prompts, each row's prompt once rows are sorted by it, and the sorting order."""
    index: dict[tuple[int, ...], int] = {}
    owner = [index.setdefault(tuple(p.tolist()), len(index)) for p in prompts]
    order = sorted(range(len(owner)), key=owner.__getitem__)  # stable
    distinct = [prompts[owner.index(u)] for u in range(len(index))]
    device = prompts[0].device
    return (
        distinct,
        torch.tensor([owner[i] for i in order], device=device),
        torch.tensor(order, device=device),
    )


def _sample_ids(given: Tensor | None, count: int, device: torch.device) -> Tensor:
    ids = torch.arange(count, device=device) if given is None else given.to(device)
    if ids.shape != (count,):
        raise ValueError(f"sample_ids: wanted ({count},), got {tuple(ids.shape)}")
    return ids


def _require_finite(logprobs: Tensor, order: Tensor) -> None:
    """A NaN or all -inf row of logits shows as a non-finite log-prob; name its first place."""
    bad = (~logprobs.isfinite()).nonzero()
    if len(bad):
        row, step = bad[0].tolist()
        raise FloatingPointError(f"logits of row {int(order[row])} at step {step} are not finite")


@torch.no_grad()
def sample_text(
    policy: Policy,
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
        policy: the policy.
        prompts: B tensors (L_i,) int64; equal prompts share their prefix in the cache.
        sample_ids: (B,) int64 identities for the noise; None: 0 .. B - 1.
    Raises: UserError naming the prompt that does not fit the context; FloatingPointError naming
        row and step of non-finite logits.
    """
    _check(policy, prompts, max_new_tokens, temperature)
    distinct, owner, order = _group(prompts)
    device = policy.device
    count = len(prompts)
    ids = _sample_ids(sample_ids, count, device)[order]
    if use_triton(policy.lm_head.weight):
        sampling = Sampling(
            image=False,
            first_step=0,
            sample_ids=ids,
            temperature=temperature,
            seed=seed,
            greedy=greedy,
        )
        drawn = StaticDecoder(
            policy, distinct, owner, order, steps=max_new_tokens, sampling=sampling
        ).decode()
        back = order.argsort()
        return TextRollout(drawn.ids[back], drawn.mask[back], drawn.logprobs[back])
    lengths = torch.tensor([len(p) for p in distinct], device=device)[owner] - 1
    keys, values = prefill(policy, [p[:-1] for p in distinct])
    prefixes = share(keys, values, lengths, owner=owner)
    cache = KVCache(policy, [prefixes], max_new_tokens)
    decoder = Decoder(policy, cache, lengths, max_new_tokens, image=False)
    noise = _Noise(seed, ids, policy.config.text_config.vocab_size, 0, max_new_tokens)
    tokens = torch.full((count, max_new_tokens), policy.pad, device=device)
    logprobs = torch.zeros((count, max_new_tokens), dtype=torch.float32, device=device)
    mask = torch.zeros((count, max_new_tokens), dtype=torch.bool, device=device)
    alive = torch.ones(count, dtype=torch.bool, device=device)
    current = torch.stack([p[-1] for p in distinct])[owner]
    used = 0
    with torch.inference_mode():
        for step in range(max_new_tokens):
            hidden = decoder.step(policy.embed_text(current), step)
            current, logprob, _ = cfg_sample(
                decoder.logits(hidden),
                None,
                cfg_weight=1.0,
                temperature=temperature,
                seed=seed,
                sample_ids=ids,
                step=step,
                greedy=greedy,
                noise=None if greedy else noise.at(step),
            )
            tokens[:, step] = torch.where(alive, current, policy.pad)
            logprobs[:, step] = torch.where(alive, logprob, 0)
            mask[:, step] = alive
            alive = alive & (current != policy.eos)
            used = step + 1
            if not alive.any():
                break
    _require_finite(logprobs, order)
    back = order.argsort()
    return TextRollout(tokens[back, :used], mask[back, :used], logprobs[back, :used])


@torch.no_grad()
def sample_images(
    policy: Policy,
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
        policy: the policy.
        prompts: B tensors (L_i,) int64, each ending with image-start.
        cfg_weight: guidance weight; the unconditional prompt is [BOS, pad, ..., image-start] of
            the same length.
        sample_ids: (B,) int64 identities for the noise; None: 0 .. B - 1.
    Raises: UserError naming the prompt that does not fit the context; FloatingPointError naming
        row and step of non-finite logits.
    """
    steps = policy.image_tokens
    _check(policy, prompts, steps, temperature)
    distinct, owner, order = _group(prompts)
    device = policy.device
    count = len(prompts)
    ids = _sample_ids(sample_ids, count, device)[order]
    if use_triton(policy.lm_head.weight):
        sampling = Sampling(
            image=True,
            first_step=IMAGE_STEP,
            sample_ids=ids,
            temperature=temperature,
            seed=seed,
            greedy=greedy,
            cfg_weight=cfg_weight,
            top_k=top_k,
            top_p=top_p,
        )
        drawn = StaticDecoder(
            policy, distinct, owner, order, steps=steps, sampling=sampling
        ).decode()
        back = order.argsort()
        return ImageRollout(drawn.ids[back], drawn.logprobs[back], drawn.guided_logprobs[back])
    lengths = torch.tensor([len(p) for p in distinct], device=device)[owner] - 1
    # Every unconditional prefix is a head of the longest one, image-start being a suffix token.
    blank = policy.unconditional(max(distinct, key=len))[:-1]
    keys, values = prefill(policy, [*(p[:-1] for p in distinct), blank])
    cond = share(keys[:, :-1], values[:, :-1], lengths, owner=owner)
    uncond = share(keys[:, -1:], values[:, -1:], lengths, owner=torch.zeros_like(owner))
    cache = KVCache(policy, [cond, uncond], steps)
    decoder = Decoder(policy, cache, lengths.repeat(2), steps, image=True)
    noise = _Noise(seed, ids, policy.config.vq_config.num_embeddings, IMAGE_STEP, steps)
    table = policy.image_table()
    tokens = torch.empty((count, steps), dtype=torch.int64, device=device)
    logprobs = torch.empty((2, count, steps), dtype=torch.float32, device=device)
    last = torch.stack([p[-1] for p in distinct])[owner]
    x = policy.embed_text(last).repeat(2, 1)  # rows: conditional, then unconditional
    with torch.inference_mode():  # what it writes to was made outside
        for step in range(steps):
            logits = decoder.logits(decoder.step(x, step))
            current, logprobs[0, :, step], logprobs[1, :, step] = cfg_sample(
                logits[:count],
                logits[count:],
                cfg_weight=cfg_weight,
                temperature=temperature,
                seed=seed,
                sample_ids=ids,
                step=IMAGE_STEP + step,
                top_k=top_k,
                top_p=top_p,
                greedy=greedy,
                noise=None if greedy else noise.at(step),
            )
            tokens[:, step] = current
            x = table[current].repeat(2, 1)
    _require_finite(logprobs.sum(0), order)
    back = order.argsort()
    return ImageRollout(tokens[back], logprobs[0, back], logprobs[1, back])
