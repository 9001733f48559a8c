"""Whether a device has the memory that a run needs, and the micro-batch that it has it for."""

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from transformers import JanusConfig

from engine.memory.counts import count_weights
from engine.memory.needs import Lengths, Memory, Run, memory_needed
from engine.model.adapter import require_peft
from engine.prompts.data import load_prompts, load_template
from engine.settings.device import device_kind
from engine.settings.errors import UserError
from engine.settings.train import TrainConfig
from engine.weights.read import folder_of, read_config, read_tokenizer

GIB = 2**30
CUDA_CONTEXT = 600 << 20  # the driver's, and cuBLAS' workspaces
SPARE = 0.95  # of a device that a micro-batch chosen by us may fill


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


def memory_of(
    config: TrainConfig,
    dtype: torch.dtype,
    *,
    micro_batch_size: int | None = None,
    rollout_size: int | None = None,
) -> Memory:
    """What a run needs, with weights of `dtype`.

    Args:
        micro_batch_size: of an update; None: the flag's, or where that is 0 as many as fit.
        rollout_size: samples decoded at a time; None: as many as fit.
    """
    run = _run(config, dtype)
    images = micro_batch_size or config.micro_batch_size or _fitting_micro_batch(run)
    samples = rollout_size or _largest(config, lambda n: _needed(run, 1, n).peak)
    return _needed(run, images, samples)


def fitting_micro_batch(config: TrainConfig, dtype: torch.dtype) -> int:
    """Images of a forward and backward: as many as the device has memory for, at least one."""
    return _fitting_micro_batch(_run(config, dtype))


def _fitting_micro_batch(run: Run) -> int:
    return _largest(run.config, lambda n: _needed(run, n, 1).peak)


def _run(config: TrainConfig, dtype: torch.dtype) -> Run:
    if config.use_peft:
        require_peft()  # before the process is looked at: it is a large import
    model = read_config(folder_of(config.model))
    device = device_kind(config.device).partition(":")[0]
    return Run(model, count_weights(model, config), _lengths(config, model), config, dtype, device)


def _needed(run: Run, micro_batch_size: int, rollout_size: int) -> Memory:
    return memory_needed(
        run,
        micro_batch_size=micro_batch_size,
        rollout_size=rollout_size,
        process=_process_bytes() if run.device == "cpu" else CUDA_CONTEXT,
    )


def _largest(config: TrainConfig, peak: Callable[[int], int]) -> int:
    """The step's images, in as few equal parts as fit the device by their peak."""
    _, available = device_memory(config.device)
    images = config.images_per_step
    if available is None:
        return images
    low, high = 1, images  # low fits, or there is nothing smaller
    while low < high:
        middle = (low + high + 1) // 2
        fits = peak(middle) <= SPARE * available
        low, high = (middle, high) if fits else (low, middle - 1)
    parts = -(-images // low)
    return -(-images // parts)


def require_memory(config: TrainConfig) -> None:
    """Raise UserError with the numbers where the run cannot fit its device."""
    name, available = device_memory(config.device)
    dtype = getattr(torch, config.dtype)
    memory = memory_of(config, dtype, micro_batch_size=config.micro_batch_size or 1, rollout_size=1)
    if available is not None and memory.peak > available:
        parts = memory.held | memory.stages[memory.largest]
        shown = ", ".join(f"{what} {b / GIB:.1f}" for what, b in parts.items() if b > 0.05 * GIB)
        raise UserError(
            f"{config.model} in {config.dtype} needs {memory.peak / GIB:.1f} GiB on {name}"
            f", which has {available / GIB:.1f} ({shown}); see --plan, and --dtype bfloat16, "
            "--use_peft, --gradient_checkpointing, --optim_state_dtype bfloat16, --ref_offload, "
            "--micro_batch_size 0"
        )


def _lengths(config: TrainConfig, model: JanusConfig) -> Lengths:
    """Tokens of the longest prompts of a run, by its own tokenizer where there is one."""
    prompts = load_prompts(config.dataset_name)
    template = load_template(folder_of(config.model), config.reasoning_prompt_path)
    longest = max((row["prompt"] for row in prompts), key=len)
    first, second = (
        _tokens(config.model, text)
        for text in (template.stage1_text(longest), template.stage2_text(longest, ""))
    )
    plan = config.max_completion_length
    return Lengths(first + 1, second + 2 + plan, plan, model.vq_config.num_patches**2)


@cache
def _tokens(model: str, text: str) -> int:
    folder = folder_of(model)
    if not (folder / "tokenizer.json").is_file():  # a config.json alone: four letters a token
        return len(text) // 4 + 1
    tokenizer = read_tokenizer(folder, read_config(folder))
    return len(tokenizer.encode(text, add_special_tokens=False))


@cache
def _process_bytes() -> int:
    """What this process holds now: Python and its libraries, if asked before there is a model."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
