"""Checkpoints that survive a kill at any moment, and atomic writes of small files.

A checkpoint is a folder `RUN/checkpoints/step-000030` of safetensors files and a
`state.json` with the size and hash of each. It is written under a hidden name, flushed to
disk and renamed, so a folder with a visible name is whole. Hidden names: `.tmp-STEP-PID` may
be unfinished and is never read; `.old-STEP-PID` is a whole checkpoint that was just being
replaced by one of the same step. One process at a time writes a run folder.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.run.inside import inside, inside_or_none, remove_folder, write_new
from engine.settings.errors import UserError

STATE_FILE = "state.json"
_VISIBLE = re.compile(r"step-(\d+)")
_OLD = re.compile(r"\.old-(\d+)-\d+")
_TEMPORARY = re.compile(r"\.tmp-\d+-\d+")


def save_checkpoint(
    run_dir: str | Path,
    step: int,
    *,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
) -> Path:
    """Write a checkpoint; when this returns, it is on disk.

    Args:
        run_dir: made if need be.
        step: >= 0; a checkpoint of the same step is replaced.
        tensors: group -> name -> tensor of any dtype and device; a group is a file.
        state: what JSON can hold (tuples become lists, keys text); `step` is added.
    Returns: the checkpoint's folder.
    Raises: UserError naming the folder that cannot be written; older checkpoints are untouched.
        TypeError or ValueError, before anything is written, when `state` is not JSON.
    """
    state_text = json.dumps({**state, "step": step}, allow_nan=False)
    folder = inside(run_dir, "checkpoints")
    final = inside(folder, f"step-{step:06d}")
    temporary = inside(folder, f".tmp-{step}-{os.getpid()}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_temporaries(run_dir)
        temporary.mkdir()  # and so no link of that name
        for group, named in tensors.items():
            save_file({name: _storable(t) for name, t in named.items()}, temporary / _file(group))
        files = {_file(group): _fingerprint(temporary / _file(group)) for group in tensors}
        content = json.dumps({"files": files, "state": json.loads(state_text)}, indent=1)
        (temporary / STATE_FILE).write_text(content)
        for path in (*temporary.iterdir(), temporary):
            _fsync(path)
        if final.exists():
            # A folder cannot be replaced in one step: the old one steps aside first, still
            # found by `latest_checkpoint` under its hidden name.
            os.rename(final, inside(folder, f".old-{step}-{os.getpid()}"))
        os.rename(temporary, final)
        for path in (folder, folder.parent):
            _fsync(path)
        remove_temporaries(run_dir)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{folder}: cannot write checkpoint of step {step}: {reason}") from error
    return final


def latest_checkpoint(run_dir: str | Path) -> Path | None:
    """The whole checkpoint of the highest step; None where there is none."""
    folder = Path(run_dir) / "checkpoints"
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        match = _VISIBLE.fullmatch(path.name) or _OLD.fullmatch(path.name)
        if match and _is_complete(path):
            found.append((int(match[1]), not path.name.startswith("."), path))
    return max(found)[2] if found else None


def load_checkpoint(path: str | Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """What `save_checkpoint` was given, on the CPU: tensors by group, and the state.

    Raises: UserError naming the file that is missing, damaged or not a checkpoint's.
    """
    path = Path(path)
    content = _read_state(path)
    tensors = {}
    for name, fingerprint in content["files"].items():
        file = path / name
        try:
            if _fingerprint(file) != fingerprint:
                raise UserError(f"{file}: damaged: size or hash differs from {STATE_FILE}")
            tensors[name.removesuffix(".safetensors")] = load_file(file)
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"{file}: cannot be read: {reason}") from error
    return tensors, content["state"]


def prune(run_dir: str | Path, keep: int) -> None:
    """Remove all but the `keep` >= 1 whole checkpoints of the highest steps.

    A link is none of them: whoever put it there keeps a checkpoint elsewhere.
    """
    assert keep >= 1, keep
    folder = inside(run_dir, "checkpoints")
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        match = _VISIBLE.fullmatch(path.name)
        if match and inside_or_none(folder, path.name) and _is_complete(path):
            found.append((int(match[1]), path))
    try:
        for step, path in sorted(found)[:-keep]:
            # Hidden before it is taken apart, so that no half of it is ever visible.
            hidden = inside(folder, f".tmp-{step}-{os.getpid()}")
            os.rename(path, hidden)
            remove_folder(folder, hidden.name)
    except OSError as error:
        raise UserError(f"{folder}: cannot remove checkpoints: {error.strerror}") from error


def remove_temporaries(run_dir: str | Path) -> None:
    """Tidy up after a killed run; a checkpoint whose replacement never came is put back."""
    folder = inside(run_dir, "checkpoints")
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    ours = [name for name in names if inside_or_none(folder, name)]
    for name in filter(_TEMPORARY.fullmatch, ours):
        remove_folder(folder, name)
    for match in filter(None, map(_OLD.fullmatch, ours)):
        final = folder / f"step-{int(match[1]):06d}"
        if os.path.lexists(final):
            remove_folder(folder, match[0])
        else:
            os.rename(folder / match[0], final)


def load_named_tensors(
    targets: Mapping[str, Tensor], tensors: Mapping[str, Tensor], *, source: str | Path
) -> None:
    """Copy tensors into the targets of the same name, all or none.

    Args:
        targets: name -> tensor to fill, on any device; `dict(module.named_parameters())`.
        tensors: name -> values of the same shapes and dtypes.
        source: the file they came from, for the error.
    Raises: UserError naming file and key: missing, unknown, or of another shape or dtype.
    """
    _check_names(targets, tensors, source)
    for name, target in targets.items():
        _check_like(name, tensors[name], target, source)
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(tensors[name])


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Sequence[str]) -> dict[str, Tensor]:
    """An optimizer's state as flat tensors: `NAME.step`, `NAME.exp_avg`, `NAME.exp_avg_sq`, ...

    Args:
        optimizer: AdamW or one like it; learning rates and the like are settings, not part of it.
        names: of its parameters, in its order. One that was never updated has only a step, 0.
    Returns: references, not copies.
    """
    flat = {}
    for name, parameter in zip(names, _parameters(optimizer), strict=True):
        state = optimizer.state.get(parameter, {})
        flat[f"{name}.step"] = torch.zeros(())
        for key, value in state.items():
            flat |= _parts(f"{name}.{key}", value)
    return flat


def _parts(name: str, value: Tensor) -> dict[str, Tensor]:
    """A tensor by its name; of one that is made of others (quantised, say) those."""
    if not hasattr(value, "__tensor_flatten__"):
        return {name: value}
    return {f"{name}.{part}": getattr(value, part) for part in value.__tensor_flatten__()[0]}


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer,
    names: Sequence[str],
    tensors: Mapping[str, Tensor],
    *,
    source: str | Path,
) -> None:
    """Put back, bit for bit, what `optimizer_tensors` returned.

    Args: as there; source: the file the tensors came from, for the error. What a parameter's state
        looks like is said by the optimizer's `fresh_state(parameter)`, else it is AdamW's.
    Raises: UserError naming file and key; the optimizer is then unchanged.
    """
    fresh = getattr(optimizer, "fresh_state", _adamw_state)
    states: dict[Tensor, dict[str, Tensor]] = {}
    expected: dict[str, Tensor] = {}
    parameters = _parameters(optimizer)
    for name, parameter in zip(names, parameters, strict=True):
        step = tensors.get(f"{name}.step")
        states[parameter] = fresh(parameter) if step is not None and step != 0 else {}
        wanted = states[parameter] or {"step": torch.zeros(())}
        for key, value in wanted.items():
            expected |= _parts(f"{name}.{key}", value)
    _check_names(expected, tensors, source)
    for key, like in expected.items():
        _check_like(key, tensors[key], like, source)
    on_device = [g.get("fused") or g.get("capturable") for g in optimizer.param_groups]
    for name, parameter in zip(names, parameters, strict=True):
        # AdamW keeps the step on the CPU unless its kernel reads it on the device.
        step_device = parameter.device if any(on_device) else torch.device("cpu")
        for key, value in states[parameter].items():
            device = step_device if key == "step" else parameter.device
            parts = _parts(f"{name}.{key}", value)
            if f"{name}.{key}" in parts:
                states[parameter][key] = tensors[f"{name}.{key}"].to(device, copy=True)
            else:
                for part, inner in parts.items():
                    inner.copy_(tensors[part])
    optimizer.state.clear()
    optimizer.state.update({p: state for p, state in states.items() if state})


def _adamw_state(parameter: Tensor) -> dict[str, Tensor]:
    like = torch.empty_like(parameter, device="meta")
    return {"step": torch.zeros(()), "exp_avg": like, "exp_avg_sq": like}


def atomic_write_text(path: str | Path, text: str) -> None:
    """Replace a file by UTF-8 `text`; readers see the old or the new, never a part."""
    atomic_write_bytes(path, text.encode())


def atomic_write_bytes(path: str | Path, data: bytes) -> None:
    """Replace a file by `data`; readers see the old or the new, never a part.

    Raises: UserError naming the file that cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        write_new(temporary, data)
        _fsync(temporary)
        os.replace(temporary, path)
        _fsync(path.parent)
    except OSError as error:
        with suppress(OSError):  # where the folder is the trouble, there is nothing to tidy up
            temporary.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error


def _file(group: str) -> str:
    return f"{group}.safetensors"


def _storable(tensor: Tensor) -> Tensor:
    """On the CPU, dense, and owning its storage: views of one storage cannot be saved."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _fingerprint(file: Path) -> dict[str, Any]:
    with file.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    return {"bytes": file.stat().st_size, "sha256": digest}


def _fsync(path: Path) -> None:
    """Flush a file's content, or a folder's list of names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_complete(path: Path) -> bool:
    """Whether all files are there in their full size (hashes are left to the loading)."""
    try:
        files = _read_state(path)["files"]
        return all((path / name).stat().st_size == f["bytes"] for name, f in files.items())
    except (OSError, UserError):
        return False


def _read_state(path: Path) -> dict[str, Any]:
    file = path / STATE_FILE
    try:
        content = json.loads(file.read_text())
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{file}: damaged: {error}") from error
    files = content.get("files") if isinstance(content, dict) else None
    if not isinstance(files, dict) or not isinstance(content.get("state"), dict):
        raise UserError(f"{file}: not the state of a checkpoint")
    for name, fingerprint in files.items():
        is_plain = name.endswith(".safetensors") and Path(name).name == name
        if not is_plain or not isinstance(fingerprint, dict) or "bytes" not in fingerprint:
            raise UserError(f"{file}: 'files' holds an unusable entry {name!r}")
    return content


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _check_names(wanted: Iterable[str], found: Mapping[str, Tensor], source: str | Path) -> None:
    wanted = list(wanted)
    missing = sorted(set(wanted) - set(found))
    if missing:
        raise UserError(f"{source}: {missing[0]!r} is missing ({len(missing)} in all)")
    unknown = sorted(set(found) - set(wanted))
    if unknown:
        raise UserError(f"{source}: {unknown[0]!r} has no counterpart ({len(unknown)} in all)")


def _check_like(name: str, found: Tensor, wanted: Tensor, source: str | Path) -> None:
    for what in ("shape", "dtype"):
        got, want = getattr(found, what), getattr(wanted, what)
        if got != want:
            raise UserError(f"{source}: {name!r}: {what} must be {_plain(want)}, got {_plain(got)}")


def _plain(value: Any) -> str:
    return str(tuple(value)) if isinstance(value, torch.Size) else str(value)
