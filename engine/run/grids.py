"""Grids of pictures with the plan they were drawn from under each of them."""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from engine.run.checkpoint import atomic_write_bytes

MARGIN = 14  # pixels around and between the cells
FONT_SIZE = 13
TITLE_SIZE = 17
LINE_HEIGHT = 17
MAX_LINES = 12  # of one caption; a longer one ends in an ellipsis
INK, MUTED, PAPER, FRAME = (24, 27, 32), (92, 98, 108), (255, 255, 255), (214, 218, 224)

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def wrap(text: str, font: Font, width: int) -> list[str]:
    """One paragraph as lines of at most `width` pixels; a word that is too long is broken."""
    lines = [""]
    for word in text.split():
        candidate = f"{lines[-1]} {word}".lstrip()
        if font.getlength(candidate) <= width:
            lines[-1] = candidate
            continue
        if lines[-1]:
            lines.append("")
        for char in word:
            if lines[-1] and font.getlength(lines[-1] + char) > width:
                lines.append("")
            lines[-1] += char
    return lines


def _caption(
    text: str, score: float | None, font: Font, width: int
) -> list[tuple[str, tuple[int, int, int]]]:
    """(line, colour) pairs: the first of several paragraphs is the prompt and stands out."""
    paragraphs = [p for p in text.split("\n") if p.strip()] or [""]
    lines = []
    for number, paragraph in enumerate(paragraphs):
        color = MUTED if number and len(paragraphs) > 1 else INK
        lines += [(line, color) for line in wrap(paragraph, font, width)]
    if len(lines) > MAX_LINES:
        last, color = lines[MAX_LINES - 1]
        lines = [*lines[: MAX_LINES - 1], (last[:-2].rstrip() + " …", color)]
    if score is not None:
        lines.append((f"score {score:.2f}", MUTED))
    return lines


def _check(
    images: torch.Tensor, captions: list[str], columns: int, scale: int, scores: list[float] | None
) -> None:
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(
            f"images: wanted (B, 3, H, W) float, got {tuple(images.shape)} {images.dtype}"
        )
    if len(images) == 0 or not torch.isfinite(images).all():
        raise ValueError("images: wanted at least one picture and finite values only")
    if len(captions) != len(images):
        raise ValueError(f"captions: wanted {len(images)}, one a picture, got {len(captions)}")
    if scores is not None and len(scores) != len(images):
        raise ValueError(f"scores: wanted {len(images)}, one a picture, got {len(scores)}")
    if columns < 1 or scale < 1:
        raise ValueError(f"columns and scale: wanted at least 1, got {columns} and {scale}")


def draw_grid(
    images: torch.Tensor,
    captions: list[str],
    *,
    columns: int,
    scale: int = 3,
    title: str | None = None,
    scores: list[float] | None = None,
) -> Image.Image:
    """The grid that `save_grid` writes, as an RGB picture; see there."""
    _check(images, captions, columns, scale, scores)
    columns = min(columns, len(images))
    pixels = images.detach().float().cpu().clamp(0, 1).mul(255).round().to(torch.uint8)
    pictures = pixels.permute(0, 2, 3, 1).numpy()  # (B, H, W, 3)
    height, width = pictures.shape[1] * scale, pictures.shape[2] * scale
    font = ImageFont.load_default(FONT_SIZE)
    title_font = ImageFont.load_default(TITLE_SIZE)
    texts = [
        _caption(caption, None if scores is None else scores[i], font, width)
        for i, caption in enumerate(captions)
    ]
    rows = [range(i, min(i + columns, len(texts))) for i in range(0, len(texts), columns)]
    caption_heights = [max(len(texts[i]) for i in row) * LINE_HEIGHT for row in rows]

    sheet_width = columns * (width + MARGIN) + MARGIN
    titles = wrap(title, title_font, sheet_width - 2 * MARGIN) if title else []
    top = MARGIN + len(titles) * (TITLE_SIZE + 6)
    sheet_height = top + sum(height + 6 + caption + MARGIN for caption in caption_heights)
    sheet = Image.new("RGB", (sheet_width, sheet_height), PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, line in enumerate(titles):
        draw.text((MARGIN, MARGIN - 4 + number * (TITLE_SIZE + 6)), line, INK, title_font)

    y = top
    for row, caption_height in zip(rows, caption_heights, strict=True):
        for column, index in enumerate(row):
            x = MARGIN + column * (width + MARGIN)
            # repeat() is the nearest-neighbour upscale: every pixel of a small picture stays square
            picture = np.repeat(np.repeat(pictures[index], scale, axis=0), scale, axis=1)
            sheet.paste(Image.fromarray(picture), (x, y))
            draw.rectangle((x - 1, y - 1, x + width, y + height), outline=FRAME)
            for number, (line, color) in enumerate(texts[index]):
                draw.text((x, y + height + 5 + number * LINE_HEIGHT), line, color, font)
        y += height + 6 + caption_height + MARGIN
    return sheet


def grid_png(
    images: torch.Tensor,
    captions: list[str],
    *,
    columns: int,
    scale: int = 3,
    title: str | None = None,
    scores: list[float] | None = None,
) -> bytes:
    """The grid that `save_grid` writes, as the bytes of a PNG file; see there."""
    sheet = draw_grid(images, captions, columns=columns, scale=scale, title=title, scores=scores)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def save_grid(
    path: Path,
    images: torch.Tensor,
    captions: list[str],
    *,
    columns: int,
    scale: int = 3,
    title: str | None = None,
    scores: list[float] | None = None,
) -> None:
    """Write pictures with their captions as one PNG, whole or not at all.

    Args:
        path: the file; its folder is made where missing.
        images: (B, 3, H, W) float in [0, 1]; values outside are clamped.
        captions: B texts, wrapped under the pictures. Of several lines the first is drawn as the
            prompt and the others, the plan, in grey.
        columns: pictures in a row.
        scale: whole-number nearest-neighbour enlargement.
        title: a line above the grid.
        scores: B figures, shown under the captions.
    Raises: ValueError naming the argument, wanted and got.
    """
    png = grid_png(images, captions, columns=columns, scale=scale, title=title, scores=scores)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_bytes(path, png)


def save_picture(path: Path, image: torch.Tensor) -> None:
    """Write one picture (3, H, W) float in [0, 1] as PNG, at its own size."""
    pixels = image.detach().float().cpu().clamp(0, 1).mul(255).round().byte()
    buffer = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(buffer, "PNG")
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_bytes(path, buffer.getvalue())
