"""Prompt rows of every task type, random pictures and a small BERT vocabulary for the VQA tests."""

import math
import random

import numpy as np
import torch
from PIL import Image
from transformers import BertTokenizer

NOUNS = ("cat", "dog", "red car", "t-shirt", "café", "teddy bear", "猫", "old man's hat")
ADJECTIVES = ("red", "round", "wooden", "très petit", "semi-transparent")
WORDS = (
    "yes no red round wooden cat dog car teddy bear hat old man a of the two left above ?".split()
)
TASKS = ("color", "shape", "texture", "complex", "spatial", "numeracy", "reasoning", "none")


def make_row(i: int) -> dict:
    """The i-th prompt row; the task types take turns."""
    rng = random.Random(i)
    task = TASKS[i % len(TASKS)]
    nouns = [rng.choice(NOUNS) for _ in range(rng.randint(1, 4))]
    described = [f"{rng.choice(ADJECTIVES)} {noun}" for noun in nouns]
    row = {"task_type": task, "nouns": nouns, "attr_nouns": None, "prompt": " and ".join(nouns)}
    if task in ("color", "shape", "texture", "complex"):
        row |= {"attr_nouns": described, "prompt": f"{', '.join(described)}; all here!"}
    elif task == "spatial":
        first, second = nouns = ["cat", rng.choice(NOUNS)]
        info = {"obj1": first, "obj2": second, "locality": "left of"}
        row |= {"nouns": nouns, "spatial_info": info, "prompt": f"a {first} left of a {second}"}
    elif task == "numeracy":
        row |= {"numeracy_info": [{"obj_name": n, "num": 2} for n in nouns], "attr_nouns": []}
    elif task == "reasoning":
        del row["attr_nouns"]
    else:
        row = {"task_type": task, "prompt": f"the {nouns[0]} of someone (№{i})"}
    return row


def make_batch(count: int, height: int, width: int) -> tuple[list[str], torch.Tensor, list[dict]]:
    """Prompts, pictures of 8 bits a channel as fp32 (count, 3, height, width), and rows."""
    rows = [make_row(i) for i in range(count)]
    # Blobs rather than noise: pictures of noise all look alike to a random network.
    rng = torch.Generator().manual_seed(count)
    coarse = torch.rand(count, 3, 4, 5, generator=rng)
    images = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    images = images + 0.2 * torch.rand(count, 3, height, width, generator=rng) - 0.1
    return [r["prompt"] for r in rows], images.mul(255).round().clamp(0, 255) / 255, rows


def pil_picture(image: torch.Tensor) -> Image.Image:
    """(3, H, W) in [0, 1] as a PIL picture."""
    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy().astype(np.uint8))


def bert_tokenizer(folder) -> BertTokenizer:
    """A BERT tokenizer of a few words and all letters, as vocab.txt in `folder`."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789'-,.;!()"
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    pieces += [c for c in letters if c not in pieces] + [f"##{c}" for c in letters]
    (folder / "vocab.txt").write_text("\n".join([*pieces, "[DEC]"]) + "\n")
    return BertTokenizer(vocab=str(folder / "vocab.txt"), do_lower_case=True)


def stir(model: torch.nn.Module, gain: float) -> None:
    """Weights large enough that a random model's answers depend on all that it is given.

    Biases and norms are moved too: a forward could leave out zeros and ones unnoticed.
    """
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.2)
        else:
            fan_in = (
                parameter[0].numel()
                if "patch" in name or "embedding" not in name
                else parameter.shape[-1]
            )
            parameter.data.normal_(std=gain / math.sqrt(fan_in))
