"""Supervised pretraining of the tiny policy: prompt -> plan text -> image tokens, and without plan.

The captions are those of a careless annotator: in the last part of the training, plans misname
what the prompt asks for and pictures differ from their plans, as in data gathered from the web.
The policy learns those habits with everything else, which is what reinforcement learning then
has to undo.
"""

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.model.policy import Policy
from engine.model.sequences import Sequences
from engine.prompts.conversation import Conversation
from engine.prompts.data import PromptTemplate
from engine.tiny.prompts import TASK_TYPES, draw
from engine.tiny.vq import encode
from engine.tiny.world import Scene, corrupt, plan_text, render

UNCONDITIONAL_SHARE = 0.1  # image examples whose prompt is dropped, for guidance
BARE_SHARE = 0.3  # of the others, those without a plan: Janus-Pro draws from either
RIDDLE_FACTOR = 3.0  # riddles are noted down even more carelessly
# Riddles count twice: no other task type shows a single object in the middle.
TASKS_DRAWN = (*TASK_TYPES, "riddle")


@dataclass(slots=True)
class Example:
    """One training example: a prompt, a plan and the picture's tokens."""

    prompt: str
    plan: str
    image_ids: np.ndarray  # (64,) int16


@dataclass(slots=True)
class Noise:
    """How careless the annotator is: the `rate` of `world.corrupt`."""

    plan: float = 0.0
    image: float = 0.0


@torch.no_grad()
def make_examples(
    policy: Policy, count: int, noise: Noise, rng: random.Random, banned: set[str]
) -> list[Example]:
    """Draw prompts (none of `banned`), note plans, render and tokenise the pictures."""
    drawn: list[tuple[str, str, Scene]] = []
    while len(drawn) < count:
        task_type = rng.choice(TASKS_DRAWN)
        row, scene = draw(task_type, rng, allow_held_out=True)
        if row["prompt"] in banned:
            continue
        rate = noise.plan * (RIDDLE_FACTOR if task_type == "riddle" else 1.0)
        planned = corrupt(scene, rng, rate)
        drawn.append((row["prompt"], plan_text(planned), corrupt(planned, rng, noise.image)))
    examples = []
    for start in range(0, count, 64):
        part = drawn[start : start + 64]
        pixels = torch.from_numpy(np.stack([render(scene) for _, _, scene in part]))
        pixels = pixels.permute(0, 3, 1, 2).float().div(127.5).sub(1)
        ids = encode(policy.model.vqmodel, pixels).to(torch.int16).numpy()
        examples += [Example(p, q, row) for (p, q, _), row in zip(part, ids, strict=True)]
    return examples


def batches(examples: list[Example], size: int, rng: random.Random) -> Iterator[list[Example]]:
    """Endless shuffled batches."""
    while True:
        order = rng.sample(range(len(examples)), len(examples))
        for start in range(0, len(order) - size + 1, size):
            yield [examples[i] for i in order[start : start + size]]


def text_loss(policy: Policy, conversation: Conversation, batch: list[Example]) -> Tensor:
    """Mean cross-entropy of the plan tokens, nats."""
    plans = [torch.tensor([*conversation.encode(" " + e.plan), policy.eos]) for e in batch]
    lengths = torch.tensor([len(p) for p in plans])
    targets = torch.nn.utils.rnn.pad_sequence(plans, batch_first=True)
    mask = torch.arange(targets.shape[1]) < lengths[:, None]
    prompts = [conversation.stage1(e.prompt) for e in batch]
    hidden = policy.completion_hidden(Sequences("semantic", prompts, targets))
    return F.cross_entropy(policy.lm_head(hidden[mask]), targets[mask])


def image_loss(
    policy: Policy, conversation: Conversation, batch: list[Example], rng: random.Random
) -> Tensor:
    """Mean cross-entropy of the image tokens, nats; some prompts are dropped for guidance."""
    prompts = []
    for example in batch:
        plan = None if rng.random() < BARE_SHARE else example.plan
        prompt = conversation.stage2(example.prompt, plan)
        dropped = rng.random() < UNCONDITIONAL_SHARE
        prompts.append(policy.unconditional(prompt) if dropped else prompt)
    image_ids = torch.from_numpy(np.stack([e.image_ids for e in batch])).long()
    hidden = policy.completion_hidden(Sequences("token", prompts, image_ids))
    logits = policy.model.generation_head(hidden)
    return F.cross_entropy(logits.flatten(0, 1), image_ids.flatten())


def initialise(policy: Policy) -> None:
    """Fresh weights for everything but the image tokenizer, which must be trained already."""
    for name, module in policy.named_modules():
        if name.startswith("model.vqmodel"):
            continue
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=module.in_features**-0.5 * 0.7)
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)
        elif isinstance(module, torch.nn.Embedding):
            torch.nn.init.normal_(module.weight, std=0.3)
    for layer in policy.model.language_model.decoder_layers():
        for out in (layer.self_attn.o_proj, layer.mlp.down_proj):
            out.weight.data.mul_((2 * len(policy.model.language_model.layers)) ** -0.5)
    policy.model.generation_embeddings.weight.data.copy_(
        policy.model.vqmodel.quantize.embedding.weight
    )


WARMUP = 50  # steps


class Schedule(NamedTuple):
    """Lengths and rates of a training.

    Attributes:
        text_every: plans are learnt long before pictures are: the text level trains as seldom.
    """

    steps: int
    batch_size: int
    peak_lr: float
    text_every: int = 1


def train(
    policy: Policy,
    template: PromptTemplate,
    examples: list[Example],
    *,
    schedule: Schedule,
    seed: int,
    log: Callable[[str], None],
) -> None:
    """Train in place with AdamW, warm-up and cosine decay to a tenth."""
    steps = schedule.steps
    rng = random.Random(seed)
    parameters = []
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_(not name.startswith("model.vqmodel"))
        if parameter.requires_grad:
            parameters.append(parameter)
    optimizer = torch.optim.AdamW(
        parameters, lr=schedule.peak_lr, betas=(0.9, 0.98), weight_decay=0.01
    )

    def scale(step: int) -> float:
        share = min(1.0, step / steps)
        return min(1.0, (step + 1) / WARMUP) * (0.1 + 0.45 * (1 + float(np.cos(np.pi * share))))

    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, scale)
    conversation = Conversation(policy, template)
    started = time.monotonic()
    source = batches(examples, schedule.batch_size, rng)
    text = torch.full((), float("nan"))  # until the first step that trains it
    for step in range(1, steps + 1):
        batch = next(source)
        optimizer.zero_grad(set_to_none=True)
        if step % schedule.text_every == 0:
            text = text_loss(policy, conversation, batch)
            text.backward()
        image = image_loss(policy, conversation, batch, rng)
        image.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        rate.step()
        if step % 50 == 0 or step == steps:
            log(
                f"policy {step}/{steps} text {text.item():.3f} image {image.item():.3f} nats "
                f"{time.monotonic() - started:.0f} s"
            )
    policy.freeze_generation()
