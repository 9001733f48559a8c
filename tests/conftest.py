"""Small random policies shared by the tests; nothing here is trained or downloaded."""

import copy
import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import importlib
import pkgutil

import numpy as np
import pytest
import torch

# Without a GPU the kernels run in Triton's interpreter, which is chosen when Triton and the kernels
# are imported. Afterwards CPU tensors take the PyTorch path again, except under `interpreter`.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
import triton.language as tl
from triton.runtime import interpreter as triton_interpreter

import kernels.gpu

for module in pkgutil.iter_modules(kernels.gpu.__path__):
    importlib.import_module(f"kernels.gpu.{module.name}")
os.environ.pop("TRITON_INTERPRET", None)

from torch import Tensor
from transformers import (
    JanusConfig,
    JanusForConditionalGeneration,
    JanusVisionConfig,
    JanusVQVAEConfig,
    LlamaConfig,
)

from engine.model.policy import Policy
from kernels.cpu.build import library

VOCAB = 320  # room for the byte-level tokenizer of the save tests
CODES = 128
WIDTH = 64
UNDERSTANDING = ("model.vision_model.", "model.aligner.")


def small_config(kv_heads: int = 4, tied: bool = False) -> JanusConfig:
    """A two-layer Janus with 16 image tokens of 128 codes and a context of 64."""
    return JanusConfig(
        text_config=LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=WIDTH,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=kv_heads,
            max_position_embeddings=64,
            pad_token_id=2,
        ),
        vision_config=JanusVisionConfig(
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            image_size=8,
            patch_size=2,
            mlp_ratio=2.0,
            projection_dim=WIDTH,
            depth=2,
            num_image_tokens=16,
        ),
        vq_config=JanusVQVAEConfig(
            embed_dim=8,
            num_embeddings=CODES,
            latent_channels=32,
            base_channels=32,
            channel_multiplier=[1, 1],
            num_res_blocks=1,
            projection_dim=WIDTH,
            image_token_embed_dim=WIDTH,
            num_patches=4,
        ),
        tie_word_embeddings=tied,
    )


@cache
def janus_pair(kv_heads: int, tied: bool) -> tuple[JanusForConditionalGeneration, Policy]:
    """transformers' model and our policy with the same weights. Read-only: tests share them."""
    torch.manual_seed(0)
    config = small_config(kv_heads, tied)
    theirs = JanusForConditionalGeneration(config).eval()
    for name, parameter in theirs.named_parameters():
        # The stock initialisation gives nearly uniform attention and logits, and unit norms and
        # zero biases that a forward could leave out unnoticed.
        if parameter.ndim == 1:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
        elif "vqmodel" not in name:
            parameter.data.mul_(8)
    ours = Policy(config).eval()
    weights = theirs.state_dict()
    ours.load_state_dict({k: v for k, v in weights.items() if not k.startswith(UNDERSTANDING)})
    ours.freeze_generation()
    return theirs, ours


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what runs in Triton's interpreter."""
    for item in items:
        if {"interpreter", "kernel", "path"} & set(getattr(item, "fixturenames", ())):
            item.add_marker("interpreter")


@pytest.fixture(scope="session", autouse=True)
def _current_folder_is_left_alone() -> Iterator[None]:
    """Tests run from any folder, and write nothing into it."""
    here = Path.cwd()
    before = set(os.listdir(here))
    yield
    made = set(os.listdir(here)) - before - {".pytest_cache", "__pycache__"}
    assert Path.cwd() == here and not made, f"tests left these in {here}: {made}"


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def interpreter(monkeypatch) -> None:
    """Public ops take the Triton path on CPU tensors too."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture(params=["C", "PyTorch"])
def decoder(request, monkeypatch) -> str:
    """CPU rollouts take the C ops, then the ops' PyTorch paths."""
    if request.param == "PyTorch":
        monkeypatch.setattr("kernels.cpu.build.library", lambda: None)
    elif library() is None:
        pytest.skip("the C ops cannot be compiled here")
    return request.param


@pytest.fixture
def c_ops() -> Iterator[None]:
    """Public ops take the C kernels on fp32 CPU tensors: gradients are off."""
    if library() is None:
        pytest.skip("the C ops cannot be compiled here")
    with torch.no_grad():
        yield


def take(request, device: str) -> str:
    """Have ops take what the fixture's parameter names. Returns the device for their tensors."""
    if request.param == "triton":
        request.getfixturevalue("interpreter")
        return device
    if request.param == "c":
        request.getfixturevalue("c_ops")
    return "cpu"


@pytest.fixture(params=["triton", "c"])
def kernel(request, device) -> str:
    """Run the op by its kernels. Returns the device."""
    return take(request, device)


@pytest.fixture(params=["triton", "c", "pytorch"])
def path(request, device) -> str:
    """Run the op by its kernels and by PyTorch. Returns the device."""
    return take(request, device)


@pytest.fixture
def nearest_rounding(monkeypatch) -> None:
    """The interpreter cuts fp32 down to bf16; hardware rounds to the nearest even."""
    cut = triton_interpreter._convert_float

    def convert(values, source, target, mode):
        if (source, target) != (tl.float32, tl.bfloat16):
            return cut(values, source, target, mode)
        rounded = torch.from_numpy(np.ascontiguousarray(values)).bfloat16()
        return rounded.view(torch.int16).numpy().view(np.uint16).reshape(values.shape)

    monkeypatch.setattr(triton_interpreter, "_convert_float", convert)


@pytest.fixture
def pair() -> Callable[..., tuple[JanusForConditionalGeneration, Policy]]:
    return lambda kv_heads=4, tied=False: janus_pair(kv_heads, tied)


@pytest.fixture
def new_policy() -> Callable[..., Policy]:
    """A policy of the test's own, to be changed at will."""
    return lambda kv_heads=4, tied=False: copy.deepcopy(janus_pair(kv_heads, tied)[1])


@pytest.fixture
def make_prompts() -> Callable[..., list[Tensor]]:
    """Random prompts of the given lengths: BOS ... image-start."""

    def make(*lengths: int, seed: int = 0) -> list[Tensor]:
        rng = torch.Generator().manual_seed(seed)
        middles = [torch.randint(5, VOCAB, (n - 2,), generator=rng) for n in lengths]
        return [torch.cat((torch.tensor([0]), m, torch.tensor([3]))) for m in middles]

    return make
