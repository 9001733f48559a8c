"""Kernels with known faults, compiled and read by the audit; run by test_audit.py as a program.

Prints {probe name: {arch: {...}}}. It needs a process of its own: under pytest Triton interprets.
"""

import json
from dataclasses import replace

import triton
import triton.language as tl

from kernels.compiled.audit import ARCHS, Launch, compile_launch, narrow_accesses
from kernels.compiled.machine_code import read_cubin


@triton.jit
def copy_kernel(x_ptr, out_ptr, count_ptr, STEP: tl.constexpr, BLOCK: tl.constexpr):
    """Copies every STEP-th value; counts programs."""
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + columns, tl.load(x_ptr + columns * STEP))
    tl.atomic_add(count_ptr, 1)


@triton.jit
def softmax_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    """Holds a row in registers, however few there are."""
    columns = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + columns)
    exps = tl.exp(x - tl.max(x, 0))
    tl.store(out_ptr + columns, exps / tl.sum(exps, 0))


@triton.jit
def product_kernel(a_ptr, b_ptr, out_ptr, SIZE: tl.constexpr, STEPS: tl.constexpr):
    """A tile of a matrix product, its operands fetched through a pipelined loop."""
    index = tl.arange(0, SIZE)
    tile = index[:, None] * SIZE + index[None, :]
    total = tl.zeros((SIZE, SIZE), tl.float32)
    for step in range(STEPS):
        offset = step * SIZE * SIZE
        total = tl.dot(tl.load(a_ptr + offset + tile), tl.load(b_ptr + offset + tile), total)
    tl.store(out_ptr + tile, total)


def copy(*divisible: str, step: int = 1) -> Launch:
    return Launch(
        name="copy",
        kernel=copy_kernel,
        signature={"x_ptr": "*bf16", "out_ptr": "*bf16", "count_ptr": "*i32"},
        constexprs={"STEP": step, "BLOCK": 1024},
        divisible=divisible,
        narrow_ok=("count_ptr",),
    )


def softmax(values: int) -> Launch:
    """A thread of 32 warps has 64 registers at most."""
    return Launch(
        name="softmax",
        kernel=softmax_kernel,
        signature={"x_ptr": "*fp32", "out_ptr": "*fp32"},
        constexprs={"BLOCK": 1024 * values},
        divisible=("x_ptr", "out_ptr"),
        num_warps=32,
    )


PRODUCT = Launch(
    name="product",
    kernel=product_kernel,
    signature={"a_ptr": "*bf16", "b_ptr": "*bf16", "out_ptr": "*fp32"},
    constexprs={"SIZE": 64, "STEPS": 8},
    divisible=("a_ptr", "b_ptr", "out_ptr"),
)
PROBES = {
    "wide": (copy("x_ptr", "out_ptr"), ["sm_90"]),
    "gathered": (copy("x_ptr", "out_ptr", step=3), ["sm_90"]),
    "misaligned store": (copy("x_ptr"), ["sm_90"]),
    "fits": (softmax(8), ["sm_90"]),
    "spills": (softmax(64), ARCHS),
    "product": (PRODUCT, ARCHS),
}


def main() -> None:
    report = {}
    for name, (launch, archs) in PROBES.items():
        report[name] = {}
        for arch in archs:
            compiled = compile_launch(launch, arch)
            code = read_cubin(compiled.asm["cubin"])
            ptx = compiled.asm["ptx"]
            narrow, exempt = narrow_accesses(launch, ptx, code)
            report[name][arch] = {
                "registers": code.registers,
                "stack_bytes": code.stack_bytes,
                "local_bytes": code.local_bytes,
                "narrow": sorted(set(narrow)),
                "narrow_without_exemption": sorted(
                    set(narrow_accesses(replace(launch, narrow_ok=()), ptx, code)[0])
                ),
                "exempt": exempt,
                "tensor_cores": sorted(code.tensor_cores),
                "global": {f"{k} {b}": n for (k, b), n in code.global_widths.items()},
            }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
