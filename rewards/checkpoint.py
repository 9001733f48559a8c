"""Checkpoint folders of strangers, in transformers' layout: read as data, every fault named.

No code of a checkpoint is run: safetensors, or pickles through weights_only, and no remote code.
Weights are streamed tensor by tensor into a model that stands already, so that loading needs
the memory of one model.
"""

import json
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

Config = TypeVar("Config", bound=PreTrainedConfig)
WEIGHT_NAMES = ("model.safetensors", "pytorch_model.bin")
# Tables that older files carry and current models compute.
COMPUTED = (".position_ids", ".inv_freq")


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in `file`."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{file}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not JSON ({reason(error)})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: wanted a JSON object, got {type(content).__name__}")
    return content


def read_config(folder: Path, *model_types: str) -> dict[str, Any]:
    """The folder's config.json, checked to be of one of `model_types`."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such checkpoint folder")
    config = read_json(folder / "config.json")
    if config.get("model_type") not in model_types:
        wanted = " or ".join(map(repr, model_types))
        found = config.get("model_type")
        raise ValueError(f"{folder / 'config.json'}: model_type is {found!r}, wanted {wanted}")
    return config


def config_from(cls: type[Config], values: dict[str, Any], folder: Path) -> Config:
    """A config of a transformers class, from the values of the folder's config.json."""
    try:
        return cls(**{k: v for k, v in values.items() if k != "model_type"})
    # Depends on the class: strict dataclass errors, and whatever a wrong type does first.
    except Exception as error:
        raise ValueError(f"{folder / 'config.json'}: {reason(error)}") from error


def read_image_settings(folder: Path) -> dict[str, Any]:
    """The image processor's settings: preprocessor_config.json, or a part of processor_config."""
    whole = folder / "processor_config.json"
    if (folder / "preprocessor_config.json").exists() or not whole.exists():
        return read_json(folder / "preprocessor_config.json")
    settings = read_json(whole).get("image_processor")
    if not isinstance(settings, dict):
        raise ValueError(f"{whole}: holds no 'image_processor'")
    return settings


def read_tokenizer(folder: Path, config: PreTrainedConfig) -> PreTrainedTokenizerBase:
    """The folder's tokenizer. Args: config: of the model whose text it splits."""
    try:
        return AutoTokenizer.from_pretrained(
            str(folder), config=config, local_files_only=True, trust_remote_code=False
        )
    # Damaged tokenizer files raise whatever their parser does, the bare Exception included.
    except Exception as error:
        raise ValueError(f"{folder}: no usable tokenizer ({reason(error)})") from error


def token_id(tokenizer: PreTrainedTokenizerBase, word: str, folder: Path) -> int:
    """The id of a word that must be one token of the vocabulary."""
    found = tokenizer.convert_tokens_to_ids(word)
    if found is None or found == tokenizer.unk_token_id:
        raise ValueError(f"{folder}: the tokenizer has no token {word!r}")
    return found


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a folder's weights; safetensors before pickles where it has both."""
    for name in WEIGHT_NAMES:
        index = folder / f"{name}.index.json"
        if (folder / name).exists():
            return [folder / name]
        if index.exists():
            shards = read_json(index).get("weight_map")
            if not isinstance(shards, dict) or not shards:
                raise ValueError(f"{index}: holds no 'weight_map'")
            # Only names beside the index: a path elsewhere is no shard of this checkpoint.
            return [folder / name for name in sorted({Path(str(s)).name for s in shards.values()})]
    raise ValueError(f"{folder / WEIGHT_NAMES[0]}: no such file, nor {WEIGHT_NAMES[1]}")


def read_pickle(file: Path) -> Any:
    """What torch.save wrote, as data: no code of the file is run.

    Raises: ValueError naming the file.
    """
    try:
        # Mapped, a shard costs no memory of its own; only the zip format can be.
        return torch.load(
            file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
        )
    # A damaged pickle can raise anything.
    except Exception as error:
        raise ValueError(f"{file}: not a weights file ({reason(error)})") from error


def read_tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    """The keys and tensors of one weights file, on the CPU and only valid until the next one.

    Args: file: .safetensors, or a pickled dict of tensors.
    Raises: ValueError naming the file, and the key where one is at fault.
    """
    if not file.is_file():
        raise ValueError(f"{file}: no such file")
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="pt") as content:
                for key in content.keys():
                    yield key, content.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file}: not a safetensors file ({reason(error)})") from error
        return
    content = read_pickle(file)
    if not isinstance(content, dict):
        raise ValueError(f"{file}: wanted a dict of tensors, got {type(content).__name__}")
    for key, tensor in content.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{file}: {key!r} is a {type(tensor).__name__}, not a tensor")
        yield key, tensor


def build_model(
    auto_class: Any,
    config: PreTrainedConfig,
    file: Path,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
) -> PreTrainedModel:
    """The architecture of a config, frozen, with random weights that are about to be replaced.

    Args:
        auto_class: transformers' Auto class of the task.
        file: where the config came from, for the error.
    """
    device = torch.device(device)
    try:
        # The caller's random numbers must not depend on which experts it loads.
        with torch.random.fork_rng([device] if device.type == "cuda" else []), device:
            model = auto_class.from_config(config, dtype=dtype)
    # Impossible sizes fail wherever they are first used.
    except Exception as error:
        raise ValueError(f"{file}: no model can be built from it ({reason(error)})") from error
    return model.eval().requires_grad_(False)


def load_weights(
    model: torch.nn.Module,
    files: list[Path],
    rename: Callable[[str], str | None] = lambda key: key,
) -> None:
    """Fill a model from weight files, each tensor cast to the dtype and device of its place.

    Args: rename: a file's key -> the model's own, None for one to leave out.
    Raises: ValueError naming file and key for one that is missing, unexpected, given twice, of
        another shape, not floating point, or at odds with the weight it is tied to.
    """
    wanted = model.state_dict()
    loaded: set[str] = set()
    filled: dict[int, str] = {}  # address -> key; tied weights share one
    for file in files:
        for key, tensor in read_tensors(file):
            name = rename(key) if not key.endswith(COMPUTED) else None
            if name is None:
                continue
            if name not in wanted:
                raise ValueError(f"{file}: unexpected key {key!r}")
            if name in loaded:
                raise ValueError(f"{file}: key {key!r} is given twice")
            place = wanted[name]
            if tensor.shape != place.shape:
                raise ValueError(
                    f"{file}: {key!r} is {tuple(tensor.shape)}, wanted {tuple(place.shape)}"
                )
            if not tensor.is_floating_point() or tensor.layout != torch.strided:
                raise ValueError(f"{file}: {key!r} is {tensor.layout} {tensor.dtype}, no weight")
            tied = filled.setdefault(place.data_ptr(), name)
            if tied == name:
                place.copy_(tensor)
            elif not torch.equal(place, tensor.to(place)):
                raise ValueError(f"{file}: {key!r} differs from {tied!r}, to which it is tied")
            loaded.add(name)
    absent = [n for n, place in wanted.items() if place.data_ptr() not in filled]
    if absent:
        where = files[0] if len(files) == 1 else files[0].parent
        raise ValueError(f"{where}: key {absent[0]!r} is missing ({len(absent)} in all)")


def reason(error: Exception) -> str:
    """What an error says that matters, on one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # torch.load opens with advice to trust the file; the finding stands further down.
    found = [line for line in lines if "weights_only" not in line and "Weights only" not in line]
    return found[0] if found else type(error).__name__
