"""Small checkpoints of both layouts, one folder each for all tests of a module."""

from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import JanusForConditionalGeneration

from engine.model.policy import Policy
from tests.engine.weights.original_layout import (
    small_model,
    write_original,
)

# (key/value heads, tied, layers): MHA, GQA, one shared head; tied and not; 1 to 4 layers
MODELS = [(4, False, 1), (2, False, 2), (1, True, 3), (4, True, 4)]
LAYOUTS = ["original", "transformers"]


@cache
def their_model(kv_heads: int, tied: bool, layers: int) -> JanusForConditionalGeneration:
    return small_model(kv_heads=kv_heads, tied=tied, layers=layers)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The model's folder in a layout; transformers' is written by transformers."""
    root = tmp_path_factory.mktemp("checkpoints")

    def folder(layout: str, model: tuple[int, bool, int]) -> Path:
        path = root / layout / "-".join(map(str, model))
        if not path.exists():
            theirs = their_model(*model)
            write_original(path, theirs)
            if layout == "transformers":
                (path / "model.safetensors").unlink()
                theirs.save_pretrained(path)
        return path

    return folder


@pytest.fixture
def original(folders) -> Path:
    return folders("original", (2, False, 2))


def prompts_of(*lengths: int) -> list[torch.Tensor]:
    """BOS ... image-start, as the test's tokenizer numbers them."""
    rng = torch.Generator().manual_seed(3)
    middles = [torch.randint(8, 320, (n - 2,), generator=rng) for n in lengths]
    return [torch.cat((torch.tensor([0]), m, torch.tensor([4]))) for m in middles]


def equal_states(one: Policy, other: Policy) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for f in folder.glob("*.safetensors") for k, v in load_file(f).items()}
