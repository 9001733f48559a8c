"""What the ahead-of-time audit needs to know of a kernel launch."""

from dataclasses import dataclass, field
from typing import Any

BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}  # of one value, by the names of DecodeShape.dtype


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeShape:
    """The decoding shape of a model: all that a launch configuration depends on.

    Attributes:
        model: name in the audit's table.
        dtype: of weights, activations and cache: "bf16", "fp16" or "fp32".
        rows: conditional and unconditional rows together.
        group: rows that share a prompt prefix.
        prefix, suffix: tokens in the shared prefix, in the private suffix.
    """

    model: str
    dtype: str
    rows: int
    group: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    image_vocab: int
    text_vocab: int
    head_width: int
    prefix: int
    suffix: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """One compiled configuration of a kernel.

    Attributes:
        kernel: the @triton.jit function.
        signature: Triton type of each run-time argument by name ("*bf16", "i32", "fp32").
        constexprs: value of each tl.constexpr argument by name.
        divisible: names of run-time arguments that are multiples of 16 at every launch
            (pointers: aligned to 16 bytes).
        num_warps, num_stages: launch options.
        grid: programs launched.
        bytes_moved: bytes of global memory that the launch reads and writes, counting re-reads.
        bytes_again: bytes that a program reads a second time soon after the first, from L2; not in
            bytes_moved.
        bytes_least: bytes that any implementation of the op must read and write.
        flops: floating-point operations of its matrix products; 0 where there is none.
        tensor_cores: the compiled code must contain tensor-core instructions.
        fp_fusion: products may be fused with sums.
        narrow_ok: names of pointer arguments whose accesses may be narrower than 128 bits
            (scalars a row, index tables), each for a reason stated beside the kernel.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    divisible: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 3
    grid: tuple[int, ...] = (1,)
    bytes_moved: int = 0
    bytes_again: int = 0
    bytes_least: int = 0
    flops: int = 0
    tensor_cores: bool = False
    fp_fusion: bool = True
    narrow_ok: tuple[str, ...] = field(default=())
