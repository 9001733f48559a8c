"""What a training run needs in memory, from config.json alone: python -m engine.train --plan

Counts are exact: they are those of the model's own modules, built without memory. The memory
figures are what is sure to be needed at once, so that a run which is refused could not have
fitted: prompts and plans, reward experts and the allocator's waste come on top.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import JanusConfig

from engine.model.adapter import TARGETS
from engine.model.policy import Policy, trunk_shape
from engine.model.rope import head_dimension
from engine.settings.device import device_kind
from engine.settings.errors import UserError
from engine.settings.train import TrainConfig
from engine.weights.read import count_tower, folder_of, read_config
from kernels.tiling import CHUNK_BYTES

GIB, MIB = 2**30, 2**20
COLUMNS = {"float32": torch.float32, "16-bit": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Counts:
    """Numbers of weights.

    Attributes:
        language_model: decoder, token embedding and text head (once if tied): what trains.
        image_modules: embedding of image tokens, aligner and image head.
        image_tokenizer: the VQ model.
        understanding: the tower that stays on disk; 0 where there are no weight files.
    """

    language_model: int
    image_modules: int
    image_tokenizer: int
    understanding: int

    @property
    def policy(self) -> int:
        return self.language_model + self.image_modules + self.image_tokenizer


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes that a training run needs, by what they are for.

    Attributes:
        held: throughout; gradients too, which the next rollout finds still there.
        rollout, update: on top of that, one after the other.
    """

    held: dict[str, int]
    rollout: dict[str, int]
    update: dict[str, int]

    @property
    def peak(self) -> int:
        passing = max(sum(self.rollout.values()), sum(self.update.values()))
        return sum(self.held.values()) + passing


def count_weights(config: JanusConfig, understanding: int = 0) -> Counts:
    """The weights of a model, counted on modules without memory."""
    with torch.device("meta"):
        policy = Policy(config)
    sizes = {"language": 0, "tokenizer": 0, "image": 0}
    for name, parameter in policy.named_parameters():
        if name.startswith(("model.language_model.", "lm_head.")):
            sizes["language"] += parameter.numel()
        elif name.startswith("model.vqmodel."):
            sizes["tokenizer"] += parameter.numel()
        else:
            sizes["image"] += parameter.numel()
    return Counts(sizes["language"], sizes["image"], sizes["tokenizer"], understanding)


def adapted_shapes(model: JanusConfig, config: TrainConfig) -> list[tuple[int, int]]:
    """(out, in) of one layer's linears that get an adapter."""
    text, head = model.text_config, head_dimension(model)
    width, inner = text.hidden_size, text.intermediate_size
    queries, keys = text.num_attention_heads * head, text.num_key_value_heads * head
    shapes = {
        "q_proj": (queries, width), "k_proj": (keys, width), "v_proj": (keys, width),
        "o_proj": (width, queries), "gate_proj": (inner, width), "up_proj": (inner, width),
        "down_proj": (width, inner),
    }  # fmt: skip
    return [shapes[name] for name in config.adapted_layers or TARGETS]


def adapter_weights(model: JanusConfig, config: TrainConfig) -> int:
    """The number of weights of the adapter that `config` asks for."""
    each = sum(sum(shape) for shape in adapted_shapes(model, config))
    return model.text_config.num_hidden_layers * config.lora_r * each


def memory_needed(
    model: JanusConfig, counts: Counts, config: TrainConfig, dtype: torch.dtype, device: str
) -> Memory:
    """What `config` needs on a device ("cpu" or "cuda") with weights of `dtype`."""
    size, text = dtype.itemsize, model.text_config
    width, vocab = text.hidden_size, text.vocab_size
    trained = counts.language_model
    held = {
        "weights": counts.policy * size,
        "aligned image embeddings": model.vq_config.num_embeddings * width * size,
        "reference copy": trained * size if config.beta > 0 else 0,
        "gradients": trained * size,
        "Adam's two moments": 2 * trained * size,
    }
    if config.use_peft:
        # fp32 whatever the weights' dtype; the reference is the model with its adapter off.
        trained = adapter_weights(model, config)
        sizes = {"adapter": 1, "reference copy": 0, "gradients": 1, "Adam's two moments": 2}
        held |= {name: times * trained * 4 for name, times in sizes.items()}
    tokens = model.vq_config.num_patches**2
    images = config.images_per_step
    rollout = {
        # Two rows an image: conditional and unconditional.
        f"KV cache, {2 * images} rows of {tokens} image tokens": (
            2 * images * tokens * trunk_shape(model).kv_bytes(dtype)
        )
    }
    if config.use_peft:
        merged = sum(a * b for a, b in adapted_shapes(model, config))
        rollout["merged weights"] = model.text_config.num_hidden_layers * merged * size
    update = {}
    if "semantic" in config.train_levels:
        # The chunk rule of kernels.chunked_head for a weight that trains; sums are fp32.
        budget = CHUNK_BYTES[device] if config.use_peft else max(CHUNK_BYTES[device], vocab * width)
        rows = max(16, budget // (4 * vocab) // 16 * 16)
        update["logits chunk of the text head"] = rows * vocab * 4
        update["text head's gradient in fp32"] = 0 if config.use_peft else vocab * width * 4
    if "token" in config.train_levels:
        batch = min(config.micro_batch_size or images, images)
        branches = 2 if config.logprob_policy == "guided" else 1
        update[f"activations, micro-batch of {batch} images"] = (
            batch * branches * tokens * activation_bytes(model, dtype)
        )
    return Memory(held, rollout, update)


def activation_bytes(model: JanusConfig, dtype: torch.dtype) -> int:
    """Least bytes that a token's backward pass keeps, of all layers.

    Of each layer: the inputs of both norms and what they give, queries, keys, values and what
    attention makes of them, and four vectors of the feed-forward's width.
    """
    text = model.text_config
    heads, kv_heads = text.num_attention_heads, text.num_key_value_heads
    values = 4 * text.hidden_size + 2 * (heads + kv_heads) * head_dimension(model)
    values += 4 * text.intermediate_size
    return text.num_hidden_layers * values * dtype.itemsize


def device_memory(device: str) -> tuple[str, int | None]:
    """A device's description and its bytes of memory; None where this machine has none such.

    Args:
        device: as in `--device`. The CPU's memory is the machine's, or the container's limit.
    """
    device = device_kind(device)
    if device != "cpu":
        index = torch.device(device).index or 0
        if index >= torch.cuda.device_count():
            return f"{device}, which this machine lacks", None
        found = torch.cuda.get_device_properties(index)
        return f"{device} ({found.name})", found.total_memory
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (text := limit.read_text().strip()).isdigit():
        total = min(total, int(text))
    return "cpu", total


def require_memory(config: TrainConfig) -> None:
    """Raise UserError with the numbers where the run cannot fit its device."""
    name, available = device_memory(config.device)
    model = read_config(folder_of(config.model))
    memory = _of(config, model, count_weights(model), getattr(torch, config.dtype))
    if available is not None and memory.peak > available:
        parts = memory.held | max(
            memory.rollout, memory.update, key=lambda part: sum(part.values())
        )
        shown = ", ".join(f"{what} {b / GIB:.1f}" for what, b in parts.items() if b)
        raise UserError(
            f"{config.model} in {config.dtype} needs at least {memory.peak / GIB:.1f} GiB on {name}"
            f", which has {available / GIB:.1f} ({shown}); see --plan, and --dtype, "
            "--micro_batch_size, --prompts_per_step, --beta 0"
        )


def describe(config: TrainConfig) -> str:
    """The text of `--plan`: counts, memory in fp32 and in 16 bits, and whether it fits."""
    folder = folder_of(config.model)
    model = read_config(folder)
    counts = count_weights(model, count_tower(folder))
    lines = [f"{config.model}: weights"]
    for label, count in (
        ("adapter (trains)", adapter_weights(model, config) if config.use_peft else 0),
        (f"language model{'' if config.use_peft else ' (trains)'}", counts.language_model),
        ("image embedding, aligner and head", counts.image_modules),
        ("image tokenizer", counts.image_tokenizer),
        ("policy, all of these", counts.policy),
        ("understanding tower, stays on disk", counts.understanding),
    ):
        if count:
            lines.append(f"  {label:<50}{count:>16,}")
    plans = {name: _of(config, model, counts, dtype) for name, dtype in COLUMNS.items()}
    unit, unit_name = (GIB, "GiB") if plans["float32"].peak >= GIB else (MIB, "MiB")

    def row(label: str, sizes: list[int]) -> str:
        return f"{label:<52}" + "".join(f"{size / unit:>16.2f}" for size in sizes)

    header = "".join(f"{name:>16}" for name in COLUMNS)
    lines += ["", f"{f'memory for training, at least, {unit_name}':<52}{header}"]
    for part in ("held", "rollout", "update"):
        lines.append(f"  {part}:")
        for label in getattr(plans["float32"], part):
            lines.append(row(f"    {label}", [getattr(p, part)[label] for p in plans.values()]))
    lines.append(
        row("  peak: held, and the larger of the others", [p.peak for p in plans.values()])
    )
    each = " or ".join(
        f"{trunk_shape(model).kv_bytes(d) / 1024:.1f} KiB ({n})" for n, d in COLUMNS.items()
    )
    lines += ["", f"A prompt's or plan's token adds {each} to the KV cache, once for its group."]
    name, available = device_memory(config.device)
    needed = _of(config, model, counts, getattr(torch, config.dtype)).peak
    verdict = (
        f"{config.dtype}, as configured, needs at least {needed / unit:.2f} {unit_name} on {name}"
    )
    if available is not None:
        fits = "fits" if needed <= available else "does not fit"
        verdict += f", which has {available / unit:.2f}: {fits}"
    return "\n".join([*lines, verdict])


def _of(config: TrainConfig, model: JanusConfig, counts: Counts, dtype: torch.dtype) -> Memory:
    device = device_kind(config.device).partition(":")[0]
    return memory_needed(model, counts, config, dtype, device)
