"""AdamW on split weights: the same bits as on fp32 ones, on every path."""

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels import AdamW, adamw
from kernels.adamw import master, split
from kernels.dispatch import use_triton
from kernels.reference import adamw as reference

FP32, BF16 = torch.float32, torch.bfloat16


def problem(count: int, weight: torch.dtype, moments: torch.dtype, device: str = "cpu"):
    """Weight, gradient, low half and moments of a training under way."""
    rng = torch.Generator().manual_seed(count)
    w, low = torch.randn(count, generator=rng) * 0.02, None
    if weight == BF16:
        w, low = split(w)
    g = (torch.randn(count, generator=rng) * 1e-3).to(weight)
    m = (torch.randn(count, generator=rng) * 1e-3).to(moments)
    v = (torch.rand(count, generator=rng) * 1e-6).to(moments)
    return [None if t is None else t.to(device) for t in (w, g, low, m, v)]


def same_bits(a: list, b: list) -> bool:
    return all(x is None or x.cpu().equal(y.cpu()) for x, y in zip(a, b, strict=True))


def copies(tensors: list) -> list:
    return [None if t is None else t.clone() for t in tensors]


def test_halves_join_to_the_number_they_came_from():
    """All 65,536 low halves beside uppers of either sign, subnormal to largest."""
    uppers = [0, 1, 0x7F, 0x80, 0x1234, 0x3F80, 0x3F81, 0x7F7E, 0x7F7F]
    low = np.arange(65536, dtype=np.uint32)
    for upper in uppers + [u | 0x8000 for u in uppers]:
        bits = torch.from_numpy((np.uint32(upper << 16) + low).view(np.int32))
        numbers = bits.view(FP32)
        weight, rest = split(numbers)
        assert master(weight, rest).view(torch.int32).equal(bits)
        finite = weight.isfinite()  # the largest of all round to infinity, and come back
        gap = (weight.double() - numbers.double()).abs()[finite]
        # To nearest: no bf16 number is nearer than the one that was taken.
        assert (gap <= (numbers.bfloat16().double() - numbers.double()).abs()[finite]).all()
    odd = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, 0x7FC00000], dtype=torch.int32).view(FP32)
    weight, rest = split(odd)
    assert weight.isnan().all() and master(weight, rest).isnan().all()
    ends = torch.tensor([torch.inf, -torch.inf, 0.0])
    assert master(*split(ends)).equal(ends)


@pytest.mark.parametrize("moments", [FP32, BF16])
@pytest.mark.parametrize("weight", [FP32, BF16])
@pytest.mark.parametrize("count", [1, 7, 512, 1029])
def test_every_path_has_the_bits_of_the_plain_formula(path, count, weight, moments):
    got, expected = problem(count, weight, moments, path), problem(count, weight, moments)
    for step in (1, 2, 3):
        settings = AdamW(step=step, lr=1e-3, beta2=0.95, weight_decay=0.1, seed=2**63 + 5)
        adamw(*got, settings, grad_scale=0.7, stream=step)
        reference.adamw(*expected, settings, 0.7, step)
    assert same_bits(got, expected)


def test_fp32_gradients_of_bf16_weights(path):
    got, expected = problem(100, BF16, FP32, path), problem(100, BF16, FP32)
    got[1], expected[1] = got[1].float() / 3, expected[1].float() / 3
    settings = AdamW(step=5, lr=1e-3)
    scale = torch.tensor(0.5, device=path)
    adamw(*got, settings, grad_scale=scale)
    reference.adamw(*expected, settings, 0.5)
    assert same_bits(got, expected)


def test_formula_is_adamw_s():
    """Against torch's, in fp64: nothing but rounding."""
    w, g, _, m, v = problem(1000, FP32, FP32)
    m.zero_(), v.zero_()
    theirs = torch.nn.Parameter(w.double())
    optimizer = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(1, 6):
        g = g.roll(1)
        theirs.grad = g.double()
        optimizer.step()
        settings = AdamW(step=step, lr=1e-2, beta2=0.95, weight_decay=0.1)
        reference.adamw(w, g, None, m, v, settings)
    torch.testing.assert_close(w.double(), theirs.detach(), rtol=2e-5, atol=1e-8)


def train(steps: int, count: int, device: str) -> dict[str, Tensor]:
    """Random gradients at T2I-R1's rate: fp32, split bf16, and torch's AdamW on bf16 and fp32."""
    rng = torch.Generator().manual_seed(0)
    start = (torch.randn(count, generator=rng) * 0.02).bfloat16()
    full = [start.float(), None, None, torch.zeros(count), torch.zeros(count)]
    halves = [start.clone(), None, torch.zeros(count, dtype=torch.int16)]
    halves += [torch.zeros(count), torch.zeros(count)]
    full, halves = ([None if t is None else t.to(device) for t in x] for x in (full, halves))
    theirs = {d: torch.nn.Parameter(start.to(d).clone()) for d in (BF16, FP32)}
    optimizers = [torch.optim.AdamW([p], lr=1e-6, weight_decay=0.01) for p in theirs.values()]
    for step in range(1, steps + 1):
        grad = (torch.randn(count, generator=rng) * 1e-2).bfloat16()
        full[1] = halves[1] = grad.to(device)
        settings = AdamW(step=step, lr=1e-6, weight_decay=0.01)
        adamw(*full, settings, grad_scale=0.3)
        adamw(*halves, settings, grad_scale=0.3)
        for p, optimizer in zip(theirs.values(), optimizers, strict=True):
            p.grad = (grad.float() * 0.3).to(p.dtype)
            optimizer.step()
        assert master(halves[0], halves[2]).equal(full[0]), step
        assert full[3].equal(halves[3]) and full[4].equal(halves[4])
    return {
        "start": start.float(),
        "ours": full[0].cpu(),
        "seen": halves[0].float().cpu(),
        "torch bf16": theirs[BF16].detach().float(),
        "torch fp32": theirs[FP32].detach(),
    }


def moved(found: dict[str, Tensor], name: str) -> Tensor:
    return (found[name] - found["start"]).double()


def test_a_thousand_steps_equal_fp32_s_bit_for_bit(kernel):
    """The interpreter too, on fewer weights. torch's bf16 AdamW beside it loses most of it."""
    interpreted = kernel == "cpu" and use_triton(torch.empty(0))
    found = train(1000, 256 if interpreted else 4096, kernel)
    meant = moved(found, "torch fp32")
    cosine = torch.nn.functional.cosine_similarity
    assert cosine(moved(found, "ours"), meant, dim=0) > 0.99999
    assert cosine(moved(found, "seen"), meant, dim=0) > 0.5  # rounded to bf16, once
    assert cosine(moved(found, "torch bf16"), meant, dim=0) < 0.5
    # Both round each step; they stay as near as fp32 allows.
    assert (found["ours"] - found["torch fp32"]).abs().max() < 1e-7


def test_moments_in_bf16_are_unbiased():
    x = torch.full((100_000,), 1 + 1 / 256 + 1 / 1024)  # a quarter and an eighth between two
    first, second = reference.noise(len(x), seed=1, step=2, stream=3)
    for noise in (first, second):
        assert 0 <= int(noise.min()) and int(noise.max()) < 65536
        rounded = reference.stochastic_bf16(x, noise).double()
        assert set(rounded.tolist()) == {1.0, 1 + 1 / 128}
        assert abs(float(rounded.mean()) - float(x[0])) < 4 * (1 / 128) / 2 / len(x) ** 0.5
    assert not first.equal(second)
    ends = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0])
    kept = reference.stochastic_bf16(ends, torch.full((4,), 65535, dtype=torch.int32))
    assert kept[:2].isinf().all() and kept[2].isnan() and kept[3] == 0
    others = [reference.noise(8, *key)[0] for key in ((1, 2, 3), (2, 2, 3), (1, 3, 3), (1, 2, 4))]
    assert len({tuple(o.tolist()) for o in others}) == 4


@pytest.mark.parametrize("weight", [FP32, BF16])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_shows(path, weight, bad):
    tensors = problem(9, weight, FP32, path)
    before = copies(tensors)
    tensors[1][4] = bad
    adamw(*tensors, AdamW(step=1, lr=1e-3))
    seen = tensors[0].float()
    assert seen[4].isnan() and seen.isfinite().sum() == 8
    assert not seen[:4].equal(before[0][:4].float()) or weight == BF16


def test_nothing_to_do_and_bad_input():
    adamw(*problem(0, BF16, FP32), AdamW(step=1, lr=1e-3))
    good = problem(8, BF16, FP32)

    def refused(match: str, place: int, value: object, **more: object) -> None:
        tensors = list(good)
        tensors[place] = value
        with pytest.raises(ValueError, match=match):
            adamw(*tensors, AdamW(step=1, lr=1e-3), **more)

    refused("weight: wanted bf16 or fp32", 0, good[0].half())
    refused("low: wanted with bf16", 2, None)
    refused("low: wanted with bf16", 0, good[0].float())
    refused("low: wanted torch.int16", 2, good[2].int())
    refused(r"grad: wanted \(8,\)", 1, good[1][:4])
    refused("exp_avg_sq: wanted torch.float32", 4, good[4].bfloat16())
    refused("exp_avg: wanted contiguous", 3, torch.zeros(16)[::2])
    refused("grad_scale: wanted one fp32", 0, good[0], grad_scale=torch.ones(2))
