"""ImageReward.pt in small: names and shapes, random weights, and the authors' score as plain maths."""

import math
import re

import torch
import torch.nn.functional as F
from torchvision.transforms import (
    CenterCrop,
    Compose,
    InterpolationMode,
    Normalize,
    Resize,
    ToTensor,
)

from tests.rewards.vqa_problem import pil_picture


def official_shapes(vision, text, *, grid, patch, depths, inner, vocabulary, positions):
    """Names and shapes of ImageReward.pt: BLIP_Pretrain's under "blip." and the head's.

    Args: depths, inner: of the tower and of the text encoder.
    """
    shapes = {
        "cls_token": (1, 1, vision),
        "pos_embed": (1, grid * grid + 1, vision),
        "patch_embed.proj.weight": (vision, 3, patch, patch),
        "patch_embed.proj.bias": (vision,),
    }

    def linear(name, rows, columns):
        shapes.update({f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)})

    def norm(name, width):
        shapes.update({f"{name}.weight": (width,), f"{name}.bias": (width,)})

    for i in range(depths[0]):
        norm(f"blocks.{i}.norm1", vision)
        linear(f"blocks.{i}.attn.qkv", 3 * vision, vision)
        linear(f"blocks.{i}.attn.proj", vision, vision)
        norm(f"blocks.{i}.norm2", vision)
        linear(f"blocks.{i}.mlp.fc1", inner[0], vision)
        linear(f"blocks.{i}.mlp.fc2", vision, inner[0])
    norm("norm", vision)
    shapes = {f"blip.visual_encoder.{key}": shape for key, shape in shapes.items()}
    at = "blip.text_encoder.embeddings"
    shapes[f"{at}.position_ids"] = (1, positions)
    shapes[f"{at}.word_embeddings.weight"] = (vocabulary, text)
    shapes[f"{at}.position_embeddings.weight"] = (positions, text)
    norm(f"{at}.LayerNorm", text)
    for i in range(depths[1]):
        at = f"blip.text_encoder.encoder.layer.{i}"
        for kind, source in (("attention", text), ("crossattention", vision)):
            linear(f"{at}.{kind}.self.query", text, text)
            linear(f"{at}.{kind}.self.key", text, source)
            linear(f"{at}.{kind}.self.value", text, source)
            linear(f"{at}.{kind}.output.dense", text, text)
            norm(f"{at}.{kind}.output.LayerNorm", text)
        linear(f"{at}.intermediate.dense", inner[1], text)
        linear(f"{at}.output.dense", text, inner[1])
        norm(f"{at}.output.LayerNorm", text)
    linear("blip.vision_proj", 256, vision)
    linear("blip.text_proj", 256, text)
    for i, rows, columns in (
        (0, 1024, text),
        (2, 128, 1024),
        (4, 64, 128),
        (6, 16, 64),
        (7, 1, 16),
    ):
        linear(f"mlp.layers.{i}", rows, columns)
    return shapes


def official_state(shapes):
    """Random weights, large enough that a score depends on all of picture and prompt."""
    rng = torch.Generator().manual_seed(0)
    state = {}
    for key, shape in shapes.items():
        noise = torch.randn(shape, generator=rng)
        if key.endswith("position_ids"):
            state[key] = torch.arange(shape[1])[None]
        elif len(shape) == 1:
            state[key] = 0.2 * noise + ("norm" in key.lower() and key.endswith("weight"))
        elif re.search("cls_token|pos_embed|embeddings", key):
            state[key] = 0.5 * noise
        else:
            gain = 1 if key.startswith("mlp") else 1.5
            state[key] = noise * gain / math.sqrt(math.prod(shape[1:]))
    return state


class Plain:
    """The authors' `score`: PIL, prompts padded to 35, one picture at a time, from the state dict."""

    def __init__(self, state, tokenizer, size):
        self.state, self.tokenizer = state, tokenizer
        self.transform = Compose(
            [
                Resize(size, interpolation=InterpolationMode.BICUBIC),
                CenterCrop(size),
                ToTensor(),
                Normalize(
                    (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
                ),
            ]
        )

    def depth(self, layers):
        found = [re.match(re.escape(layers) + r"\.(\d+)\.", key) for key in self.state]
        return 1 + max(int(match[1]) for match in found if match)

    def linear(self, x, name):
        return F.linear(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def norm(self, x, name, eps):
        weight, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)

    def attend(self, q, k, v, bias=0.0):
        q, k, v = (x.unflatten(-1, (-1, 64)).transpose(1, 2) for x in (q, k, v))
        weights = (q @ k.mT / 8 + bias).softmax(-1)
        return (weights @ v).transpose(1, 2).flatten(2)

    def tower(self, pixels):
        at = "blip.visual_encoder"
        kernel = self.state[f"{at}.patch_embed.proj.weight"]
        bias = self.state[f"{at}.patch_embed.proj.bias"]
        x = F.conv2d(pixels, kernel, bias, stride=kernel.shape[-1]).flatten(2).mT
        x = torch.cat((self.state[f"{at}.cls_token"].to(x.dtype), x), 1)
        x = x + self.state[f"{at}.pos_embed"]
        for i in range(self.depth(f"{at}.blocks")):
            block = f"{at}.blocks.{i}"
            qkv = self.linear(self.norm(x, f"{block}.norm1", 1e-6), f"{block}.attn.qkv")
            x = x + self.linear(self.attend(*qkv.chunk(3, -1)), f"{block}.attn.proj")
            h = self.linear(self.norm(x, f"{block}.norm2", 1e-6), f"{block}.mlp.fc1")
            x = x + self.linear(F.gelu(h), f"{block}.mlp.fc2")
        return self.norm(x, f"{at}.norm", 1e-6)

    def read(self, ids, mask, image):
        at = "blip.text_encoder"
        x = self.state[f"{at}.embeddings.word_embeddings.weight"][ids]
        x = x + self.state[f"{at}.embeddings.position_embeddings.weight"][: ids.shape[1]]
        x = self.norm(x, f"{at}.embeddings.LayerNorm", 1e-12)
        for i in range(self.depth(f"{at}.encoder.layer")):
            layer = f"{at}.encoder.layer.{i}"
            for kind, source, bias in (
                ("attention", None, (1.0 - mask.float())[:, None, None] * -10000.0),
                ("crossattention", image, 0.0),
            ):
                name = f"{layer}.{kind}"
                source = x if source is None else source
                q = self.linear(x, f"{name}.self.query")
                k, v = (self.linear(source, f"{name}.self.{part}") for part in ("key", "value"))
                h = self.linear(self.attend(q, k, v, bias), f"{name}.output.dense")
                x = self.norm(h + x, f"{name}.output.LayerNorm", 1e-12)
            h = F.gelu(self.linear(x, f"{layer}.intermediate.dense"))
            h = self.linear(h, f"{layer}.output.dense")
            x = self.norm(h + x, f"{layer}.output.LayerNorm", 1e-12)
        return x

    @torch.no_grad()
    def score(self, prompt, image, dtype=torch.float32):
        text = self.tokenizer(
            prompt, padding="max_length", truncation=True, max_length=35, return_tensors="pt"
        )
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            seen = self.tower(self.transform(pil_picture(image))[None])
            x = self.read(text.input_ids, text.attention_mask, seen)
        x = x[:, 0].float()
        for i in (0, 2, 4, 6, 7):
            x = self.linear(x, f"mlp.layers.{i}")
        return float((x - 0.16717362830052426) / 1.0333394966054072)

    def scores(self, prompts, images, rows, dtype=torch.float32):
        pairs = zip(prompts, images, strict=True)
        return torch.tensor([self.score(prompt, image, dtype) for prompt, image in pairs])
