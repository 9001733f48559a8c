"""Compiles every launch of the engine's kernels ahead of time and reads what came out.

No GPU is needed. The rules (a broken one is a line of `Finding.failures`):

* No spills: the stack frame that ptxas records in the cubin and the local loads and stores in the
  SASS are zero.
* Wide accesses: a thread moves at least 128 bits with every global access. Exempt are the pointer
  arguments that the launch names in `narrow_ok`. Which argument an access belongs to is read from
  the PTX, by following addresses back to the parameters (`machine_code.read_ptx`); the SASS must
  show no narrower load, store or copy than the PTX asked for.
* Traffic: the bytes that the launch moves are at most 1.05 times the least possible.
  Re-reads count. An operand that every program reads and that is small (norm weights, tables, the
  head's activations of about 1 MB at most) is counted once: the programs of one launch run side by
  side, memory serves it once, and L1 or L2 the rest. What a program reads again a moment after it
  first did, a row of logits too wide for registers, is not counted but stated beside it, as MB
  again: L2 has it still, as far as the rows in flight fit (kernels/gpu/grpo_loss.py counts them).
* Tensor cores: where the launch says so, its SASS has their instructions.
* Nothing is left out: a jit function that no other one calls must be somebody's launch.
"""

import importlib
import pkgutil
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from types import ModuleType

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction

import kernels.gpu
from kernels.compiled.machine_code import MachineCode, read_cubin, read_ptx
from kernels.gpu.launch import DecodeShape, Launch

ARCHS = {"sm_80": 80, "sm_90": 90, "sm_100": 100}
DTYPES = ("bf16", "fp16", "fp32")
TRAFFIC_LIMIT = 1.05
WIDE = 128  # bits
PREFIX, SUFFIX = 150, 576  # a plan's prompt; the image tokens of Janus-Pro


def _model(
    layers: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    intermediate: int,
    image_vocab: int,
    text_vocab: int,
) -> dict[str, int]:
    return {
        "layers": layers,
        "hidden": hidden,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": hidden // heads,
        "intermediate": intermediate,
        "image_vocab": image_vocab,
        "text_vocab": text_vocab,
        "head_width": hidden,
    }


# The two that T2I-R1 trains, then the shapes of generators that may borrow the kernels.
MODELS = {
    "Janus-Pro-1B": _model(24, 2048, 16, 16, 5632, 16_384, 102_400),
    "Janus-Pro-7B": _model(30, 4096, 32, 32, 11_008, 16_384, 102_400),
    "LlamaGen-XL": _model(36, 1280, 20, 20, 3584, 16_384, 16_384),  # heads of 64
    "Phi-3-mini": _model(32, 3072, 32, 32, 8192, 16_384, 32_064),  # heads of 96
    "Emu3-8B": _model(32, 4096, 32, 8, 14_336, 32_768, 184_622),  # four heads a key
    "Chameleon-7B": _model(32, 4096, 32, 32, 11_008, 8192, 65_536),
}


def shapes(
    models: Iterable[str], dtypes: Iterable[str], rows: Iterable[int], groups: Iterable[int]
) -> list[DecodeShape]:
    """Every combination in which a group is not larger than the conditional half of the rows."""
    return [
        DecodeShape(
            model=model,
            dtype=dtype,
            rows=r,
            group=g,
            prefix=PREFIX,
            suffix=SUFFIX,
            **MODELS[model],
        )
        for model in models
        for dtype in dtypes
        for r in rows
        for g in groups
        if 2 * g <= r
    ]


def find_modules() -> dict[str, ModuleType]:
    """The modules of kernels.gpu, by name. Raises: RuntimeError under TRITON_INTERPRET."""
    if knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set, and the audit compiles kernels: unset it")
    return {
        info.name: importlib.import_module(f"kernels.gpu.{info.name}")
        for info in pkgutil.iter_modules(kernels.gpu.__path__)
    }


def unlaunched(modules: dict[str, ModuleType], launched: Iterable[Launch]) -> list[str]:
    """Kernels that no launch names: jit functions that no other jit function calls."""
    taken = {launch.kernel.fn for launch in launched}
    functions = [f for module in find_modules().values() for f in _jit_functions(module)]
    return [
        f"kernels.gpu.{name}: {function.fn.__name__} is in no launch"
        for name, module in modules.items()
        for function in _jit_functions(module)
        if function.fn not in taken and not _is_called(function, functions)
    ]


def _jit_functions(module: ModuleType) -> list[JITFunction]:
    """The jit functions that a module defines."""
    return [
        value
        for value in vars(module).values()
        if isinstance(value, JITFunction) and value.fn.__module__ == module.__name__
    ]


def _is_called(function: JITFunction, functions: list[JITFunction]) -> bool:
    # As an argument too: tl.reduce and tl.associative_scan take the function itself.
    word = re.compile(rf"\b{function.fn.__name__}\b")
    return any(word.search(other.src) for other in functions if other is not function)


def launches_of(module: ModuleType, shape: DecodeShape) -> list[Launch]:
    """A module's launches; none where it has only functions for other kernels."""
    return module.launches(shape) if hasattr(module, "launches") else []


@dataclass(frozen=True, slots=True)
class Job:
    """One compilation: where to find the launch, and every launch that compiles to the same.

    A launch holds functions, which do not travel between processes; its place does.
    """

    module: str
    shape: DecodeShape
    index: int
    arch: str
    traffic: float  # most bytes moved over least, of all such launches
    launches: int

    def launch(self) -> Launch:
        module = importlib.import_module(f"kernels.gpu.{self.module}")
        return module.launches(self.shape)[self.index]


def plan(
    modules: dict[str, ModuleType],
    decode_shapes: Sequence[DecodeShape],
    archs: Iterable[str],
    *,
    quick: bool = False,
) -> list[Job]:
    """The distinct compilations that the shapes need, in the order of the modules.

    `quick` keeps the first of each kernel, dtype and architecture; traffic is that of them all.
    """
    jobs: dict[tuple, Job] = {}
    archs = list(archs)
    for name, module in modules.items():
        for shape in decode_shapes:
            for index, launch in enumerate(launches_of(module, shape)):
                _check(name, launch)
                traffic = launch.bytes_moved / launch.bytes_least
                for arch in archs:
                    code = launch.kernel.fn.__qualname__ if quick else _identity(launch)
                    key = (arch, name, shape.dtype, code)
                    job = jobs.setdefault(key, Job(name, shape, index, arch, traffic, 0))
                    jobs[key] = replace(
                        job, launches=job.launches + 1, traffic=max(job.traffic, traffic)
                    )
    return list(jobs.values())


def _identity(launch: Launch) -> tuple:
    """What the compiled code depends on."""
    return (
        launch.name,
        launch.kernel.fn.__qualname__,
        tuple(sorted(launch.signature.items())),
        tuple(sorted((name, repr(value)) for name, value in launch.constexprs.items())),
        tuple(sorted(launch.divisible)),
        launch.num_warps,
        launch.num_stages,
        tuple(sorted(launch.narrow_ok)),
        launch.tensor_cores,
        launch.fp_fusion,
    )


def _check(module: str, launch: Launch) -> None:
    """Raise ValueError unless the launch names every argument once and its claims make sense."""
    where = f"kernels.gpu.{module}: {launch.name}"
    if not isinstance(launch.kernel, JITFunction):
        raise ValueError(f"{where}: kernel is no JITFunction (TRITON_INTERPRET at import?)")
    arguments = launch.kernel.arg_names
    if sorted([*launch.signature, *launch.constexprs]) != sorted(arguments):
        wrong = set(arguments) ^ {*launch.signature, *launch.constexprs}
        raise ValueError(f"{where}: arguments missing, unknown or named twice: {sorted(wrong)}")
    for field_name in ("divisible", "narrow_ok"):
        unknown = set(getattr(launch, field_name)) - set(launch.signature)
        if unknown:
            raise ValueError(f"{where}: {field_name} names {sorted(unknown)}, not run-time ones")
    if not 0 < launch.bytes_least <= launch.bytes_moved:
        raise ValueError(
            f"{where}: wanted 0 < bytes_least <= bytes_moved, "
            f"got {launch.bytes_least} and {launch.bytes_moved}"
        )
    if not 0 <= launch.bytes_again <= launch.bytes_moved:
        raise ValueError(
            f"{where}: wanted 0 <= bytes_again <= bytes_moved, "
            f"got {launch.bytes_again} and {launch.bytes_moved}"
        )
    if launch.tensor_cores and launch.flops <= 0:
        raise ValueError(f"{where}: tensor cores without flops")


@dataclass(frozen=True, slots=True)
class Finding:
    """What one compilation gave.

    Attributes:
        narrow: accesses that should be wide, as text.
        exempt: pointer arguments of `narrow_ok` whose accesses are indeed narrow.
        failures: the broken rules, as text.
    """

    kernel: str
    model: str
    dtype: str
    arch: str
    launches: int
    num_warps: int
    num_stages: int
    shared_bytes: int
    code: MachineCode
    narrow: tuple[str, ...]
    exempt: tuple[str, ...]
    traffic_over_least: float
    failures: tuple[str, ...]

    def row(self) -> dict:
        """As plain numbers and texts."""
        row = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "code"}
        widths = sorted(self.code.global_widths.items())
        return row | {
            "registers": self.code.registers,
            "spilled_bytes": self.code.spilled_bytes,
            "global": {f"{kind} {bits}": count for (kind, bits), count in widths},
            "atomics": self.code.atomics,
            "tensor_core": dict(self.code.tensor_cores),
        }


def examine(job: Job) -> Finding:
    """Compile a job's launch for its architecture and hold the result against the rules."""
    launch = job.launch()
    compiled = compile_launch(launch, job.arch)
    code = read_cubin(compiled.asm["cubin"])
    narrow, exempt = narrow_accesses(launch, compiled.asm["ptx"], code)
    failures = []
    if code.spilled_bytes:
        failures.append(f"spills {code.spilled_bytes} bytes")
    failures += narrow
    if job.traffic > TRAFFIC_LIMIT:
        failures.append(f"moves {job.traffic:.3f} x the least bytes")
    if launch.tensor_cores and not code.tensor_cores:
        failures.append("has no tensor-core instruction")
    return Finding(
        kernel=launch.name,
        model=job.shape.model,
        dtype=job.shape.dtype,
        arch=job.arch,
        launches=job.launches,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        shared_bytes=compiled.metadata.shared,
        code=code,
        narrow=tuple(narrow),
        exempt=tuple(exempt),
        traffic_over_least=job.traffic,
        failures=tuple(failures),
    )


def compile_launch(launch: Launch, arch: str) -> triton.compiler.CompiledKernel:
    """Triton's ahead-of-time path: the code that a launch of this configuration would run."""
    names = launch.kernel.arg_names
    source = ASTSource(
        launch.kernel,
        {name: launch.signature.get(name, "constexpr") for name in names},
        {(names.index(name),): value for name, value in launch.constexprs.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in launch.divisible},
    )
    options = {
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
        "enable_fp_fusion": launch.fp_fusion,
    }
    return triton.compile(source, target=GPUTarget("cuda", ARCHS[arch], 32), options=options)


def narrow_accesses(launch: Launch, ptx: str, code: MachineCode) -> tuple[list[str], list[str]]:
    """Accesses narrower than 128 bits: those that should be wide, and the exempt arguments."""
    ordered = [(n, launch.signature[n]) for n in launch.kernel.arg_names if n in launch.signature]
    accesses = read_ptx(ptx, ordered)
    narrow: list[str] = []
    exempt: set[str] = set()
    for access in accesses:
        if access.bits < WIDE:
            if set(access.arguments) <= set(launch.narrow_ok):
                exempt.update(access.arguments)
            else:
                names = " or ".join(access.arguments)
                narrow.append(f"{access.bits}-bit {access.kind} of {names}")
    asked = {(access.kind, access.bits) for access in accesses}
    for (kind, bits), count in sorted(code.global_widths.items()):
        if bits < WIDE and (kind, bits) not in asked:
            narrow += [f"{bits}-bit {kind} in the SASS that the PTX did not ask for"] * count
    return narrow, sorted(exempt)
