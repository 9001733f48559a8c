"""Bytes that a training run needs on its device, by stage, from sizes alone.

A step has stages that come one after the other and leave nothing behind: plans are drawn, image
tokens are drawn, pictures are decoded, the update is made. What is held throughout comes on top.
Reward experts are not counted: they are the user's.
"""

from dataclasses import dataclass

import torch
from transformers import JanusConfig

from engine.memory.counts import Counts
from engine.model.image_modules import picture_side
from engine.model.linear import wants_fp32
from engine.model.policy import DECODED_PIXELS, trunk_shape
from engine.model.rope import head_dimension
from engine.settings.train import TrainConfig
from kernels.cpu.build import library
from kernels.dispatch import C_WEIGHTS
from kernels.tiling import CHUNK_BYTES

FP32 = 4
MOMENTS = {"float32": 4, "bfloat16": 2}
EIGHT_BITS = 1 + 4 / 256  # torchao: a byte, and an fp32 scale for every block of 256
DECODER_VALUES = 4.7  # of the image tokenizer's widest layer, alive at once: measured


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of a run's sequences.

    Attributes:
        first: of a prompt that asks for a plan; second: of one that asks for a picture.
        plan, image: of what is drawn, at most.
    """

    first: int
    second: int
    plan: int
    image: int


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes that a training run needs, by what they are for.

    Attributes:
        held: throughout.
        stages: what each stage needs on top of that, one after the other.
    """

    held: dict[str, int]
    stages: dict[str, dict[str, int]]

    @property
    def peak(self) -> int:
        return sum(self.held.values()) + max(sum(s.values()) for s in self.stages.values())

    @property
    def largest(self) -> str:
        """The stage at which the peak is."""
        return max(self.stages, key=lambda name: sum(self.stages[name].values()))


def memory_needed(
    model: JanusConfig,
    counts: Counts,
    lengths: Lengths,
    config: TrainConfig,
    *,
    dtype: torch.dtype,
    device: str,
    micro_batch_size: int,
    rollout_size: int,
    process: int = 0,
) -> Memory:
    """What `config` needs on a device ("cpu" or "cuda") with weights of `dtype`.

    Args:
        micro_batch_size: images of a forward and backward, >= 1.
        rollout_size: samples decoded at a time, >= 1.
        process: bytes that Python and its libraries hold, where they share the device's memory.
    """
    size = dtype.itemsize
    trained = counts.adapters or counts.language_model
    trained_size = FP32 if counts.adapters else size  # adapters are fp32
    held = {
        "Python and its libraries": process,
        "weights": counts.policy * size,
        "adapter": counts.adapters * FP32,
        "aligned image embeddings": model.vq_config.num_embeddings
        * model.text_config.hidden_size
        * size,
        "reference policy": _reference(model, counts, config, size),
        "optimizer's state": round(trained * _state_bytes(config, trained_size)),
    }
    stages = {
        "plans": _rollout(model, counts, lengths, config, dtype, device, "semantic", rollout_size),
        "image tokens": _rollout(
            model, counts, lengths, config, dtype, device, "token", rollout_size
        ),
        "pictures": _pictures(model, config, dtype, device),
    }
    gradients = trained * trained_size
    for level in config.train_levels:
        stages[f"update, {level} level"] = {
            "gradients": gradients,
            **_update(model, counts, lengths, config, dtype, device, level, micro_batch_size),
        }
    return Memory(held, stages)


def _reference(model: JanusConfig, counts: Counts, config: TrainConfig, size: int) -> int:
    """Its copy's bytes; an adapter is switched off instead, and layers may wait on the host."""
    if config.beta == 0 or counts.adapters:
        return 0
    if not config.ref_offload:
        return counts.language_model * size
    layers = model.text_config.num_hidden_layers
    return (counts.language_model - counts.trunk + 2 * counts.trunk // layers) * size


def _state_bytes(config: TrainConfig, size: int) -> float:
    """Of a trained weight of so many bytes: two moments, and the 16 bits that bf16 lacks."""
    if config.optim == "adamw_8bit":
        return 2 * EIGHT_BITS
    if config.optim == "adamw_torch":
        return 2 * size
    return 2 * MOMENTS[config.optim_state_dtype] + (2 if size == 2 else 0)


def _rollout(
    model: JanusConfig,
    counts: Counts,
    lengths: Lengths,
    config: TrainConfig,
    dtype: torch.dtype,
    device: str,
    level: str,
    together: int,
) -> dict[str, int]:
    """Caches of the rows that decode together, and what the weights are laid out in."""
    in_c = device == "cpu" and dtype in C_WEIGHTS and library() is not None
    computed = torch.float32 if in_c else dtype
    vocab, width, size = model.text_config.vocab_size, model.text_config.hidden_size, dtype.itemsize
    each = trunk_shape(model).kv_bytes(computed)
    merged = counts.adapters and config.lora_merge == "copy" and not in_c
    if level == "semantic":
        plans = config.prompts_per_step * config.num_generations
        rows, steps, prefix = min(together, plans), lengths.plan, 0
        shared = config.prompts_per_step * lengths.first
    else:
        rows = 2 * min(together, config.images_per_step)
        steps, prefix = lengths.image, lengths.second
        shared = (config.prompts_per_step * config.num_generations + 1) * prefix
        vocab = model.vq_config.num_embeddings
    return {
        f"KV cache, {rows} rows of {steps} tokens": rows * steps * each,
        f"KV cache of prompts, {shared} tokens": shared * (each + (dtype != computed) * each // 2),
        "weights laid out for decoding": (counts.trunk + vocab * width) * size if in_c else 0,
        "merged weights": counts.trunk * size if merged else 0,
        "logits": rows * vocab * FP32,
    }


def _pictures(
    model: JanusConfig, config: TrainConfig, dtype: torch.dtype, device: str
) -> dict[str, int]:
    pixels = picture_side(model) ** 2
    together = min(config.images_per_step, max(1, DECODED_PIXELS // pixels))
    wide = device == "cpu" and wants_fp32(torch.empty(0, dtype=dtype))
    size, vq = FP32 if wide else dtype.itemsize, model.vq_config
    widest = vq.base_channels * vq.channel_multiplier[0]
    return {
        f"image tokenizer, {together} pictures at once": round(
            together * pixels * widest * DECODER_VALUES * size
        ),
        "pictures": config.images_per_step * pixels * 3 * (dtype.itemsize + FP32),
    }


def _update(
    model: JanusConfig,
    counts: Counts,
    lengths: Lengths,
    config: TrainConfig,
    dtype: torch.dtype,
    device: str,
    level: str,
    micro_batch_size: int,
) -> dict[str, int]:
    """Activations of one micro-batch of one level, and the head's chunk of logits."""
    batch, width = min(micro_batch_size, config.images_per_step), model.text_config.hidden_size
    if level == "semantic":
        vocab, trains = model.text_config.vocab_size, not counts.adapters
        tokens, scored = batch * (lengths.first + lengths.plan), batch * lengths.plan
    else:
        vocab, trains = model.vq_config.num_embeddings, False
        branches = 2 if config.logprob_policy == "guided" else 1
        tokens = batch * branches * (lengths.second + lengths.image)
        scored = batch * lengths.image
    budget = max(CHUNK_BYTES[device], vocab * width if trains else 0)
    rows = min(scored, max(16, budget // (FP32 * vocab) // 16 * 16))
    head = rows * vocab * FP32
    head += vocab * width * FP32 if trains else 0  # its gradient's sum
    if device == "cpu" and dtype.itemsize < FP32:
        head += vocab * width * FP32  # its weight, as the product takes it
    wide = device == "cpu" and wants_fp32(torch.empty(0, dtype=dtype))
    layer = activation_bytes(model, dtype, wide=wide)
    layers = model.text_config.num_hidden_layers
    kept = layers * layer
    if config.gradient_checkpointing:
        kept = (layers - 1) * width * dtype.itemsize + layer
    inner = model.text_config.intermediate_size
    return {
        "head": head,
        f"activations of {tokens} tokens": tokens * kept,
        "gradients of a layer's activations": tokens
        * 3
        * inner
        * (FP32 if wide else dtype.itemsize),
    }


def activation_bytes(model: JanusConfig, dtype: torch.dtype, *, wide: bool = False) -> int:
    """What the backward pass of one layer keeps of a token.

    The inputs of both norms and what they give, queries, keys, values, what attention makes of
    them, once more by row for the product after it, and four vectors of the feed-forward's width.
    Norms of 16-bit values keep their input in fp32 too; with `wide` attention keeps fp32 as well.
    """
    text, size = model.text_config, dtype.itemsize
    width = text.num_attention_heads * head_dimension(model)
    keys = text.num_key_value_heads * head_dimension(model)
    attention = (2 * width + 2 * keys) * (FP32 if wide else size)
    rest = (4 * text.hidden_size + 4 * text.intermediate_size + width) * size
    norms = 0 if size >= FP32 else 2 * text.hidden_size * FP32
    return attention + rest + norms + (text.hidden_size * size if size >= FP32 else 0)
