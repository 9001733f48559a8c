"""Decode attention: Triton (in the interpreter without a GPU), C and the PyTorch path."""

import pytest
import torch
from torch import Tensor

from kernels import decode_attention, decode_attention_workspace, prefix_tiles, tile_rows
from kernels.gpu import decode_attention as gpu_decode_attention
from kernels.gpu.launch import DecodeShape
from kernels.reference import attention as reference_attention
from kernels.state import LayerCache
from kernels.tiling import split_tokens

pytestmark = pytest.mark.usefixtures("nearest_rounding")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Beyond twice eager's error: one rounding in the sum of values near 1.
SLACK = {torch.float32: 1e-6, torch.bfloat16: 1e-4, torch.float16: 1e-5}


class Case:
    """Random inputs of the op; the cache is NaN beyond each row's tokens.

    Args:
        runs: rows of each prefix in turn.
        lengths: (R,) prefix tokens of each row.
        length: suffix tokens, the current one included.
    """

    def __init__(
        self,
        device: str,
        dtype: torch.dtype,
        heads: int,
        kv_heads: int,
        head_dim: int,
        runs: list[int],
        lengths: list[int],
        length: int,
        suffix: int,
        spread: float = 1.0,
    ) -> None:
        rng = torch.Generator().manual_seed(head_dim * sum(runs) + length)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=rng) * scale).to(device, dtype)

        rows, prefix = sum(runs), max(lengths)
        self.length, self.scale = length, head_dim**-0.5
        self.row_prefix = torch.arange(len(runs)).repeat_interleave(torch.tensor(runs)).to(device)
        self.lengths = torch.tensor(lengths, dtype=torch.int32, device=device)
        self.step = torch.tensor([length - 1], dtype=torch.int32, device=device)
        self.tiles = prefix_tiles(self.row_prefix, tile_rows(heads, kv_heads))
        self.q = normal(rows, heads, head_dim, scale=spread)
        # Views of one cache that holds more than this layer, as the engine's do.
        cache = normal(2, 2, rows, kv_heads, suffix, head_dim)
        shared = normal(2, 2, len(runs), kv_heads, prefix + 3, head_dim)
        cache[..., length:, :] = torch.nan
        for index in range(len(runs)):
            longest = int(self.lengths[self.row_prefix == index].max())
            shared[:, :, index, :, longest:] = torch.nan
        self.keys, self.values = cache[1]
        self.prefix_keys, self.prefix_values = shared[1]

    def run(self, **overrides) -> Tensor:
        cache = LayerCache(
            step=self.step,
            first_positions=self.lengths,
            keys=self.keys,
            values=self.values,
            prefix_keys=self.prefix_keys,
            prefix_values=self.prefix_values,
            prefix_lengths=self.lengths,
            tiles=self.tiles,
            row_prefix=self.row_prefix.to(torch.int32),
        )
        return decode_attention(self.q, cache, scale=self.scale, **overrides)

    def only(self, row: int) -> "Case":
        """The same row alone, its cache no larger than it needs."""
        alone, used = object.__new__(Case), int(self.lengths[row])
        alone.length, alone.scale, alone.step = self.length, self.scale, self.step
        alone.lengths = self.lengths[row : row + 1]
        alone.row_prefix = torch.zeros_like(self.row_prefix[:1])
        alone.tiles = prefix_tiles(alone.row_prefix, 1)
        alone.q = self.q[row : row + 1]
        alone.keys = self.keys[row : row + 1, :, : self.length]
        alone.values = self.values[row : row + 1, :, : self.length]
        index = int(self.row_prefix[row])
        alone.prefix_keys = self.prefix_keys[index : index + 1, :, :used]
        alone.prefix_values = self.prefix_values[index : index + 1, :, :used]
        return alone

    def truth(self) -> Tensor:
        cached = (self.keys, self.values, self.prefix_keys, self.prefix_values)
        k, v, pk, pv = (t.double() for t in cached)
        rest = (self.lengths, self.row_prefix, self.scale)
        return reference_attention.decode_attention(
            self.q.double(), k, v, self.length, pk, pv, *rest
        )

    def eager(self) -> Tensor:
        """Every operation in the inputs' dtype."""
        result = []
        for row, query in enumerate(self.q):
            used, index = int(self.lengths[row]), int(self.row_prefix[row])
            prefix = self.prefix_keys[index, :, :used], self.prefix_values[index, :, :used]
            k = torch.cat((prefix[0], self.keys[row, :, : self.length]), 1)
            v = torch.cat((prefix[1], self.values[row, :, : self.length]), 1)
            query = query.view(len(k), -1, query.shape[-1])
            result.append(((query @ k.mT * self.scale).softmax(-1) @ v).flatten())
        return torch.stack(result)


def assert_rule(got: Tensor, case: Case) -> None:
    """|got - fp64| <= 2 |eager - fp64| + slack, in the largest error and in the mean."""
    eager, truth = case.eager(), case.truth()
    assert got.dtype == eager.dtype and got.isfinite().all()
    error, allowed = (got.double() - truth).abs(), (eager.double() - truth).abs()
    slack = SLACK[got.dtype] * truth.abs().max().clamp(min=1)
    assert error.max() <= 2 * allowed.max() + slack
    assert error.mean() <= 2 * allowed.mean() + slack


# Two blocks: conditional groups with a prefix each, then unconditional rows that use different
# lengths of one nested prefix. (dtype, heads, kv_heads, head_dim, runs, lengths, length, suffix)
FP32, BF16, FP16 = DTYPES
SHAPES = {
    "mha_64": (BF16, 2, 2, 64, [2, 1, 3], [7, 7, 260, 7, 260, 5], 260, 300),
    "mha_64_fp32": (FP32, 2, 2, 64, [1, 2], [3, 7, 5], 33, 40),
    "mha_32_tile_of_17": (FP16, 1, 1, 32, [17, 8], [40] * 17 + [9] * 8, 5, 6),
    "mha_96": (BF16, 1, 1, 96, [2, 2], [33, 33, 20, 33], 70, 90),
    "mha_96_fp32": (FP32, 1, 1, 96, [3], [20, 33, 1], 17, 20),
    "gqa_2_of_128": (BF16, 4, 2, 128, [1, 2], [70, 11, 70], 20, 30),
    "gqa_2_of_128_split": (FP16, 2, 1, 128, [2], [1, 2], 516, 530),
    "gqa_4_of_96": (FP16, 4, 1, 96, [1, 9], [515] + [30] * 9, 65, 65),
    "gqa_4_of_32_fp32": (FP32, 8, 2, 32, [3], [8, 3, 8], 9, 11),
    "gqa_7_of_64": (BF16, 7, 1, 64, [10], [20] * 10, 33, 64),
    "one_row": (FP32, 2, 2, 16, [1], [1], 1, 1),
    "gqa_9_of_48_fp32": (FP32, 9, 1, 48, [2, 1], [3, 0, 150], 290, 300),
    "mha_128_fp32": (FP32, 2, 2, 128, [2], [130, 17], 128, 128),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_kernel_against_fp64(shape, kernel):
    device, (dtype, *shape) = kernel, shape
    heads, kv_heads, head_dim, runs, lengths, length, suffix = shape
    case = Case(device, dtype, heads, kv_heads, head_dim, runs, lengths, length, suffix)
    sizes = (len(lengths), heads, kv_heads, head_dim, case.prefix_keys.shape[2], suffix)
    workspace = decode_attention_workspace(*sizes, device=device)
    for buffer in workspace:
        buffer.fill_(torch.nan)
    out = torch.full((len(lengths), heads * head_dim), torch.nan, dtype=dtype, device=device)
    assert case.run(out=out, workspace=workspace) is out
    assert_rule(out, case)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_pytorch_path_against_fp64(shape, monkeypatch):
    monkeypatch.setattr("kernels.cpu.build.library", lambda: None)
    dtype, heads, kv_heads, head_dim, runs, lengths, length, suffix = shape
    case = Case("cpu", dtype, heads, kv_heads, head_dim, runs, lengths, length, suffix)
    assert_rule(case.run(), case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_longer_row_s_nan_is_its_own_in_pytorch(dtype, monkeypatch):
    """Two rows of one prefix: what only the longer one attends does not reach the shorter one."""
    monkeypatch.setattr("kernels.cpu.build.library", lambda: None)
    case = Case("cpu", dtype, 2, 1, 32, [2], [4, 9], 3, 5)
    before = case.run()[0].clone()
    case.prefix_keys[:, :, 4:], case.prefix_values[:, :, 4:] = torch.nan, torch.nan
    assert torch.equal(case.run()[0], before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_scores_and_values(dtype, kernel):
    """Scores of a thousand and values of 1e4: finite, and as accurate as eager."""
    case = Case(kernel, dtype, 1, 1, 64, [2], [40, 30], 80, 80, spread=1000.0)
    for values in (case.values, case.prefix_values):
        values.mul_(1e4 / 4)
    assert_rule(case.run(), case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (2, 1)])
def test_a_row_is_the_same_bits_in_any_batch(heads, kv_heads, kernel, dtype):
    split = split_tokens(heads, kv_heads)
    lengths = [3, 3, 5, split + 4, 0]
    case = Case(kernel, dtype, heads, kv_heads, 32, [2, 3], lengths, split + 5, split + 9)
    together = case.run()
    for row in range(1, 5):
        assert torch.equal(case.only(row).run()[0], together[row])


def test_step_is_read_on_the_device(device, interpreter):
    """One set of buffers, step advanced in place: as if each step had been called afresh; splits
    beyond it are left alone."""
    case = Case(device, torch.float32, 1, 1, 32, [2], [5, 4], 300, 300)
    cached = case.keys.clone(), case.values.clone()
    sizes = (2, 1, 1, 32, case.prefix_keys.shape[2], 300)
    for length in (1, 256, 257):
        for cache, full in zip((case.keys, case.values), cached, strict=True):
            cache.copy_(full)
            cache[:, :, length:] = torch.nan
        case.length = length
        case.step.fill_(length - 1)
        partial, lse = decode_attention_workspace(*sizes, device=device)
        partial.fill_(torch.nan), lse.fill_(torch.nan)
        assert_rule(case.run(workspace=(partial, lse)), case)
        computed = 1 + -(-length // 256)  # one prefix split
        assert lse.view(2, -1).isfinite().sum(1).tolist() == [computed] * 2
        assert partial.view(2, 3, 32).isfinite().all(2).sum(1).tolist() == [computed] * 2


@pytest.mark.parametrize("dtype", [FP16, FP32])
@pytest.mark.parametrize("capacity", [0, 7])
def test_empty_prefix(capacity, kernel, dtype):
    """P = 0 and no tiles, or a prefix of which no row uses a token; step 0."""
    case = Case(kernel, dtype, 2, 1, 32, [3], [0, 0, 0], 1, 4)
    case.prefix_keys = torch.full((1, 1, capacity, 32), torch.nan).to(case.q)
    case.prefix_values = case.prefix_keys.clone()
    if not capacity:
        case.prefix_keys, case.prefix_values = case.prefix_keys[:0], case.prefix_values[:0]
        case.tiles = case.tiles[:0]
    # The only key has all the weight.
    expected = case.values[:, :, 0].expand(3, 2, 32).reshape(3, 64)
    assert torch.equal(case.run(), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])  # on a CPU: PyTorch, and C
def test_no_rows(dtype, kernel):
    case = Case(kernel, dtype, 2, 2, 32, [1], [3], 2, 4)
    for name in ("q", "keys", "values", "lengths", "row_prefix", "tiles"):
        setattr(case, name, getattr(case, name)[:0])
    assert case.run().shape == (0, 64)


def test_tiles_are_runs_of_one_prefix():
    table = prefix_tiles(torch.tensor([0, 0, 0, 2, 2, -1, 2, 1]), 2)
    assert table.tolist() == [[0, 2, 0], [2, 1, 0], [3, 2, 2], [6, 1, 2], [7, 1, 1]]
    assert table.dtype == torch.int32 and table.is_contiguous()
    rows = [count for _, count, _ in prefix_tiles(torch.zeros(17, dtype=torch.int64), 8).tolist()]
    assert rows == [8, 8, 1]
    assert prefix_tiles(torch.tensor([-1]), 4).shape == (0, 3)


def test_a_tile_too_large_does_not_pass_unseen(device, request):
    case = Case(device, torch.float32, 1, 1, 16, [18], [4] * 18, 2, 2)
    case.tiles = prefix_tiles(case.row_prefix[:17], 32)
    request.getfixturevalue("interpreter")
    out = case.run()
    assert out[:16].isnan().all()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("q", lambda c: setattr(c, "q", c.q[..., :11])),
        ("keys", lambda c: setattr(c, "keys", c.keys[:, :, :, ::2])),
        ("values", lambda c: setattr(c, "values", c.values.mT.contiguous().mT)),
        ("values", lambda c: setattr(c, "values", c.values.contiguous()[:, :, :-1])),
        ("prefix_values", lambda c: setattr(c, "prefix_values", c.prefix_values.half())),
        ("prefix_lengths", lambda c: setattr(c, "lengths", c.lengths.long())),
        ("step", lambda c: setattr(c, "step", c.step[0])),
        ("tiles", lambda c: setattr(c, "tiles", c.tiles[:, :2])),
        ("row_prefix", lambda c: c.row_prefix.fill_(1)),
        ("scale", lambda c: setattr(c, "scale", 0.0)),
        ("step", lambda c: c.step.fill_(4)),
        ("prefix_lengths", lambda c: c.lengths.fill_(7)),
    ],
)
def test_errors_name_the_argument(name, change):
    case = Case("cpu", torch.float32, 4, 2, 16, [2], [3, 3], 2, 4)
    change(case)
    with pytest.raises(ValueError, match=f"^{name}: wanted"):
        case.run()


def test_a_small_workspace_is_refused(device, interpreter):
    case = Case(device, torch.float32, 1, 1, 16, [2], [3, 3], 2, 4)
    small = decode_attention_workspace(1, 1, 1, 16, 6, 4, device=device)
    with pytest.raises(ValueError, match="workspace: wanted contiguous fp32 of 64 elements"):
        case.run(workspace=small)


@pytest.mark.parametrize(("heads", "kv_heads"), [(16, 16), (32, 8)])
def test_launches_describe_the_kernels(heads, kv_heads):
    shape = DecodeShape(
        model="m", dtype="bf16", rows=128, group=8, hidden=2048, intermediate=5632, heads=heads,
        kv_heads=kv_heads, head_dim=128, layers=24, image_vocab=16384, text_vocab=102400,
        head_width=2048, prefix=160, suffix=576,
    )  # fmt: skip
    attend, merge = gpu_decode_attention.launches(shape)
    for launch in (attend, merge):
        assert set(launch.kernel.arg_names) == set(launch.signature) | set(launch.constexprs)
        assert set(launch.divisible) | set(launch.narrow_ok) <= set(launch.signature)
    tokens = 128 * 576 + 9 * 160  # each suffix, eight groups' prefixes and the unconditional one
    least = tokens * 2 * kv_heads * 128 * 2 + 2 * 128 * heads * 128 * 2
    assert attend.bytes_least == least
    # Prefixes read again by other tiles, and the partials written and read.
    assert attend.bytes_moved + merge.bytes_moved <= 1.06 * least
    assert attend.bytes_moved <= 1.05 * attend.bytes_least
