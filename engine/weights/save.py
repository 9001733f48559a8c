"""Writing a policy as a checkpoint folder of either layout."""

import copy
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import JanusConfig

from engine.model.adapter import plain_state
from engine.model.policy import Policy
from engine.run.inside import inside, inside_or_none
from engine.settings.errors import UserError
from engine.weights.files import Reader, read_json
from engine.weights.layout import (
    LAYOUTS,
    ORIGINAL,
    TRANSFORMERS,
    Made,
    aside_in,
    is_original_only,
    renamed,
)
from engine.weights.original import original_values

MAX_SHARD_BYTES = 5_000_000_000
MANIFEST = "saved_policy.json"
# Files that mean the same in both layouts, and files that each layout has in a form of its own.
# The latter wait in a folder called like their layout while the checkpoint is in the other one.
SHARED_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "prompt_template.json",
)
OWN_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "chat_template.jinja",
    "chat_template.json",
)
ORIGINAL_ONLY = f"{ORIGINAL}/original_only.safetensors"
# What the names of a saved policy look like, whatever a folder's MANIFEST claims.
_NAME = re.compile(rf"(({ORIGINAL}|{TRANSFORMERS})/)?[\w.-]+\.(safetensors|json|model|jinja)")


class _Output(NamedTuple):
    bytes: int
    make: Callable[[], Tensor]


def save_folder(policy: Policy, folder: Path, *, layout: str | None, max_shard_bytes: int) -> Path:
    """See engine.policy.save_policy."""
    source = policy.source
    layout = layout or (source.layout if source else TRANSFORMERS)
    write = partial(
        write_policy,
        policy,
        companions=source.folder if source else None,
        layout=layout,
        max_shard_bytes=max_shard_bytes,
    )
    return replace_folder(folder, write, layout=layout)


def replace_folder(folder: Path, write: Callable[[Path], None], *, layout: str) -> Path:
    """Make a folder whole or not at all, in place of one that this function made.

    Args:
        write: fills the empty folder that it is given.
        layout: what the manifest says of it.
    Returns: the folder as it was given.
    Raises: UserError naming the folder that cannot be written or must not be replaced.
    """
    require_replaceable(folder)
    typed, folder = folder, Path(os.path.realpath(folder))  # not the link, but what it names
    temporary = inside(folder.parent, f".{folder.name}.tmp-{os.getpid()}")
    replaced = inside(folder.parent, f".{folder.name}.old-{os.getpid()}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        write(temporary)
        content = {"layout": layout, "files": _files_in(temporary)}
        write_json(temporary / MANIFEST, content)
        for path in (*temporary.rglob("*"), temporary):
            _fsync(path)
        # A folder cannot be replaced in one step: the one before steps aside for a moment.
        if folder.exists():
            os.rename(folder, replaced)
        os.rename(temporary, folder)
        _fsync(folder.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        if replaced.exists() and not folder.exists():
            os.rename(replaced, folder)
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{typed}: cannot be written: {reason}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return typed


def require_replaceable(folder: Path) -> None:
    """Raise UserError unless `folder` is absent, empty, or holds what `save_folder` left."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"{folder}: not a folder")
    found = _files_in(folder)
    listed = read_json(inside(folder, MANIFEST)).get("files") if MANIFEST in found else []
    listed = listed if isinstance(listed, list) else []
    own = {name for name in listed if isinstance(name, str) and _NAME.fullmatch(name)}
    own = {MANIFEST, *(name for name in own if inside_or_none(folder, name))}
    foreign = [name for name in found if name not in own]
    if foreign:
        raise UserError(
            f"{folder}: would be replaced, but holds {foreign[0]!r}, which is not of a saved policy"
        )


def write_policy(
    policy: Policy,
    folder: Path,
    *,
    companions: Path | None = None,
    layout: str = TRANSFORMERS,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write weights and config into a folder, over what is there; `save_policy` is atomic.

    Args:
        companions: checkpoint folder whose tokenizer and processor files are copied.
        layout: of LAYOUTS. What only the original has goes to `original/`, if need be.
        max_shard_bytes: most bytes of tensors in a file, but for a larger single tensor.
    Raises: UserError naming file and key of an understanding tower that cannot be carried over.
    """
    if layout not in LAYOUTS:
        raise UserError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    folder.mkdir(parents=True, exist_ok=True)
    for name in _files_in(folder):
        inside(folder, name)  # else a link of a file's name would be written through
    aside = policy.source.aside.values() if policy.source else ()
    # They are read while the files are written.
    assert not any(entry.file.parent.samefile(folder) for entry in aside), folder
    outputs, only = _outputs(policy, layout)
    _write_shards(folder, outputs, max_shard_bytes)
    if only:
        (folder / ORIGINAL).mkdir(exist_ok=True)
        tensors = {key: output.make() for key, output in only.items()}
        save_file(tensors, folder / ORIGINAL_ONLY, metadata={"format": "pt"})
    if layout == TRANSFORMERS:
        _transformers_config(policy).save_pretrained(folder)
        if policy.source and policy.source.original:
            (folder / ORIGINAL).mkdir(exist_ok=True)
            write_json(folder / ORIGINAL / "config.json", policy.source.original)
    else:
        write_json(folder / "config.json", _original_config(policy))
    if companions:
        _copy_companions(companions, folder, policy, layout)


def _outputs(policy: Policy, layout: str) -> tuple[dict[str, _Output], dict[str, _Output]]:
    """The layout's tensors by key, and those that only the original layout has a place for."""
    outputs: dict[str, _Output] = {}
    for name, (tensor, values) in plain_state(policy).items():
        tied = policy.config.tie_word_embeddings and name == "lm_head.weight"
        if tied and layout == TRANSFORMERS:
            continue
        key = name if layout == TRANSFORMERS else renamed(name, ORIGINAL)
        assert key is not None, name
        # The original has tied embeddings twice, but a file must not have one storage twice.
        make = partial(_storable, values, copied=tied)
        outputs[key] = _Output(tensor.nbytes, make)
    only: dict[str, _Output] = {}
    if policy.source:
        reader = Reader(policy.source.aside)
        for key, made in aside_in(layout, policy.source.aside).items():
            target = only if layout == TRANSFORMERS and is_original_only(key) else outputs
            size = prod(made.shape) * made.dtype.itemsize
            target[key] = _Output(size, partial(_made, made, reader))
    return outputs, only


def _made(made: Made, reader: Reader) -> Tensor:
    return made.make(*(reader[name] for name in made.sources))


def _write_shards(folder: Path, outputs: Mapping[str, _Output], max_bytes: int) -> None:
    """One file, or several and their index; one file's tensors are in memory at a time."""
    shards: list[list[str]] = [[]]
    size = 0
    for key, output in outputs.items():
        if shards[-1] and size + output.bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(key)
        size += output.bytes
    single = folder / "model.safetensors"
    places: dict[str, str] = {}
    for number, keys in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        path = single if len(shards) == 1 else folder / name
        tensors = {key: outputs[key].make() for key in keys}
        save_file(tensors, path, metadata={"format": "pt"})
        places |= dict.fromkeys(keys, path.name)
    if len(shards) > 1:
        single.unlink(missing_ok=True)  # it would be read in place of the shards
        total = sum(output.bytes for output in outputs.values())
        content = {"metadata": {"total_size": total}, "weight_map": places}
        write_json(folder / f"{single.name}.index.json", content)


def _transformers_config(policy: Policy) -> JanusConfig:
    config = copy.deepcopy(policy.config)
    config.architectures = ["JanusForConditionalGeneration"]
    for part in (config, config.text_config, config.vision_config, config.vq_config):
        part.dtype = policy.dtype
    return config


def _original_config(policy: Policy) -> dict[str, Any]:
    known = policy.source.original if policy.source else None
    values = copy.deepcopy(dict(known)) if known else original_values(policy.config)
    language, tied = values.setdefault("language_config", {}), policy.config.tie_word_embeddings
    for section in (values, language):  # newer libraries write the shorter name
        name = "dtype" if "dtype" in section else "torch_dtype"
        section[name] = str(policy.dtype).removeprefix("torch.")
    if language.get("tie_word_embeddings", False) != tied:
        language["tie_word_embeddings"] = tied
    return values


def _copy_companions(source: Path, folder: Path, policy: Policy, layout: str) -> None:
    """Tokenizer, generation and processor files, those of the other layout in its folder."""
    for name in SHARED_FILES:
        _copy(source / name, folder / name)
    came = policy.source.layout if policy.source else TRANSFORMERS
    for name in OWN_FILES:
        for owner in LAYOUTS:
            place = folder if owner == layout else folder / owner
            _copy((source if owner == came else source / owner) / name, place / name)
    if layout == TRANSFORMERS and not (folder / "generation_config.json").exists():
        write_json(folder / "generation_config.json", _generation_config(policy))


def _generation_config(policy: Policy) -> dict[str, Any]:
    """What transformers' `generate(generation_mode="image")` asks of the file; Janus' guidance."""
    return {
        "bos_token_id": policy.bos,
        "eos_token_id": policy.eos,
        "pad_token_id": policy.pad,
        "guidance_scale": 5.0,
        "generation_kwargs": {"boi_token_id": policy.image_start},
    }


def _copy(source: Path, target: Path) -> None:
    if source.is_file():
        target.parent.mkdir(exist_ok=True)
        if not (target.exists() and target.samefile(source)):
            shutil.copyfile(source, target)


def _storable(values: Callable[[], Tensor], *, copied: bool) -> Tensor:
    """On the CPU, dense, and owning its storage: views of one storage cannot be saved."""
    tensor = values().detach().cpu().contiguous()
    owns = tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if owns and not copied else tensor.clone()


def _files_in(folder: Path) -> list[str]:
    """All but plain folders: a link to a folder counts as a file."""
    found = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted(path.relative_to(folder).as_posix() for path in found)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write an object in a form to be read."""
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _fsync(path: Path) -> None:
    """Flush a file's content, or a folder's list of names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
