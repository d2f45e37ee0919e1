"""Rows of small images with names, as one PNG file."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO

import numpy as np
from torch import Tensor

from ._optional import need

_BETWEEN = 6  # pixels under each group


def sheet(
    groups: Sequence[tuple[str, Tensor]],
    *,
    rows: int = 1,
    columns: int = 14,
    side: int = 56,
    heads: Sequence[str] = (),
    gap: int = 0,
) -> bytes:
    """A PNG file: for each name `rows` rows of images (n, C, H, W) in [0, 1], each about `side` pixels large.

    Grey where all images are; channels beyond the third are left out. `heads` stand over the columns, and `gap` white
    pixels between images; a head may have several lines.
    """
    image, draws = need("PIL.Image", "data"), need("PIL.ImageDraw", "data")
    font = need("PIL.ImageFont", "data").load_default(13)
    height, width = groups[0][1].shape[-2:]
    scale = max(1, round(side / max(height, width)))
    tall, wide = height * scale + gap, width * scale + gap
    shown = max(min(columns, len(images)) for _, images in groups)
    ruler = draws.Draw(image.new("L", (1, 1)))

    def size(text: str) -> tuple[int, int]:
        left, top, right, bottom = ruler.multiline_textbbox((0, 0), text, font=font)
        return int(right - left), int(bottom - top)

    margin = max(size(name)[0] for name, _ in groups) + 12
    head = max((size(text)[1] for text in heads), default=-10) + 10
    block = rows * tall + _BETWEEN
    canvas = image.new("RGB", (margin + shown * wide, head + len(groups) * block), "white")
    draw = draws.Draw(canvas)
    for place, text in enumerate(heads[:shown]):
        middle = margin + place * wide + wide // 2, head - 4
        while size(text)[0] > wide and len(text) > 1:  # it would run into the next one
            text = f"{text.rstrip('.')[:-1]}."
        draw.multiline_text(middle, text, fill="black", font=font, anchor="md", align="center")
    for number, (name, images) in enumerate(groups):
        top = head + number * block
        used = -(-min(len(images), rows * columns) // columns)
        draw.multiline_text((4, top + used * tall // 2), name, fill="black", font=font, anchor="lm")
        for place, tile in enumerate((images[: rows * columns] * 255).round().clamp(0, 255).byte().cpu().numpy()):
            pixels = tile[0] if len(tile) < 3 else np.moveaxis(tile[:3], 0, -1)
            enlarged = image.fromarray(pixels).resize((wide - gap, tall - gap), image.Resampling.NEAREST)
            canvas.paste(enlarged, (margin + place % columns * wide + gap, top + place // columns * tall))
    file = BytesIO()
    grey = all(images.shape[1] < 3 for _, images in groups)
    (canvas.convert("L") if grey else canvas).save(file, format="PNG", optimize=True)
    return file.getvalue()
