"""Image rollout against the published loop's algorithm, on the same weights and prompts.

Providers: `ours` is engine.rollout.sample_images; `eager_loop` is the published algorithm
(bench/rollout/eager_loop.py) in chunks of 32 rows as published; `eager_unsplit` is it with all rows at
once. Same weights, prompts, number of images, threads and process; every repeat runs each in turn.
Before it is timed, each engine must agree with the other about greedy and sampled tokens.

With --dtype bfloat16 the agreement is that of the project's ops: our log-probs may be twice as far from an
fp32 loop on the same weights as the bf16 loop's are. `eager_fp32` is that fp32 loop, the faster peer on a
CPU that has no 16-bit products.
"""

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import JanusConfig, JanusVisionConfig, JanusVQVAEConfig, LlamaConfig

from bench.rollout.eager_loop import PUBLISHED_ROWS, EagerLoop
from engine.model.policy import Policy
from engine.policy import load_policy
from engine.rollout import sample_images
from engine.settings.options import check_fields, option

CFG_WEIGHT = 5.0
LOGPROB_TOLERANCE = 1e-3  # nats; guidance of 5 enlarges fp32 rounding up to ninefold
TIE = 1e-3  # logits closer than this may be ordered either way


@dataclass(kw_only=True, slots=True)
class Config:
    """Settings of `python -m bench rollout`."""

    json: bool = option(False, "print one JSON object instead of a table")
    threads: int = option(0, "torch threads of every provider; 0: torch's default", at_least=0)
    images: int = option(64, "images of the tiny model", at_least=1)
    prompts: int = option(0, "distinct prompts of the tiny model; 0: one an image", at_least=0)
    repeats: int = option(5, "timed runs of each provider on the tiny model", at_least=1)
    mini_repeats: int = option(2, "timed runs of each provider on the mini model", at_least=1)
    skip_mini: bool = option(False, "leave the mini model out")
    dtype: Literal["float32", "bfloat16"] = option("float32", "type of the weights")

    def __post_init__(self) -> None:
        check_fields(self)


def run(config: Config) -> dict:
    """The suite's {"rows", "ratios", "correct"}."""
    dtype = getattr(torch, config.dtype)
    policy = load_policy("tiny", dtype=dtype)
    distinct = distinct_prompts(policy, min(config.prompts or config.images, config.images), 40)
    prompts = [distinct[i * len(distinct) // config.images] for i in range(config.images)]
    rows, ratios = compare(policy, prompts, "tiny", repeats=config.repeats, checked=20)
    if not config.skip_mini:
        policy = mini_policy().to(dtype)
        prompts = distinct_prompts(policy, 8, 96)
        mini_rows, mini_ratios = compare(
            policy, prompts, "mini", repeats=config.mini_repeats, checked=1, unsplit=False
        )
        rows += mini_rows
        ratios |= {f"mini_{name}": ratio for name, ratio in mini_ratios.items()}
    return {"rows": rows, "ratios": ratios, "correct": all(row["correct"] for row in rows)}


def mini_policy() -> Policy:
    """Random weights in a shape between the tiny model's and Janus-Pro-1B's."""
    width, grid = 512, 24
    text = LlamaConfig(
        vocab_size=1024,
        hidden_size=width,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=1024,
    )
    # Janus takes the image tokens' grid from the vision tower, which the policy leaves out.
    vision = JanusVisionConfig(image_size=grid, patch_size=1, num_hidden_layers=1)
    vq = JanusVQVAEConfig(
        embed_dim=8,
        num_embeddings=16_384,
        base_channels=32,
        latent_channels=32,
        channel_multiplier=[1, 1],
        num_res_blocks=1,
        num_patches=grid,
        projection_dim=width,
        image_token_embed_dim=width,
    )
    torch.manual_seed(0)
    policy = Policy(JanusConfig(text_config=text, vision_config=vision, vq_config=vq)).eval()
    policy.freeze_generation()
    return policy


def distinct_prompts(policy: Policy, count: int, length: int) -> list[Tensor]:
    """Random prompts of one length, all distinct as stage-2 prompts with their plans are."""
    random = torch.Generator().manual_seed(0)
    words = torch.randint(
        8, policy.config.text_config.vocab_size, (count, length), generator=random
    )
    words[:, 0], words[:, -1] = policy.bos, policy.image_start
    return list(words)


def compare(
    policy: Policy,
    prompts: list[Tensor],
    model: str,
    *,
    repeats: int,
    checked: int,
    unsplit: bool = True,
) -> tuple[list[dict], dict[str, float]]:
    """Check, then time, the providers on a model.

    Args:
        checked: prompts on which the engines must agree; more than 16 make two chunks.
        unsplit: also time the loop with all rows in one chunk, which is the same where the
            prompts fit one. The check alone warms up such small batches.
    Returns: rows, and peer time / our time by `vs_<peer>`; no ratio where an output was wrong.
    """
    loop = EagerLoop(policy)
    chunks: dict[str, int | None] = {"eager_loop": PUBLISHED_ROWS}
    if unsplit:
        chunks["eager_unsplit"] = None
    few, loops = prompts[:checked], dict.fromkeys(chunks, loop)
    if policy.dtype == torch.float32:
        agreement = {peer: disagreement(policy, loop, few, rows) for peer, rows in chunks.items()}
    else:
        exact = EagerLoop(copy.deepcopy(policy).float())
        agreement = {
            peer: (excess(policy, loop, exact, few, rows),) for peer, rows in chunks.items()
        }
        chunks["eager_fp32"], loops["eager_fp32"] = PUBLISHED_ROWS, exact
        agreement["eager_fp32"] = (0.0,)  # it is what the others are held to
    correct = {peer: all(e <= 1 for e in errors) for peer, errors in agreement.items()}
    # Ours is checked against every peer, so it is wrong if any of them disagrees.
    correct = {"ours": all(correct.values()), **correct}
    providers: dict[str, Callable[[int], object]] = {
        "ours": lambda seed: sample_images(policy, prompts, cfg_weight=CFG_WEIGHT, seed=seed)
    }
    for peer, rows in chunks.items():
        providers[peer] = lambda seed, rows=rows, loop=loops[peer]: loop.sample(
            prompts, cfg_weight=CFG_WEIGHT, chunk_rows=rows
        )
    seconds = _time(providers, repeats, warm_up=unsplit)
    width = policy.config.text_config.hidden_size
    shape = (
        f"{model}: {len(prompts)} images x {policy.image_tokens} tokens, prompt {len(prompts[0])}, "
    )
    shape += f"hidden {width}, codebook {policy.config.vq_config.num_embeddings}"
    rows = []
    for provider, values in seconds.items():
        row: dict = {"provider": provider, "shape": shape, "correct": correct[provider]}
        if correct[provider]:
            median = statistics.median(values)
            row |= {
                "seconds": median,
                "fastest_seconds": min(values),
                "images_per_s": len(prompts) / median,
                "tokens_per_s": len(prompts) * policy.image_tokens / median,
            }
        rows.append(row)
    by_name = {row["provider"]: row for row in rows}
    ratios = {
        f"vs_{peer}": by_name[peer]["seconds"] / by_name["ours"]["seconds"]
        for peer in chunks
        if correct["ours"] and correct[peer]
    }
    return rows, ratios


def disagreement(
    policy: Policy, loop: EagerLoop, prompts: list[Tensor], chunk_rows: int | None
) -> tuple[float, float]:
    """How far the loop is from our tokens and log-probs, as shares of what is allowed.

    Our greedy tokens are fed to the loop. When each has the loop's highest guided logit, the
    loop left alone would by induction have drawn the same sequence.
    Returns: (greedy gap / TIE, largest log-prob error / LOGPROB_TOLERANCE); both at most 1 is
        agreement. NaN never is.
    """
    greedy = sample_images(policy, prompts, cfg_weight=CFG_WEIGHT, greedy=True)
    scored = loop.score(prompts, greedy.ids, cfg_weight=CFG_WEIGHT, chunk_rows=chunk_rows)
    gap = scored.gaps.max().item()
    drawn = sample_images(policy, prompts, cfg_weight=CFG_WEIGHT, seed=1)
    scored = loop.score(prompts, drawn.ids, cfg_weight=CFG_WEIGHT, chunk_rows=chunk_rows)
    errors = torch.stack(
        (scored.logprobs - drawn.logprobs, scored.guided_logprobs - drawn.guided_logprobs)
    )
    return gap / TIE, errors.abs().max().item() / LOGPROB_TOLERANCE


def excess(
    policy: Policy,
    loop: EagerLoop,
    exact: EagerLoop,
    prompts: list[Tensor],
    chunk_rows: int | None,
) -> float:
    """How far our 16-bit log-probs are from an fp32 loop's, as a share of what is allowed.

    That is twice what the 16-bit loop is off by, on average over our drawn tokens.
    """
    drawn = sample_images(policy, prompts, cfg_weight=CFG_WEIGHT, seed=1)
    scored, held = (
        one.score(prompts, drawn.ids, cfg_weight=CFG_WEIGHT, chunk_rows=chunk_rows)
        for one in (loop, exact)
    )
    worst = 0.0
    for name in ("logprobs", "guided_logprobs"):
        truth = getattr(held, name)
        ours, theirs = (
            (getattr(found, name).float() - truth).abs().mean().item() for found in (drawn, scored)
        )
        worst = max(worst, ours / (2 * theirs))
    return worst


def _time(
    providers: dict[str, Callable[[int], object]], repeats: int, *, warm_up: bool
) -> dict[str, list[float]]:
    """Seconds of each run; the providers take turns so that a slow minute hits all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in providers}
    if warm_up:
        for sample in providers.values():
            sample(0)
    for repeat in range(repeats):
        for name, sample in providers.items():
            started = time.perf_counter()
            sample(repeat)
            seconds[name].append(time.perf_counter() - started)
    return seconds
