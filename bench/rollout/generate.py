"""Pictures from prompts against transformers' own generate(generation_mode="image").

One Janus-shaped model with random weights (512 wide, 8 layers, 576 image tokens of 16,384 codes) in
both libraries, the same prompts, from token ids to pixels: `ours` is sample_images and
decode_images, which is where `python -m engine.generate` spends its time; `transformers` is
JanusForConditionalGeneration.generate and decode_image_tokens. Prompts are of one length, that of a
prompt with its plan, so that nobody pads, and four pictures are drawn of each, as the command does
by default. Both draw from the whole guided distribution. Before anything is timed the greedy tokens
of both must be equal, and the pixels of the same tokens. One run: every repeat times each in turn.

`vs_transformers` is their time / our time, medians; wanted: 2 or more at 8 images.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GenerationConfig, JanusForConditionalGeneration

from bench.rollout.suite import CFG_WEIGHT, TIE, distinct_prompts, mini_policy
from bench.rollout.transformers_images import generated_tokens
from engine.model.policy import Policy
from engine.rollout import sample_images
from engine.settings.options import check_fields, option

PROMPT_TOKENS = 96
PIXEL_TOLERANCE = 1e-4  # of values in [0, 1]
UNDERSTANDING = ("model.vision_model.", "model.aligner.")  # which our policy leaves out


@dataclass(kw_only=True, slots=True)
class Config:
    """Settings of `python -m bench generate`."""

    json: bool = option(False, "print one JSON object instead of a table")
    threads: int = option(0, "torch threads of both; 0: torch's default", at_least=0)
    images: int = option(8, "pictures", at_least=1)
    num_generations: int = option(4, "pictures of each prompt", at_least=1)
    repeats: int = option(3, "timed runs of each", at_least=1)

    def __post_init__(self) -> None:
        check_fields(self)


def run(config: Config) -> dict:
    """The suite's {"rows", "ratios", "correct"}."""
    policy = mini_policy()
    distinct = distinct_prompts(policy, -(-config.images // config.num_generations), PROMPT_TOKENS)
    prompts = [distinct[i // config.num_generations] for i in range(config.images)]
    return compare(policy, prompts, config.repeats)


def compare(policy: Policy, prompts: list[Tensor], repeats: int) -> dict:
    """Check, then time, both libraries on a policy's weights.

    Args:
        prompts: one a picture, of one length.
    Returns: {"rows", "ratios", "correct"}; no speed and no ratio where an output was wrong.
    """
    theirs = in_transformers(policy)
    correct = agree(policy, theirs, prompts)
    providers: dict[str, Callable[[int], Tensor]] = {
        "ours": lambda seed: ours(policy, prompts, seed),
        "transformers": lambda seed: transformers_pictures(theirs, prompts, seed),
    }
    # The check has warmed both up.
    seconds: dict[str, list[float]] = {name: [] for name in providers}
    for repeat in range(repeats if correct else 0):
        for name, pictures in providers.items():
            started = time.perf_counter()
            pictures(repeat)
            seconds[name].append(time.perf_counter() - started)
    text = policy.config.text_config
    images, distinct = len(prompts), len({tuple(prompt.tolist()) for prompt in prompts})
    shape = (
        f"{images} images of {distinct} prompts x {policy.image_tokens} tokens, "
        f"prompt {len(prompts[0])}, hidden "
        f"{text.hidden_size}, layers {text.num_hidden_layers}, "
        f"codebook {policy.config.vq_config.num_embeddings}"
    )
    rows, medians = [], {}
    for name, values in seconds.items():
        row: dict = {"provider": name, "shape": shape, "correct": correct}
        if correct:
            medians[name] = statistics.median(values)
            row |= {
                "seconds": medians[name],
                "fastest_seconds": min(values),
                "images_per_s": images / medians[name],
            }
        rows.append(row)
    ratios = {"vs_transformers": medians["transformers"] / medians["ours"]} if correct else {}
    return {"rows": rows, "ratios": ratios, "correct": correct}


def in_transformers(policy: Policy) -> JanusForConditionalGeneration:
    """transformers' model with the policy's weights; its understanding tower stays random."""
    model = JanusForConditionalGeneration(policy.config).eval()
    loaded = model.load_state_dict(policy.state_dict(), strict=False)
    assert not loaded.unexpected_keys, loaded.unexpected_keys
    assert all(key.startswith(UNDERSTANDING) for key in loaded.missing_keys), loaded.missing_keys
    model.generation_config = GenerationConfig(
        bos_token_id=policy.bos,
        eos_token_id=policy.eos,
        pad_token_id=policy.pad,
        guidance_scale=CFG_WEIGHT,
        generation_kwargs={"boi_token_id": policy.image_start},
    )
    return model


@torch.no_grad()
def ours(policy: Policy, prompts: list[Tensor], seed: int) -> Tensor:
    """(B, 3, H, W) in [0, 1]."""
    ids = sample_images(policy, prompts, cfg_weight=CFG_WEIGHT, seed=seed).ids
    return policy.decode_images(ids)


def transformers_pictures(
    model: JanusForConditionalGeneration, prompts: list[Tensor], seed: int
) -> Tensor:
    """(B, H, W, 3), about -1 to 1."""
    torch.manual_seed(seed)
    with torch.inference_mode():
        return model.decode_image_tokens(
            generated_tokens(model, torch.stack(prompts), do_sample=True)
        )


def agree(policy: Policy, theirs: JanusForConditionalGeneration, prompts: list[Tensor]) -> bool:
    """Whether greedy tokens and the pixels of the same tokens are the same.

    Tokens may part where transformers' own guided logits of the two are a tie.
    """
    expected = generated_tokens(theirs, torch.stack(prompts), do_sample=False)
    got = sample_images(policy, prompts, cfg_weight=CFG_WEIGHT, greedy=True).ids
    for prompt, wanted, found in zip(prompts, expected, got, strict=True):
        apart = (wanted != found).nonzero()
        if len(apart):
            first = int(apart[0])
            scores = guided_logits(theirs, policy.unconditional, prompt, wanted[:first])
            if scores[wanted[first]] - scores[found[first]] > TIE:
                return False
    with torch.inference_mode():
        pixels = theirs.decode_image_tokens(expected).permute(0, 3, 1, 2)
    difference = policy.decode_images(expected) - (pixels.clamp(-1, 1) + 1) / 2
    return difference.abs().max().item() <= PIXEL_TOLERANCE


@torch.inference_mode()
def guided_logits(
    model: JanusForConditionalGeneration,
    unconditional: Callable[[Tensor], Tensor],
    prompt: Tensor,
    image_ids: Tensor,
) -> Tensor:
    """transformers' guided logits (V,) after a prompt and some image tokens."""
    text = model.get_input_embeddings()(torch.stack((prompt, unconditional(prompt))))
    image = model.prepare_embeddings_for_image_generation(image_ids[None]).expand(2, -1, -1)
    hidden = model.model.language_model(
        inputs_embeds=torch.cat((text, image), dim=1)
    ).last_hidden_state[:, -1]
    cond, uncond = model.model.generation_head(hidden)
    return uncond + CFG_WEIGHT * (cond - uncond)
