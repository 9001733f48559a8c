"""Resize, pad, crop and normalise whole batches of pictures on the device they are on.

The experts were trained on pictures that went through PIL: 8 bits a channel, one axis resized
at a time. The functions here follow its arithmetic on (B, 3, H, W) float tensors, so that a
batch never leaves the device and the experts see what they were trained on.
"""

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2.functional import gaussian_blur

PIL_BITS = 22  # of a weight's fraction


def shortest_edge_size(
    height: int, width: int, shortest: int, longest: int | None = None
) -> tuple[int, int]:
    """Height and width after a resize that keeps the aspect, as CLIP and DETR compute them.

    The shorter side becomes `shortest`, or less where the longer one would pass `longest`.
    """
    short, long = min(height, width), max(height, width)
    exact = float(shortest)
    if longest is not None and long / short * shortest > longest:
        exact = longest * short / long
    new_short = round(exact)
    # A side that already has its size keeps the other one too, whatever the rounding says.
    new_long = long if new_short == short else int(exact * long / short)
    return (new_short, new_long) if height <= width else (new_long, new_short)


def resize(
    images: Tensor, size: tuple[int, int], *, mode: Literal["bilinear", "bicubic"] = "bilinear"
) -> Tensor:
    """PIL's antialiased resize of 8-bit pictures, to the bit.

    PIL works in integers: weights of 22 bits, one axis at a time, rounded to 8 bits after each.
    A float resize rounds ties elsewhere, which is enough to move the boxes of a detector. Equal
    to Pillow 13 for squares, which generated pictures are, and wherever a side grows. Where both
    sides of another picture shrink, Pillow takes the height first for some sizes, by a rule that
    it does not document; up to a third of the values are then off by 1/255, a few by 3/255.

    Args:
        images: (B, C, H, W) float in [0, 1]; taken to the nearest 1/255 first.
        size: new height and width.
    Returns: (B, C, *size) fp32, multiples of 1/255.
    """
    levels = (images.float() * 255).round().clamp_(0, 255).int()
    height, width = levels.shape[-2:]
    if size[0] < height and size[1] > width:
        levels = _resize_width(_resize_height(levels, size[0], mode), size[1], mode)
    else:
        levels = _resize_height(_resize_width(levels, size[1], mode), size[0], mode)
    return levels.float() / 255


def _resize_width(levels: Tensor, width: int, mode: str) -> Tensor:
    # Whole rows are picked much faster than columns.
    return _resize_height(levels.mT.contiguous(), width, mode).mT


def _resize_height(levels: Tensor, height: int, mode: str) -> Tensor:
    """(B, C, H, W) int32 -> (B, C, height, W)."""
    if levels.shape[-2] == height:
        return levels
    taps, weights = _pil_taps(levels.shape[-2], height, mode, levels.device)
    # Half a step, so that the shift below rounds.
    total = levels.new_full((), 1 << (PIL_BITS - 1))
    for tap, weight in zip(taps, weights, strict=True):
        total = total + levels.index_select(-2, tap) * weight[:, None]
    return total.bitwise_right_shift_(PIL_BITS).clamp_(0, 255)


@lru_cache(maxsize=64)
def _pil_taps(old: int, new: int, mode: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """What each of `new` pixels is made of: (taps, new) sources, int32 weights in 1 / 2**22."""
    scale = old / new
    stretch = max(scale, 1.0)  # the filter widens when shrinking: antialiasing
    reach = stretch * (1 if mode == "bilinear" else 2)
    center = (torch.arange(new, dtype=torch.float64) + 0.5) * scale
    first = (center - reach + 0.5).trunc().clamp(min=0)
    end = (center + reach + 0.5).trunc().clamp(max=old)
    taps = first[:, None] + torch.arange(int((end - first).max()))
    x = ((taps - center[:, None] + 0.5) / stretch).abs()
    if mode == "bilinear":
        weights = (1 - x).clamp(min=0)
    else:  # Keys' cubic, a = -0.5
        near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
        weights = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
    weights = weights * (taps < end[:, None])
    weights = weights / weights.sum(1, keepdim=True) * (1 << PIL_BITS)
    # Halves go away from zero, as PIL rounds.
    weights = (weights.abs() + 0.5).trunc() * weights.sign()
    taps = taps.clamp(max=old - 1)  # past the end the weight is 0
    return taps.long().T.contiguous().to(device), weights.int().T.contiguous().to(device)


def blur_and_resize(squares: Tensor, side: int) -> Tensor:
    """Resize of square pictures as OWLv2 was trained: a Gaussian blur, then plain bilinear.

    Args:
        squares: (B, C, S, S) float in [0, 1].
        side: new height and width. A larger one needs no blur.
    Returns: (B, C, side, side), all bits kept.
    """
    sigma = (squares.shape[-1] / side - 1) / 2
    if sigma > 0:
        reach = math.ceil(3 * sigma)
        squares = gaussian_blur(squares, [2 * reach + 1] * 2, [sigma] * 2)
    return F.interpolate(squares, (side, side), mode="bilinear", align_corners=False)


def pad_to_square(
    images: Tensor, fill: Sequence[float] = (0.0, 0.0, 0.0), *, centered: bool = True
) -> Tensor:
    """(B, 3, S, S), S the longer side.

    Args:
        images: (B, 3, H, W) float in [0, 1].
        fill: the border's colour, in [0, 1].
        centered: the picture in the middle (the odd pixel goes right or below), else top left.
    """
    height, width = images.shape[-2:]
    side = max(height, width)
    if height == width:
        return images
    top, left = ((side - height) // 2, (side - width) // 2) if centered else (0, 0)
    square = images.new_tensor(fill).view(1, 3, 1, 1).repeat(len(images), 1, side, side)
    square[:, :, top : top + height, left : left + width] = images
    return square


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(images - mean) / std a channel, (B, 3, H, W), in the images' dtype."""
    shape = (1, len(mean), 1, 1)
    return (images - images.new_tensor(mean).view(shape)) / images.new_tensor(std).view(shape)


class Transform:
    """What the settings of a CLIP-like transformers image processor ask for, on batches."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        """
        Args: settings: the content of a preprocessor_config.json; `size` and `crop_size` may
            be a number, {"shortest_edge"} or {"height", "width"}.
        Raises: ValueError naming the setting.
        """
        self.mean = _channels(settings, "image_mean")
        self.std = _channels(settings, "image_std")
        filters: dict[int, Literal["bilinear", "bicubic"]] = {
            2: "bilinear",
            3: "bicubic",
        }  # PIL's numbers
        if settings.get("resample", 3) not in filters:
            raise ValueError(f"resample: wanted one of {filters}, got {settings['resample']!r}")
        self._mode = filters[settings.get("resample", 3)]
        for key in ("do_resize", "do_rescale", "do_normalize"):
            if settings.get(key) is False:
                raise ValueError(f"{key}: an image processor without it is not supported")
        if abs(settings.get("rescale_factor", 1 / 255) - 1 / 255) > 1e-6:
            raise ValueError(f"rescale_factor: wanted 1/255, got {settings['rescale_factor']}")
        # A setting that is null counts as absent; CLIP crops unless told not to.
        crop = settings.get("crop_size") if settings.get("do_center_crop") is not False else None
        self._crop = None if crop is None else _sides(crop, "crop_size")
        size = settings.get("size")
        if isinstance(size, Mapping) and "shortest_edge" in size:
            if self._crop is None:
                raise ValueError("size: a shortest edge without a crop_size is not supported")
            size = size["shortest_edge"]
        height, width = _sides(size, "size")
        # A bare number is a shortest edge where a crop follows, else a square.
        cropped = isinstance(size, int) and self._crop is not None
        self._size: int | tuple[int, int] = height if cropped else (height, width)
        self.output_size = self._crop or (height, width)
        if self.output_size[0] > height or self.output_size[1] > width:
            raise ValueError(f"crop_size: {self.output_size} is larger than size, {height, width}")

    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) float in [0, 1] -> (B, 3, *output_size) fp32, normalised."""
        size = self._size
        if isinstance(size, int):
            size = shortest_edge_size(images.shape[-2], images.shape[-1], size)
        images = resize(images, size, mode=self._mode)
        if self._crop is not None:
            height, width = self._crop
            # Half an odd margin is rounded down, as transformers does and torchvision does not.
            top, left = (size[0] - height) // 2, (size[1] - width) // 2
            images = images[..., top : top + height, left : left + width]
        return normalize(images, self.mean, self.std)


def _channels(settings: Mapping[str, Any], key: str) -> list[float]:
    values = settings.get(key)
    if not isinstance(values, list) or len(values) != 3:
        raise ValueError(f"{key}: wanted three numbers, got {values!r}")
    return [float(v) for v in values]


def _sides(size: Any, key: str) -> tuple[int, int]:
    """Height and width of a setting that is a number or holds both."""
    if isinstance(size, int):
        return size, size
    if isinstance(size, Mapping) and {"height", "width"} <= size.keys():
        return int(size["height"]), int(size["width"])
    raise ValueError(f"{key}: wanted a number or height and width, got {size!r}")
