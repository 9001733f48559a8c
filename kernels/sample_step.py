"""The end of a decode step in one call: draw, write, gather the next inputs, advance the step."""

from typing import Any

import torch
from torch import Tensor

from kernels.cfg_sample import cfg_sample, check_logits, check_sampling, kept_logits
from kernels.dispatch import use_c, use_triton
from kernels.reference.sampling import finish_step


def sample_step(
    cond: Tensor,
    uncond: Tensor | None,
    *,
    cfg_weight: float,
    temperature: float,
    seed: int | Tensor,
    sample_ids: Tensor,
    step: Tensor,
    step_offset: int,
    top_k: int = 0,
    top_p: float = 1.0,
    greedy: bool = False,
    table: Tensor,
    x: Tensor,
    tokens: Tensor,
    logprobs: Tensor | None,
    guided_logprobs: Tensor | None,
    error: Tensor,
    eos: int | None = None,
    alive: Tensor | None = None,
    pad: int = 0,
    workspace: Tensor | None = None,
) -> None:
    """Sample column `step` of a rollout and prepare the next step; nothing returns to the host.

    The draw of `kernels.cfg_sample` at noise step `step_offset + step`. Its token, log-prob and
    guided log-prob go to column `step`; table[token] goes to x; then step grows by one. All state
    is on the device, so that a CUDA graph captured once is replayed for every step.

    Args:
        cond, uncond, cfg_weight, temperature, top_k, top_p, greedy: see kernels.cfg_sample.
        seed: 64-bit key of the noise, or (1,) int64 on the device, read at every replay.
        sample_ids: (B,) int64, contiguous.
        step: (1,) int32 on the device, in and out. Past the last column nothing is written.
        table: (V' >= V, D) embeddings of the tokens; last stride 1.
        x: (B, D), or (2B, D) with uncond (both halves get the same rows); table's dtype. Out.
        tokens: (B, T) int64, out.
        logprobs, guided_logprobs: (B, T) fp32, out; None: not wanted.
        error: (1,) int64, in and out: 0 is fine, else 1 + step * B + row of the first row, by
            step then row, whose logits were NaN or all -inf (see `error_place`).
        eos, alive: the token that ends a row, and (B,) bool, in and out: rows still going.
            Ended rows write pad and 0, and are not read.
        pad: what ended rows write.
        workspace: from `sample_workspace`, kept from step to step; None: a new one, which costs
            a launch.
    Raises: ValueError naming the argument.
    Numerics: fp32, batch-invariant. Traffic: read the logits and B embeddings, write x; one
        launch without top-k and top-p.
    Source: DESIGN section 6.
    """
    check_logits(cond, uncond)
    check_sampling(len(cond), temperature, sample_ids, top_k, top_p)
    finish = {
        "step": step,
        "table": table,
        "x": x,
        "tokens": tokens,
        "logprobs": logprobs,
        "guided_logprobs": guided_logprobs,
        "error": error,
        "eos": eos,
        "alive": alive,
        "pad": pad,
    }
    check_finish(cond.shape[0], cond.shape[1], uncond is not None, seed, **finish)
    if use_triton(cond):
        from kernels.gpu.sample_step import launch_sample_step

        launch_sample_step(
            cond,
            uncond,
            None if greedy else kept_logits(cond, uncond, cfg_weight, temperature, top_k, top_p),
            cfg_weight=cfg_weight,
            temperature=temperature,
            seed=seed,
            sample_ids=sample_ids,
            step_offset=step_offset,
            greedy=greedy,
            workspace=workspace,
            **finish,
        )
        return
    if _c_can_draw(cond, uncond, table):
        from kernels.cpu.launch import launch_sample_step

        launch_sample_step(
            cond,
            uncond,
            None if greedy else kept_logits(cond, uncond, cfg_weight, temperature, top_k, top_p),
            cfg_weight=cfg_weight,
            temperature=temperature,
            seed=int(seed),
            sample_ids=sample_ids,
            step_offset=step_offset,
            greedy=greedy,
            **finish,
        )
        return
    draw = cfg_sample(
        cond,
        uncond,
        cfg_weight=cfg_weight,
        temperature=temperature,
        seed=int(seed),
        sample_ids=sample_ids,
        step=step_offset + int(step),
        top_k=top_k,
        top_p=top_p,
        greedy=greedy,
    )
    finish_step(*draw, **finish)


def _c_can_draw(cond: Tensor, uncond: Tensor | None, table: Tensor) -> bool:
    """Whether the C kernel takes these logits and this table."""
    alike = uncond is None or (uncond.dtype == cond.dtype and uncond.stride(-1) == 1)
    return use_c(cond) and use_c(table) and cond.stride(-1) == 1 and alike


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


def check_finish(
    rows: int,
    vocab: int,
    paired: bool,
    seed: int | Tensor,
    *,
    step: Tensor,
    table: Tensor,
    x: Tensor,
    tokens: Tensor,
    logprobs: Tensor | None,
    guided_logprobs: Tensor | None,
    error: Tensor,
    eos: int | None,
    alive: Tensor | None,
    pad: int,
) -> None:
    """Raise ValueError naming the argument that a step cannot be finished with."""
    if rows == 0:
        raise ValueError("cond: wanted at least one row, got none")
    if table.ndim != 2 or len(table) < vocab:
        raise ValueError(f"table: wanted (at least {vocab}, D), got {tuple(table.shape)}")
    columns = tokens.shape[-1]
    inputs = (2 * rows if paired else rows, table.shape[1])
    wanted: list[tuple[str, Any, tuple[int, ...], torch.dtype]] = [
        ("step", step, (1,), torch.int32),
        ("x", x, inputs, table.dtype),
        ("tokens", tokens, (rows, columns), torch.int64),
        ("logprobs", logprobs, (rows, columns), torch.float32),
        ("guided_logprobs", guided_logprobs, (rows, columns), torch.float32),
        ("error", error, (1,), torch.int64),
        ("alive", alive, (rows,), torch.bool),
    ]
    if isinstance(seed, Tensor):
        wanted.append(("seed", seed, (1,), torch.int64))
    for name, tensor, shape, dtype in wanted:
        if tensor is not None and (tuple(tensor.shape), tensor.dtype) != (shape, dtype):
            raise ValueError(
                f"{name}: wanted {shape} {dtype}, got {tuple(tensor.shape)} {tensor.dtype}"
            )
        if tensor is not None and tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(f"{name}: wanted a last stride of 1, got {tensor.stride()}")
    if table.stride(-1) != 1 and table.shape[1] > 1:
        raise ValueError(f"table: wanted a last stride of 1, got {table.stride()}")
    if (eos is None) != (alive is None):
        raise ValueError("alive: wanted with eos, and only then")
    if eos is not None and not 0 <= pad < len(table):
        raise ValueError(f"pad: wanted a row of the table, got {pad}")
