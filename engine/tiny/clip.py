"""Train the tiny CLIP of the human-preference slot: prompts against rendered scenes.

Besides the other captions of the batch, every picture has to reject its own caption with one
word changed; without those a CLIP learns a bag of words and rewards the wrong binding.
"""

import json
import math
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.model import CustomTextCLIP
from safetensors.torch import save_file
from torch import Tensor

from engine.tiny.prompts import COLOR_RIDDLES, NUMBERS, SHAPE_RIDDLES, TASK_TYPES, draw
from engine.tiny.world import COLORS, SHAPES, SIZES, TEXTURES, corrupt, plan_text, render
from rewards.hps import CONFIG_FILE, TOKENIZER_FILE, WEIGHTS_FILE, FolderTokenizer

BATCH = 48
NEGATIVES = 1  # one-word-wrong captions a picture; they teach more than further pictures
LEARNING_RATE = 2e-3
WEIGHT_DECAY = 0.02
PLAN_SHARE = 0.2  # batches captioned by the plan, so that the words for places are learnt too
EVALUATED = 480  # pictures behind each reported accuracy
MAX_LOGIT_SCALE = math.log(100)
IN_COLOUR = " in the colour of "
SWAPS = (("left", "right"), ("top", "bottom"), ("above", "below"), ("upper", "lower"))
KINDS = (SHAPES, tuple(COLORS), TEXTURES, tuple(SIZES), tuple(NUMBERS.values()), *SWAPS)


def model_config(tokenizer: FolderTokenizer) -> dict[str, Any]:
    """The open_clip model configuration for a tokenizer."""
    return {
        "embed_dim": 64,
        "custom_text": True,
        "vision_cfg": {
            "image_size": 64,
            "patch_size": 8,
            "layers": 3,
            "width": 96,
            "head_width": 24,
        },
        "text_cfg": {
            "context_length": tokenizer.context_length,
            "vocab_size": tokenizer.vocab_size,
            "layers": 3,
            "width": 96,
            "heads": 4,
        },
    }


def wrong_caption(text: str, rng: random.Random) -> str:
    """The caption with one word (in a riddle: one clue) changed so that it is no longer true."""
    if IN_COLOUR in text:
        return _wrong_riddle(text, rng)
    words = text.split(" ")
    places = []  # (index, the word as its kind knows it, its kind)
    for i, word in enumerate(words):
        bare = word.rstrip(",")
        for kind in KINDS:
            known = next((w for w in (bare, bare[:-1], bare[:-2]) if w in kind), None)
            if known is not None:
                places.append((i, known, kind))
    i, known, kind = rng.choice(places)
    other = rng.choice([w for w in kind if w != known])
    words[i] = words[i].replace(known, other, 1)
    # Where the new word stands elsewhere too, change that one back: "a blue circle and a red
    # square" is a better lie about "a red circle and a blue square" than two blue things.
    for j, twin, twin_kind in places:
        if j != i and twin == other and twin_kind is kind and rng.random() < 0.5:
            words[j] = words[j].replace(other, known, 1)
    return " ".join(words)


def _wrong_riddle(text: str, rng: random.Random) -> str:
    shape, thing = text.split(IN_COLOUR)
    if rng.random() < 0.5:
        shape = rng.choice([r for group in SHAPE_RIDDLES.values() if shape not in group
                            for r in group])  # fmt: skip
    else:
        thing = rng.choice([r for group in COLOR_RIDDLES.values() if thing not in group
                            for r in group])  # fmt: skip
    return shape + IN_COLOUR + thing


def draw_batch(
    count: int,
    rng: random.Random,
    *,
    negatives: int = 1,
    plans: bool = False,
    allow_held_out: bool = False,
) -> tuple[Tensor, list[str], list[str], list[str]]:
    """Pictures with a right caption and some wrong ones each.

    Returns: (count, 3, 64, 64) float in [0, 1]; count captions; count * negatives wrong
        captions, those of a picture side by side; count task types.
    """
    pictures, captions, tasks = [], [], []
    for _ in range(count):
        task = rng.choice(TASK_TYPES)
        row, scene = draw(task, rng, allow_held_out=allow_held_out)
        if plans:
            # Clean prompts never show two sizes of a kind, say; careless scenes do.
            scene = corrupt(scene, rng, 0.3)
        pictures.append(torch.from_numpy(render(scene)))
        captions.append(plan_text(scene) if plans else row["prompt"])
        tasks.append(task)
    images = torch.stack(pictures).permute(0, 3, 1, 2).float() / 255
    wrong = [wrong_caption(c, rng) for c in captions for _ in range(negatives)]
    return images, captions, wrong, tasks


def soften(images: Tensor, generator: torch.Generator) -> Tensor:
    """Blurred, tinted and noisy, as the image tokenizer's decoder draws."""
    count = len(images)
    share = 0.5 * torch.rand(count, 1, 1, 1, generator=generator)
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
    blurred = F.avg_pool2d(padded, 3, stride=1)
    tint = 0.04 * torch.randn(count, 3, 1, 1, generator=generator)
    noise = 0.03 * torch.randn(images.shape, generator=generator)
    return (images + share * (blurred - images) + tint + noise).clamp(0, 1)


def _encode(model: CustomTextCLIP, tokens: Tensor) -> Tensor:
    """Text features of short captions without the work of their padding.

    The causal mask keeps padding from being seen, so cutting it changes nothing; open_clip
    only wants a mask of the same length.
    """
    length = int((tokens != 0).nonzero()[:, 1].max()) + 1
    mask = model.text.attn_mask
    model.text.attn_mask = mask[:length, :length]
    features = model.encode_text(tokens[:, :length], normalize=True)
    model.text.attn_mask = mask
    return features


def train_clip(
    out_dir: Path,
    *,
    tokenizer_path: Path,
    steps: int = 900,
    seed: int = 0,
    log: Callable[[str], None] = print,
) -> dict[str, float]:
    """Train and write the open_clip folder (config, safetensors, tokenizer).

    Args:
        out_dir: created; its three files are overwritten.
        tokenizer_path: a `tokenizer.json` of the tokenizers library.
        log: receives a line now and then.
    Returns: share of right captions preferred to one-word-wrong ones, by task type, with
        `mean`, and `held_out` for the combinations that training never shows.
    """
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    tokenize = FolderTokenizer(tokenizer_path, context_length=40)
    config = model_config(tokenize)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CustomTextCLIP(**{k: v for k, v in config.items() if k != "custom_text"})
    mean = torch.tensor(OPENAI_DATASET_MEAN).view(1, 3, 1, 1)
    std = torch.tensor(OPENAI_DATASET_STD).view(1, 3, 1, 1)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0}],
        betas=(0.9, 0.98),
    )
    start = time.perf_counter()
    for step in range(steps):
        warm, done = min(1.0, (step + 1) / 50), step / steps
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * warm * (0.5 + 0.5 * math.cos(math.pi * done))
        plans = rng.random() < PLAN_SHARE
        images, captions, wrong, _ = draw_batch(BATCH, rng, negatives=NEGATIVES, plans=plans)
        pixels = (soften(images, generator) - mean) / std
        image = model.encode_image(pixels, normalize=True)  # (N, D)
        text = _encode(model, tokenize(captions + wrong))  # (N + N * NEGATIVES, D)
        logits = model.logit_scale.exp() * image @ text.T
        targets = torch.arange(BATCH)
        # Each picture's own captions again, the right one first: (N, 1 + NEGATIVES)
        own = logits[:, BATCH:].view(BATCH, BATCH, NEGATIVES)[targets, targets]
        own = torch.cat([logits.diagonal()[:, None], own], 1)
        loss = (
            F.cross_entropy(logits, targets)
            + F.cross_entropy(logits[:, :BATCH].T, targets)
            + F.cross_entropy(own, torch.zeros_like(targets))
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=MAX_LOGIT_SCALE)
        if (step + 1) % 50 == 0 or step + 1 == steps:
            right = (own.argmax(1) == 0).float().mean()
            seconds = time.perf_counter() - start
            log(
                f"clip {step + 1}/{steps} loss {loss.item():.3f} "
                f"right over wrong {right:.3f} {seconds:.0f} s"
            )
    out_dir.mkdir(parents=True, exist_ok=True)
    state = {key: value.detach().contiguous() for key, value in model.state_dict().items()}
    save_file(state, out_dir / WEIGHTS_FILE)
    preprocess = {"mean": OPENAI_DATASET_MEAN, "std": OPENAI_DATASET_STD}
    content = {"model_cfg": config, "preprocess_cfg": preprocess}
    (out_dir / CONFIG_FILE).write_text(json.dumps(content, indent=2) + "\n")
    shutil.copyfile(tokenizer_path, out_dir / TOKENIZER_FILE)

    def accuracy(held_out: bool) -> dict[str, float]:
        return retrieval_accuracy(model.eval(), tokenize, held_out=held_out)

    return {**accuracy(False), "held_out": accuracy(True)["mean"]}


@torch.inference_mode()
def retrieval_accuracy(
    model: CustomTextCLIP, tokenize: FolderTokenizer, *, held_out: bool
) -> dict[str, float]:
    """How often a picture is nearer to its caption than to a one-word-wrong one.

    Returns: the share by task type, and `mean` over all pictures.
    """
    images, captions, wrong, tasks = draw_batch(
        EVALUATED, random.Random(-1), allow_held_out=held_out
    )
    mean = torch.tensor(OPENAI_DATASET_MEAN).view(1, 3, 1, 1)
    std = torch.tensor(OPENAI_DATASET_STD).view(1, 3, 1, 1)
    image = model.encode_image((images - mean) / std, normalize=True)
    text = model.encode_text(tokenize(captions + wrong), normalize=True)
    right = ((image * text[:EVALUATED]).sum(-1) > (image * text[EVALUATED:]).sum(-1)).float()
    by_task = {
        task: right[[i for i, t in enumerate(tasks) if t == task]].mean().item()
        for task in TASK_TYPES
        if task in tasks
    }
    return {"mean": right.mean().item(), **by_task}
