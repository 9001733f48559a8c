"""Resizing and padding of batches against PIL and transformers' own functions."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers.image_transforms import get_size_with_aspect_ratio

from rewards.preprocess import (
    blur_and_resize,
    normalize,
    pad_to_square,
    resize,
    shortest_edge_size,
)


def noise(count, height, width, seed=0):
    """(count, height, width, 3) uint8; noise, which hides no rounding."""
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def as_batch(pictures):
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ((64, 64), (96, 96)),
        ((48, 48), (33, 33)),
        ((384, 384), (224, 224)),
        ((40, 60), (80, 120)),
        ((48, 80), (48, 120)),
        ((48, 80), (30, 120)),  # Pillow takes the height first
        ((48, 80), (72, 40)),
        ((7, 5), (1, 9)),
        ((50, 50), (50, 50)),
    ],
)
def test_resize_is_pils_to_the_bit(old, new, mode):
    pictures = noise(2, *old)
    pictures[1] = (pictures[1] > 127) * 255  # where a cubic overshoots
    method = getattr(Image.Resampling, mode.upper())
    plain = [np.asarray(Image.fromarray(p).resize(new[::-1], method)) for p in pictures]
    got = resize(as_batch(pictures), new, mode=mode)
    assert got.dtype == torch.float32
    assert np.array_equal((got * 255).round().permute(0, 2, 3, 1).byte(), np.stack(plain))
    assert torch.equal(got, (got * 255).round() / 255)


def test_resize_takes_pictures_between_the_levels_and_views():
    pictures = as_batch(noise(2, 20, 30))
    moved = pictures + (torch.rand_like(pictures) - 0.5) * 0.99 / 255
    assert torch.equal(resize(moved, (40, 60)), resize(pictures, (40, 60)))
    view = pictures.permute(0, 1, 3, 2)
    assert torch.equal(resize(view, (15, 10)), resize(view.contiguous(), (15, 10)))


def test_shortest_edge_sizes_are_transformers():
    rng = random.Random(0)
    for _ in range(3000):
        height, width, shortest = (rng.randint(1, 1500) for _ in range(3))
        longest = rng.choice([None, rng.randint(shortest, 2000)])
        expected = get_size_with_aspect_ratio((height, width), shortest, longest)
        assert shortest_edge_size(height, width, shortest, longest) == expected


def test_pad_to_square():
    images = torch.rand(2, 3, 5, 8)
    square = pad_to_square(images, (0.1, 0.2, 0.3))
    assert square.shape == (2, 3, 8, 8) and torch.equal(square[:, :, 1:6], images)
    for border in (square[:, :, :1], square[:, :, 6:]):
        assert torch.equal(border.amax((0, 2, 3)), torch.tensor([0.1, 0.2, 0.3]))
    corner = pad_to_square(images.mT, centered=False)
    assert torch.equal(corner[:, :, :, :5], images.mT) and not corner[:, :, :, 5:].any()
    assert pad_to_square(square) is square


def test_blur_comes_before_a_smaller_size_only():
    images = torch.rand(1, 3, 40, 40)
    larger = F.interpolate(images, (60, 60), mode="bilinear", align_corners=False)
    assert torch.equal(blur_and_resize(images, 60), larger)
    # Every second row white: unblurred bilinear halving could keep the stripes.
    stripes = torch.zeros(1, 3, 40, 40)
    stripes[:, :, ::2] = 1
    assert (blur_and_resize(stripes, 10)[:, :, 2:-2] - 0.5).abs().max() < 0.01


def test_normalize():
    images = torch.rand(2, 3, 4, 4)
    got = normalize(images, [0.5, 0.4, 0.3], [0.1, 0.2, 0.3])
    torch.testing.assert_close(got[:, 1], (images[:, 1] - 0.4) / 0.2)
