"""The end of a decode step in one call: draw, write, gather the next inputs, advance the step."""

from typing import Any

import torch
from torch import Tensor

from kernels.cfg_sample import check_logits, check_sampling, draw_tokens, kept_logits
from kernels.dispatch import C_WEIGHTS, use_c, use_triton
from kernels.reference.sampling import finish_step
from kernels.state import Draw, StepState


def sample_step(cond: Tensor, uncond: Tensor | None, draw: Draw, state: StepState) -> None:
    """Sample column `step` of a rollout and prepare the next step; nothing returns to the host.

    The draw of `kernels.cfg_sample` at noise step `draw.first_step + step`. Its token, log-prob and
    guided log-prob go to column `step`; table[token] goes to x; then step grows by one. All that
    changes is on the device, so that a CUDA graph captured once is replayed for every step.

    Args:
        cond, uncond: (B, V) logits, see kernels.cfg_sample.
        draw: how to draw.
        state: what is read and written; its workspace is from `sample_workspace`, and None costs a
            launch.
    Raises: ValueError naming the argument.
    Numerics: fp32, batch-invariant. Traffic: read the logits and B embeddings, write x; one
        launch without top-k and top-p.
    """
    check_logits(cond, uncond)
    check_sampling(len(cond), draw, state.sample_ids)
    check_finish(cond.shape[0], cond.shape[1], uncond is not None, draw, state)
    if use_triton(cond):
        from kernels.gpu.sample_step import launch_sample_step

        launch_sample_step(cond, uncond, kept_logits(cond, uncond, draw), draw, state)
    elif _c_can_draw(cond, uncond, state.table):
        from kernels.cpu.launch import launch_sample_step as launch_in_c

        launch_in_c(cond, uncond, kept_logits(cond, uncond, draw), draw, state)
    else:
        drawn = draw_tokens(cond, uncond, draw, state.sample_ids, int(state.step))
        finish_step(*drawn, state)


def _c_can_draw(cond: Tensor, uncond: Tensor | None, table: Tensor) -> bool:
    """Whether the C kernel takes these logits and this table."""
    alike = uncond is None or (uncond.dtype == cond.dtype and uncond.stride(-1) == 1)
    return use_c(cond) and use_c(table, C_WEIGHTS) and cond.stride(-1) == 1 and alike


def sample_workspace(rows: int, vocab: int, device: torch.device | str) -> Tensor:
    """Scratch for sample_step over (rows, vocab) logits; every call leaves it ready for the next.

    Steps that share a workspace must run one after the other.
    """
    size = 0
    if use_triton(torch.empty(0, device=device)):
        from kernels.gpu.cfg_sample import workspace_size

        size = workspace_size(rows, vocab)
    return torch.zeros(size, dtype=torch.int32, device=device)


def error_place(error: Tensor, rows: int) -> tuple[int, int] | None:
    """Row and step of the first unusable logits, or None. Waits for the device."""
    code = int(error)
    return None if code == 0 else ((code - 1) % rows, (code - 1) // rows)


def check_finish(rows: int, vocab: int, paired: bool, draw: Draw, state: StepState) -> None:
    """Raise ValueError naming the argument that a step cannot be finished with."""
    if rows == 0:
        raise ValueError("cond: wanted at least one row, got none")
    table = state.table
    if table.ndim != 2 or len(table) < vocab:
        raise ValueError(f"table: wanted (at least {vocab}, D), got {tuple(table.shape)}")
    columns = state.tokens.shape[-1]
    inputs = (2 * rows if paired else rows, table.shape[1])
    # On a CPU a step may compute in fp32 with 16-bit weights.
    wide = state.x.dtype == torch.float32 and not use_triton(state.x)
    wanted: list[tuple[str, Any, tuple[int, ...], torch.dtype]] = [
        ("step", state.step, (1,), torch.int32),
        ("x", state.x, inputs, torch.float32 if wide else table.dtype),
        ("tokens", state.tokens, (rows, columns), torch.int64),
        ("logprobs", state.logprobs, (rows, columns), torch.float32),
        ("guided_logprobs", state.guided_logprobs, (rows, columns), torch.float32),
        ("error", state.error, (1,), torch.int64),
        ("alive", state.alive, (rows,), torch.bool),
    ]
    if isinstance(draw.seed, Tensor):
        wanted.append(("seed", draw.seed, (1,), torch.int64))
    for name, tensor, shape, dtype in wanted:
        if tensor is not None and (tuple(tensor.shape), tensor.dtype) != (shape, dtype):
            raise ValueError(
                f"{name}: wanted {shape} {dtype}, got {tuple(tensor.shape)} {tensor.dtype}"
            )
        if tensor is not None and tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(f"{name}: wanted a last stride of 1, got {tensor.stride()}")
    if table.stride(-1) != 1 and table.shape[1] > 1:
        raise ValueError(f"table: wanted a last stride of 1, got {table.stride()}")
    if (state.eos is None) != (state.alive is None):
        raise ValueError("alive: wanted with eos, and only then")
    if state.eos is not None and not 0 <= state.pad < len(table):
        raise ValueError(f"pad: wanted a row of the table, got {state.pad}")
