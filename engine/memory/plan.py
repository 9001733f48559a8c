"""The text of python -m engine.train --plan."""

import torch

from engine.memory.counts import count_weights
from engine.memory.fits import GIB, device_memory, fitting_micro_batch, memory_of
from engine.memory.needs import Memory
from engine.model.policy import trunk_shape
from engine.settings.train import TrainConfig
from engine.weights.read import count_tower, folder_of, read_config

MIB = 2**20
COLUMNS = {"float32": torch.float32, "16-bit": torch.bfloat16}
CARDS = (24, 40, 80, 141)  # GB of GPUs that are about


def describe(config: TrainConfig) -> str:
    """Counts, memory by stage in fp32 and in 16 bits, and what it fits."""
    folder = folder_of(config.model)
    model, tower = read_config(folder), count_tower(folder)
    counts = count_weights(model, config, tower)
    lines = [f"{config.model}: weights"]
    for label, count in (
        ("language model" + ("" if config.use_peft else " (trains)"), counts.language_model),
        ("adapter (trains)", counts.adapters),
        ("image embedding, aligner and head", counts.image_modules),
        ("image tokenizer", counts.image_tokenizer),
        ("policy, all of these but the adapter", counts.policy),
        ("understanding tower, stays on disk", counts.understanding),
    ):
        if count:
            lines.append(f"  {label:<50}{count:>16,}")
    plans = {name: memory_of(config, dtype) for name, dtype in COLUMNS.items()}
    unit, unit_name = _unit(plans["float32"])

    def row(label: str, sizes: list[int]) -> str:
        return f"{label:<56}" + "".join(f"{size / unit:>14.2f}" for size in sizes)

    header = "".join(f"{name:>14}" for name in COLUMNS)
    lines += ["", f"{f'memory for training, {unit_name}':<56}{header}"]
    lines.append("  held throughout:")
    for label in plans["float32"].held:
        sizes = [plan.held[label] for plan in plans.values()]
        if any(sizes):
            lines.append(row(f"    {label}", sizes))
    for stage in plans["float32"].stages:
        lines.append(row(f"  {stage}:", [sum(p.stages[stage].values()) for p in plans.values()]))
        labels = dict.fromkeys(label for p in plans.values() for label in p.stages[stage])
        for label in labels:
            sizes = [p.stages[stage].get(label, 0) for p in plans.values()]
            if any(sizes):
                lines.append(row(f"    {label}", sizes))
    lines.append(row("  peak: held, and the largest stage", [p.peak for p in plans.values()]))
    each = " or ".join(
        f"{trunk_shape(model).kv_bytes(d) / 1024:.1f} KiB ({n})" for n, d in COLUMNS.items()
    )
    lines += ["", f"A token takes {each} of the KV cache. Reward experts come on top."]
    return "\n".join([*lines, *_verdict(config)])


def _unit(plan: Memory) -> tuple[int, str]:
    return (GIB, "GiB") if plan.peak >= GIB else (MIB, "MiB")


def _verdict(config: TrainConfig) -> list[str]:
    """What the run as configured needs, on its device and on common cards."""
    dtype = getattr(torch, config.dtype)
    plan = memory_of(config, dtype)
    unit, unit_name = _unit(plan)
    name, available = device_memory(config.device)
    batch = config.micro_batch_size or fitting_micro_batch(config, dtype)
    said = (
        f"{config.dtype}, as configured, needs {plan.peak / unit:.2f} {unit_name} on {name} "
        f"({plan.largest}; {batch} images in an update's forward)"
    )
    if available is not None:
        said += f", which has {available / unit:.2f}: " + (
            "fits" if plan.peak <= available else "does not fit"
        )
    # On a card of its own, a run's portions shrink to what there is.
    least = memory_of(config, dtype, micro_batch_size=config.micro_batch_size or 1, rollout_size=1)
    fitting = [f"{card} GB" for card in CARDS if least.peak <= card * 10**9]
    cards = f"Cards that hold it: {', '.join(fitting) or f'none of {CARDS} GB'}."
    return [said, cards] if device_memory(config.device)[0] != "cpu" else [said]
