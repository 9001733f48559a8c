"""Reads compiled kernels without a GPU: PTX for who touches memory, SASS for how."""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from triton import knobs

BULK = 1024  # bits that stand for a bulk copy (TMA): always whole lines
NOT_GLOBAL = {"shared", "shared::cta", "shared::cluster", "local", "param", "const"}
TENSOR_CORE = re.compile(r"(UTC)?[HIQODB]G?MMA")  # HMMA, IMMA, HGMMA, QGMMA, UTCHMMA, ...
ATOMIC = {"ATOM", "ATOMG", "RED", "REDG", "UREDGR"}
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")
USAGE = re.compile(r"\b(REG|STACK|LOCAL):(\d+)")


@dataclass(frozen=True, slots=True)
class Access:
    """One instruction of the PTX that touches global memory.

    Attributes:
        kind: "load", "store", "copy" (asynchronous, to shared memory) or "atomic".
        bits: width of one thread's access.
        arguments: names of the pointer arguments that the address is made from; "?" where none is.
    """

    kind: str
    bits: int
    arguments: tuple[str, ...]


@dataclass(slots=True)
class MachineCode:
    """What ptxas made of a kernel.

    Attributes:
        registers: a thread's.
        stack_bytes: a thread's stack frame, where ptxas puts what it spills.
        local_bytes: widths of all local-memory stores and loads in the SASS, whichever are more.
        global_widths: instructions by kind ("load", "store", "copy") and width in bits.
        atomics: global atomics and reductions.
        tensor_cores: instructions by name (HMMA, HGMMA, UTCHMMA, ...).
    """

    registers: int = 0
    stack_bytes: int = 0
    local_bytes: int = 0
    global_widths: Counter = field(default_factory=Counter)
    atomics: int = 0
    tensor_cores: Counter = field(default_factory=Counter)

    @property
    def spilled_bytes(self) -> int:
        """A kernel of ours has no local arrays, so all local memory is spilled registers."""
        return max(self.stack_bytes, self.local_bytes)


def read_cubin(cubin: bytes) -> MachineCode:
    """Resource usage and SASS of a cubin, by the cuobjdump and nvdisasm of the triton package."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _tool_output(knobs.nvidia.cuobjdump, "-res-usage", path)
        sass = _tool_output(knobs.nvidia.nvdisasm, "-c", "-ndf", path)
    code = read_sass(sass)
    numbers = dict(USAGE.findall(usage))
    if "REG" not in numbers or "STACK" not in numbers:
        raise RuntimeError(f"cuobjdump -res-usage printed no REG and STACK: {usage!r}")
    code.registers = int(numbers["REG"])
    code.stack_bytes = int(numbers["STACK"]) + int(numbers["LOCAL"])
    return code


def read_sass(sass: str) -> MachineCode:
    """Count the memory and tensor-core instructions of a disassembly."""
    code = MachineCode()
    local: Counter[str] = Counter()
    names = INSTRUCTION.findall(sass)
    if not any(name.startswith("EXIT") for name in names):
        raise RuntimeError(f"no SASS in what nvdisasm printed: {sass[:200]!r}")
    for name in names:
        op, *modifiers = name.split(".")
        if op in ("LDL", "STL"):
            local[op] += _sass_bits(modifiers) // 8
        elif op in ("LDG", "LD"):
            code.global_widths["load", _sass_bits(modifiers)] += 1
        elif op in ("STG", "ST"):
            code.global_widths["store", _sass_bits(modifiers)] += 1
        elif op == "LDGSTS":
            code.global_widths["copy", _sass_bits(modifiers)] += 1
        elif op in ("UBLKCP", "UTMALDG"):
            code.global_widths["copy", BULK] += 1
        elif op == "UTMASTG":
            code.global_widths["store", BULK] += 1
        elif op in ATOMIC:
            code.atomics += 1
        elif TENSOR_CORE.fullmatch(op):
            code.tensor_cores[op] += 1
    code.local_bytes = max(local.values(), default=0)
    return code


def _sass_bits(modifiers: list[str]) -> int:
    """Width of a SASS access: LDG.E is 32 bits, LDG.E.U16 16, LDG.E.128 128."""
    for modifier in modifiers:
        width = re.fullmatch(r"[SU]?(8|16|32|64|128|256)", modifier)
        if width:
            return int(width[1])
    return 32


def read_ptx(ptx: str, arguments: list[tuple[str, str]]) -> list[Access]:
    """Every global access of a kernel with the pointer arguments its address comes from.

    Provenance: a pointer parameter flows through every instruction from a 64-bit source register
    to a 64-bit destination; what is loaded from memory carries none. PTX has a register for each
    value, so the union over all instructions, repeated until nothing changes, is exact but for
    registers that a loop or a branch assigns several times, where it is the union.

    Args:
        arguments: (name, Triton type) of each run-time argument in order.
    Raises: ValueError when the parameters are not those of `arguments`.
    """
    statements = _statements(ptx)
    parameter_name, pointers = _pointer_parameters(ptx, arguments)
    source: dict[str, set[str]] = {}
    moves: list[tuple[list[str], list[str]]] = []
    for op, operands in statements:
        if op.startswith("ld.param"):
            match = re.search(rf"\[{re.escape(parameter_name)}(\d+)\]", operands[1])
            if match and int(match[1]) in pointers:
                source[operands[0]] = {pointers[int(match[1])]}
        elif operands and not op.startswith(("ld.", "st.", "atom.", "red.", "cp.")):
            targets = re.findall(r"%rd\d+", operands[0])
            sources = [r for operand in operands[1:] for r in re.findall(r"%rd\d+", operand)]
            if targets and sources:
                moves.append((targets, sources))
    changed = True
    while changed:
        changed = False
        for targets, sources in moves:
            found = set().union(*(source.get(r, set()) for r in sources))
            for target in targets:
                if not found <= source.setdefault(target, set()):
                    source[target] |= found
                    changed = True
    accesses = []
    for op, operands in statements:
        access = _global_access(op, operands)
        if access is not None:
            kind, bits, address = access
            names = set().union(
                *(source.get(r, set()) for r in re.findall(r"%rd\d+", address)), set()
            )
            accesses.append(Access(kind, bits, tuple(sorted(names)) or ("?",)))
    return accesses


def _statements(ptx: str) -> list[tuple[str, list[str]]]:
    """(operation, operands) of each instruction, without predicates."""
    body = re.sub(r"//[^\n]*|/\*.*?\*/", "", ptx, flags=re.DOTALL)
    body = re.sub(r"^\s*(\.loc|\.file|\.section)[^\n]*|^\s*\$?\w+:\s*$", "", body, flags=re.M)
    body = re.sub(r"(\.\w+\s+)*\.(entry|func)\b[^{;]*\{", "", body)
    statements = []
    for text in body.split(";"):
        match = re.fullmatch(r"[\s{}]*(?:@!?%p\d+\s+)?([a-z][\w.:]*)\s*(.*)", text, flags=re.S)
        if match:
            # Commas inside {...} and [...] belong to one operand.
            operands = re.findall(r"(?:\{[^}]*\}|\[[^]]*\]|[^,{[])+", match[2])
            statements.append((match[1], [operand.strip() for operand in operands]))
    return statements


def _pointer_parameters(ptx: str, arguments: list[tuple[str, str]]) -> tuple[str, dict[int, str]]:
    """Prefix of the entry's parameter names; name of each pointer argument by its index."""
    entry = re.search(r"\.entry\s+(\w+)\s*\((.*?)\)", ptx, flags=re.S)
    if entry is None:
        raise ValueError("no entry in the PTX")
    declared = re.findall(r"\.param\s+([^,]+?)\s+\w+_param_\d+", entry[2])
    if len(declared) < len(arguments):
        raise ValueError(f"{entry[1]}: {len(declared)} parameters for {len(arguments)} arguments")
    for (name, kind), declaration in zip(arguments, declared, strict=False):
        if kind.startswith("*") != (".ptr" in declaration):
            raise ValueError(f"{entry[1]}: argument {name} {kind} is parameter {declaration}")
    pointers = {i: name for i, (name, kind) in enumerate(arguments) if kind.startswith("*")}
    return f"{entry[1]}_param_", pointers


def _global_access(op: str, operands: list[str]) -> tuple[str, int, str] | None:
    """(kind, bits, address operand) of an instruction that touches global memory, else None."""
    first, *modifiers = op.split(".")
    if first == "cp" and modifiers[:1] == ["async"] and len(operands) > 2:
        if "bulk" in modifiers:
            return "copy", BULK, " ".join(operands)
        return "copy", 8 * int(operands[2], 0), operands[1]
    if first not in ("ld", "ldu", "st", "atom", "red") or NOT_GLOBAL.intersection(modifiers):
        return None
    kind = {"ld": "load", "ldu": "load", "st": "store"}.get(first, "atomic")
    width = re.fullmatch(r"[a-z]+(\d+)(?:x2)?", modifiers[-1])
    if width is None:
        raise ValueError(f"unknown width of {op}")
    bits = int(width[1]) * (2 if modifiers[-1].endswith("x2") else 1)
    vector = next((int(m[1:]) for m in modifiers if re.fullmatch(r"v[248]", m)), 1)
    address = next(operand for operand in operands if operand.startswith("["))
    return kind, bits * vector, address


def _tool_output(tool: Any, *words: object) -> str:
    answer = subprocess.run(
        [tool.path, *map(str, words)], capture_output=True, text=True, check=False
    )
    if answer.returncode:
        raise RuntimeError(f"{tool.path} failed: {answer.stderr.strip()}")
    return answer.stdout
