"""Bytes that a training run needs on its device, by stage, from sizes alone.

A step has stages that come one after the other and leave nothing behind: plans are drawn, image
tokens are drawn, pictures are decoded, the update is made. What is held throughout comes on top.
Reward experts are not counted: they are the user's.
"""

from dataclasses import dataclass

import torch
from transformers import JanusConfig

from engine.memory.counts import Counts
from engine.model.adapter import TARGETS
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
class Run:
    """What the memory of a training run follows from.

    Attributes:
        model, counts: of the policy; lengths: of the sequences; config: the flags.
        dtype: of the weights.
        device: "cpu" or "cuda".
    """

    model: JanusConfig
    counts: Counts
    lengths: Lengths
    config: TrainConfig
    dtype: torch.dtype
    device: str

    @property
    def in_c(self) -> bool:
        """Whether it decodes by the C ops, which lay weights out their own way."""
        return self.device == "cpu" and self.dtype in C_WEIGHTS and library() is not None

    @property
    def wide(self) -> bool:
        """Whether products of 16-bit tensors are made in fp32."""
        return self.device == "cpu" and wants_fp32(torch.empty(0, dtype=self.dtype))

    @property
    def trained(self) -> tuple[int, int]:
        """Weights that train, and the bytes of each; adapters are fp32."""
        if self.counts.adapters:
            return self.counts.adapters, FP32
        return self.counts.language_model, self.dtype.itemsize


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
    run: Run, *, micro_batch_size: int, rollout_size: int, process: int = 0
) -> Memory:
    """What a run needs on its device.

    Args:
        micro_batch_size: images of a forward and backward, >= 1.
        rollout_size: samples decoded at a time, >= 1.
        process: bytes that Python and its libraries hold, where they share the device's memory.
    """
    model, size = run.model, run.dtype.itemsize
    trained, trained_size = run.trained
    held = {
        "Python and its libraries": process,
        "weights": run.counts.policy * size,
        "adapter": run.counts.adapters * FP32,
        "aligned image embeddings": model.vq_config.num_embeddings
        * model.text_config.hidden_size
        * size,
        "reference policy": _reference(run),
        "optimizer's state": round(trained * _state_bytes(run.config, trained_size)),
    }
    stages = {"plans": _rollout(run, "semantic", rollout_size)} if run.config.plans == "on" else {}
    stages |= {
        "image tokens": _rollout(run, "token", rollout_size),
        "pictures": _pictures(run),
    }
    for level in run.config.train_levels:
        stages[f"update, {level} level"] = {
            "gradients": trained * trained_size,
            **_update(run, level, micro_batch_size),
        }
    return Memory(held, stages)


def _reference(run: Run) -> int:
    """Its copy's bytes; an adapter is switched off instead, and layers may wait on the host."""
    counts, size = run.counts, run.dtype.itemsize
    if not run.config.has_kl or counts.adapters:
        return 0
    if not run.config.ref_offload:
        return counts.language_model * size
    layers = run.model.text_config.num_hidden_layers
    return (counts.language_model - counts.trunk + 2 * counts.trunk // layers) * size


def _state_bytes(config: TrainConfig, size: int) -> float:
    """Of a trained weight of so many bytes: two moments, and the 16 bits that bf16 lacks."""
    if config.optim == "adamw_8bit":
        return 2 * EIGHT_BITS
    if config.optim == "adamw_torch":
        return 2 * size
    return 2 * MOMENTS[config.optim_state_dtype] + (2 if size == 2 else 0)


def _rollout(run: Run, level: str, together: int) -> dict[str, int]:
    """Caches of the rows that decode together, and what the weights are laid out in."""
    model, counts, lengths, config = run.model, run.counts, run.lengths, run.config
    computed = torch.float32 if run.in_c else run.dtype
    size, width, vocab = run.dtype.itemsize, model.text_config.hidden_size, _vocabulary(run, level)
    each = trunk_shape(model).kv_bytes(computed)
    merged = counts.adapters and config.lora_merge == "copy" and not run.in_c
    plans = config.prompts_per_step * config.num_generations
    if level == "semantic":
        rows, steps = min(together, plans), lengths.plan
        shared = config.prompts_per_step * lengths.first
    else:
        rows, steps = 2 * min(together, config.images_per_step), lengths.image
        shared = (plans + 1) * lengths.second
    return {
        f"KV cache, {rows} rows of {steps} tokens": rows * steps * each,
        f"KV cache of prompts, {shared} tokens": shared
        * (each + (run.dtype != computed) * each // 2),
        "weights laid out for decoding": (counts.trunk + vocab * width) * size if run.in_c else 0,
        "merged weights": counts.trunk * size if merged else 0,
        "logits": rows * vocab * FP32,
    }


def _vocabulary(run: Run, level: str) -> int:
    """Classes that a level's head scores."""
    if level == "semantic":
        return run.model.text_config.vocab_size
    return run.model.vq_config.num_embeddings


def _pictures(run: Run) -> dict[str, int]:
    pixels, images = picture_side(run.model) ** 2, run.config.images_per_step
    together = min(images, max(1, DECODED_PIXELS // pixels))
    size, vq = FP32 if run.wide else run.dtype.itemsize, run.model.vq_config
    widest = vq.base_channels * vq.channel_multiplier[0]
    return {
        f"image tokenizer, {together} pictures at once": round(
            together * pixels * widest * DECODER_VALUES * size
        ),
        "pictures": images * pixels * 3 * (run.dtype.itemsize + FP32),
    }


def _update(run: Run, level: str, micro_batch_size: int) -> dict[str, int]:
    """Activations of one micro-batch of one level, and the head's chunk of logits."""
    lengths, text, size = run.lengths, run.model.text_config, run.dtype.itemsize
    batch, width = min(micro_batch_size, run.config.images_per_step), text.hidden_size
    if level == "semantic":
        trains = not run.counts.adapters  # the text head is one of the trained weights
        tokens, scored = batch * (lengths.first + lengths.plan), batch * lengths.plan
    else:
        trains = False
        branches = 2 if run.config.logprob_policy == "guided" else 1
        tokens = batch * branches * (lengths.second + lengths.image)
        scored = batch * lengths.image
    vocab = _vocabulary(run, level)
    budget = max(CHUNK_BYTES[run.device], vocab * width if trains else 0)
    rows = min(scored, max(16, budget // (FP32 * vocab) // 16 * 16))
    head = rows * vocab * FP32
    head += vocab * width * FP32 if trains else 0  # its gradient's sum
    if run.device == "cpu" and size < FP32:
        head += vocab * width * FP32  # its weight, as the product takes it
    layer, layers = activation_bytes(run), text.num_hidden_layers
    kept = layers * layer
    if run.config.gradient_checkpointing:
        kept = (layers - 1) * width * size + layer
    backward = 3 * text.intermediate_size * (FP32 if run.wide else size)
    return {
        "head": head,
        f"activations of {tokens} tokens": tokens * kept,
        "gradients of a layer's activations": tokens * backward,
    }


def activation_bytes(run: Run) -> int:
    """What the backward pass of one layer keeps of a token.

    Inputs of both norms, in fp32; queries, keys, values and what attention makes of them, in fp32
    where products are; three vectors of the feed-forward's width; and what linear layers multiply,
    where a weight beside it trains.
    """
    text, size = run.model.text_config, run.dtype.itemsize
    hidden, inner = text.hidden_size, text.intermediate_size
    width = text.num_attention_heads * head_dimension(run.model)
    keys = text.num_key_value_heads * head_dimension(run.model)
    attention = (2 * width + 2 * keys) * (FP32 if run.wide else size)
    shared = 2 * hidden * FP32 + attention + 3 * inner * size
    if not run.config.use_peft:
        # A norm that trains keeps what it scales, beside what it gives.
        scaled = 2 * hidden if size < FP32 else hidden
        return shared + (scaled + 2 * hidden + width + inner) * size
    targets = set(run.config.adapted_layers or TARGETS)
    rank = len(targets) * run.config.lora_r * FP32
    # peft casts every layer's input for itself; of fp32 there is one for all that take it, and
    # attention's is kept above.
    before = {"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}
    one = [len(group & targets) if size < FP32 else bool(group & targets) for group in before]
    inputs = sum(one) * hidden + ("down_proj" in targets) * inner
    inputs += width if size < FP32 and "o_proj" in targets else 0
    return shared + rank + inputs * FP32
