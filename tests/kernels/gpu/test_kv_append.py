"""Rotation and append: Triton (in the interpreter without a GPU), C and the PyTorch path."""

import pytest
import torch
from torch import Tensor

from engine.model.rope import rotate
from kernels import kv_append
from kernels.gpu import kv_append as gpu_kv_append
from kernels.gpu.launch import DecodeShape
from kernels.reference import attention as reference_attention
from kernels.state import LayerCache

pytestmark = pytest.mark.usefixtures("nearest_rounding")


FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
LENGTH = 40  # positions in the tables
SLOTS = 5


class Case:
    """Random projections and a NaN-filled cache; the cache and qkv are views of larger tensors."""

    def __init__(
        self,
        device: str,
        dtype: torch.dtype,
        heads: int,
        kv_heads: int,
        head_dim: int,
        rows: int,
        slot: int = 2,
    ) -> None:
        rng = torch.Generator().manual_seed(heads * head_dim + rows)
        self.heads, self.kv_heads = heads, kv_heads
        width = (heads + 2 * kv_heads) * head_dim
        self.qkv = torch.randn(rows, width + 16, generator=rng).to(device, dtype)[:, :width]
        angles = torch.rand(LENGTH, head_dim // 2, generator=rng) * 6
        self.cos, self.sin = angles.cos().to(device), angles.sin().to(device)
        first = torch.randint(0, LENGTH - SLOTS, (rows,), generator=rng)
        self.first = first.to(device, torch.int32)
        self.step = torch.tensor([slot], dtype=torch.int32, device=device)
        shape = (2, 2, rows, kv_heads, SLOTS, head_dim)
        self.cache = torch.full(shape, torch.nan, dtype=dtype, device=device)
        self.keys, self.values = self.cache[1]

    def run(self, **overrides) -> Tensor:
        none = self.first.new_zeros(0)
        cache = LayerCache(
            step=self.step,
            first_positions=self.first,
            keys=self.keys,
            values=self.values,
            prefix_keys=none,
            prefix_values=none,
            prefix_lengths=none,
            tiles=none,
            row_prefix=none,
        )
        return kv_append(self.qkv, self.cos, self.sin, cache, **({"heads": self.heads} | overrides))

    def expected(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        at = self.first.long() + self.step
        angles = self.cos[at].to(dtype), self.sin[at].to(dtype)
        return reference_attention.rotated(self.qkv.to(dtype), *angles, self.heads, self.kv_heads)

    def eager(self) -> Tensor:
        """Queries then keys, rotated with every operation in the inputs' dtype, as Llama does."""
        at = self.first.long() + self.step
        dtype = self.qkv.dtype
        cos, sin = self.cos[at].to(dtype).repeat(1, 2), self.sin[at].to(dtype)
        x = self.qkv.view(len(at), self.heads + 2 * self.kv_heads, -1)[:, : -self.kv_heads]
        return rotate(x, cos[:, None], torch.cat((-sin, sin), -1)[:, None])


SHAPES = {  # dtype, heads, kv_heads, head_dim, rows
    "mha_128": (BF16, 16, 16, 128, 3),
    "mha_96": (FP16, 3, 3, 96, 5),
    "mha_32_fp32": (FP32, 4, 4, 32, 7),
    "gqa_14_of_64": (BF16, 14, 2, 64, 4),
    "gqa_40_of_128": (FP32, 40, 10, 128, 1),
    "one_row_of_16": (FP16, 1, 1, 16, 1),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_against_fp64(shape, path):
    case = Case(path, *shape)
    out = torch.full(
        (shape[4], case.heads, shape[3]), torch.nan, dtype=shape[0], device=case.qkv.device
    )
    assert case.run(out=out) is out
    q, k, v = case.expected(torch.float64)
    got = torch.cat((out, case.keys[:, :, 2]), 1).double()
    truth = torch.cat((q, k), 1)
    allowed = (case.eager().double() - truth).abs()
    error = (got - truth).abs()
    assert error.max() <= 2 * allowed.max() + 1e-6
    assert error.mean() <= 2 * allowed.mean() + 1e-7
    assert torch.equal(case.values[:, :, 2].double(), v)
    # Nothing else in the cache is touched: other slots, other layers.
    touched = case.cache.isfinite()
    assert touched[1, :, :, :, 2].all() and touched.sum() == touched[1, :, :, :, 2].numel()


def test_the_training_forward_rotates_alike(path):
    case = Case(path, FP32, 4, 2, 32, 3)
    q = case.run()
    torch.testing.assert_close(torch.cat((q, case.keys[:, :, 2]), 1), case.eager())


def test_step_is_read_on_the_device(path):
    """One set of buffers, step advanced in place: each step fills its slot at its position."""
    case = Case(path, FP32, 2, 1, 32, 3)
    out = case.qkv.new_empty(3, 2, 32)
    for slot in range(SLOTS):
        case.step.fill_(slot)
        case.run(out=out)
        q, k, v = case.expected(FP32)
        torch.testing.assert_close(out, q)
        torch.testing.assert_close(case.keys[:, :, slot], k)
        torch.testing.assert_close(case.values[:, :, slot], v)
        assert case.keys[:, :, slot + 1 :].isnan().all()


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy's, of infinity times zero
@pytest.mark.parametrize("dtype", [FP16, FP32])
def test_extreme_values_pass_untouched(path, dtype):
    """Values are copied, not rotated by an angle of zero; rows do not touch each other."""
    case = Case(path, dtype, 2, 2, 32, 3)
    case.qkv[0, -64] = torch.inf
    case.qkv[1] = torch.nan
    case.qkv[2, ::2], case.qkv[2, 1::2] = 1e4, -1e4
    q = case.run()
    assert torch.equal(case.values[0, :, 2].flatten(), case.qkv[0, -64:])
    assert case.qkv[0].isinf().sum() == case.values[0, :, 2].isinf().sum() == 1
    assert q[0].isfinite().all() and q[2].isfinite().all() and q[1].isnan().all()
    expected = case.expected(torch.float64)[0][2]
    torch.testing.assert_close(q[2].double(), expected, rtol=1e-3, atol=8)


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_a_row_is_the_same_bits_in_any_batch(path, dtype):
    case, alone = Case(path, dtype, 6, 3, 64, 5), Case(path, dtype, 6, 3, 64, 1)
    together = case.run()
    alone.qkv, alone.first = case.qkv[3:4], case.first[3:4]
    alone.cos, alone.sin = case.cos, case.sin
    assert torch.equal(alone.run()[0], together[3])
    assert torch.equal(alone.keys[0, :, 2], case.keys[3, :, 2])


def test_no_rows(path):
    case = Case(path, FP32, 2, 1, 32, 0)
    assert case.run().shape == (0, 2, 32)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("qkv", lambda c: setattr(c, "qkv", c.qkv[:, 16:])),
        ("qkv", lambda c: setattr(c, "qkv", torch.stack((c.qkv, c.qkv), -1)[..., 0])),
        ("cos", lambda c: setattr(c, "cos", c.cos.half())),
        ("sin", lambda c: setattr(c, "sin", c.sin.repeat(1, 2)[:, : c.sin.shape[1]])),
        ("first_positions", lambda c: setattr(c, "first", c.first.long())),
        ("step", lambda c: c.step.fill_(SLOTS)),
        ("keys", lambda c: setattr(c, "keys", c.keys[..., :23])),
        ("values", lambda c: setattr(c, "values", c.values[:1])),
    ],
)
def test_errors_name_the_argument(name, change):
    case = Case("cpu", FP32, 2, 1, 32, 3)
    change(case)
    with pytest.raises(ValueError, match=f"^{name}: wanted"):
        case.run()


@pytest.mark.parametrize("kv_heads", [16, 4])
def test_launches_describe_the_kernel(kv_heads):
    shape = DecodeShape(
        model="m", dtype="bf16", rows=128, group=8, hidden=2048, intermediate=5632, heads=16,
        kv_heads=kv_heads, head_dim=128, layers=24, image_vocab=16384, text_vocab=102400,
        head_width=2048, prefix=160, suffix=576,
    )  # fmt: skip
    (launch,) = gpu_kv_append.launches(shape)
    assert set(launch.kernel.arg_names) == set(launch.signature) | set(launch.constexprs)
    assert set(launch.divisible) | set(launch.narrow_ok) <= set(launch.signature)
    passed = 2 * 128 * (16 + 2 * kv_heads) * 128 * 2  # read and written
    assert launch.bytes_least == passed + 128 * (128 * 4 + 4)
    assert launch.bytes_least <= launch.bytes_moved <= 1.05 * launch.bytes_least
