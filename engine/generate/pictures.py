"""Prompts to plans to pictures: the rollout of both chains of thought.

The command, python -m engine.generate, is in engine/generate/__main__.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.model.policy import Policy
from engine.prompts.conversation import Conversation
from engine.rollout import ImageRollout, TextRollout, sample_images, sample_text

SHORT_PLAN = 40  # tokens; the tiny world's plans are shorter
LONG_PLAN = 512  # T2I-R1's own inference stops a plan there
LONG_CONTEXT = 1024


@dataclass(slots=True)
class Generation:
    """B pictures with the plans they were drawn from.

    Attributes:
        stage1, stage2: B prompts of the text and the image level; stage1 is empty without plans.
        text: completions, one a sample; samples of one plan repeat it; (B, 0) without plans.
        plans: B texts.
        image: image tokens.
        pixels: (B, 3, H, W) in [0, 1].
    """

    stage1: list[Tensor]
    text: TextRollout
    plans: list[str]
    stage2: list[Tensor]
    image: ImageRollout
    pixels: Tensor

    def put(self, rows: Tensor, other: "Generation") -> None:
        """Set the samples `rows` (b,) int64 to those of another generation of b, in its order."""
        places = rows.tolist()
        for i, place in enumerate(places):
            self.plans[place], self.stage2[place] = other.plans[i], other.stage2[i]
            if self.stage1:
                self.stage1[place] = other.stage1[i]
        width = max(self.text.ids.shape[1], other.text.ids.shape[1])
        found = []
        for name in ("ids", "mask", "logprobs"):
            own, new = (
                F.pad(t, (0, width - t.shape[1]))
                for t in (getattr(self.text, name), getattr(other.text, name))
            )
            own = own.clone()
            own[rows] = new
            found.append(own)
        self.text = TextRollout(*found)
        for name in ("ids", "logprobs", "guided_logprobs"):
            getattr(self.image, name)[rows] = getattr(other.image, name)
        self.pixels[rows] = other.pixels


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """How pictures are drawn.

    Attributes:
        seed: of the sampling.
        max_completion_length: longest plan in tokens.
        cfg_weight, temperature: of the image tokens; the temperature is the plans' too.
        images_per_plan: neighbouring samples that share a plan.
        with_plan: False: straight from the bare prompt to the picture, as Janus itself does.
    """

    seed: int
    max_completion_length: int
    cfg_weight: float
    temperature: float = 1.0
    images_per_plan: int = 1
    with_plan: bool = True


def generate(
    policy: Policy,
    conversation: Conversation,
    prompts: Sequence[str],
    sample_ids: Tensor,
    settings: Settings,
) -> Generation:
    """Sample plan and picture for each prompt.

    Args:
        prompts: B texts; the images_per_plan samples that share a plan are adjacent.
        sample_ids: (B,) int64, the identity of each sample's noise.
    """
    stage1: list[Tensor] = []
    plans = [""] * len(prompts)
    if settings.with_plan:
        stage1, text, plans = _plans(policy, conversation, prompts, sample_ids, settings)
    else:
        none = torch.empty((len(prompts), 0), device=policy.device)
        text = TextRollout(none.long(), none.bool(), none)
    stage2 = [
        conversation.stage2(prompt, plan if settings.with_plan else None)
        for prompt, plan in zip(prompts, plans, strict=True)
    ]
    image = sample_images(
        policy,
        stage2,
        cfg_weight=settings.cfg_weight,
        temperature=settings.temperature,
        seed=settings.seed,
        sample_ids=sample_ids,
    )
    pixels = policy.decode_images(image.ids)
    return Generation(stage1, text, plans, stage2, image, pixels)


def _plans(
    policy: Policy,
    conversation: Conversation,
    prompts: Sequence[str],
    sample_ids: Tensor,
    settings: Settings,
) -> tuple[list[Tensor], TextRollout, list[str]]:
    """Stage 1 once for the samples that share a plan, repeated for each of them."""
    every = settings.images_per_plan
    stage1 = [conversation.stage1(p) for p in prompts[::every]]
    text = sample_text(
        policy,
        stage1,
        max_new_tokens=settings.max_completion_length,
        temperature=settings.temperature,
        seed=settings.seed,
        sample_ids=sample_ids[::every],
    )
    plans = conversation.plans(text.ids, text.mask)
    if every > 1:
        stage1 = [ids for ids in stage1 for _ in range(every)]
        plans = [plan for plan in plans for _ in range(every)]
        text = TextRollout(
            *(getattr(text, f).repeat_interleave(every, 0) for f in ("ids", "mask", "logprobs"))
        )
    return stage1, text, plans


def longest_plan(policy: Policy, given: int | None) -> int:
    """Plan tokens to allow: as given, else T2I-R1's 512, or 40 in a context below 1024."""
    if given is not None:
        return given
    return LONG_PLAN if policy.context_length >= LONG_CONTEXT else SHORT_PLAN
