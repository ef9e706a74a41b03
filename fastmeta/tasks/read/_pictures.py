"""One picture from bytes that may be anything: opened with care, and brought to one size."""

from __future__ import annotations

from typing import IO, TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

BACKGROUNDS = {"white": 255, "black": 0}


def formats() -> tuple[str, ...]:
    """What Pillow can open, without EPS, which it hands to another program."""
    from PIL import Image

    Image.init()
    return tuple(sorted(set(Image.OPEN) - {"EPS"}))


def suffixes() -> frozenset[str]:
    """Of the files that are taken for pictures, lower case."""
    from PIL import Image

    allowed = formats()
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in allowed)


def open_picture(file: IO[bytes] | str, formats: tuple[str, ...] | None = None) -> Image:
    """The picture, not decoded yet. ValueError where it is none, or has more pixels than Pillow's MAX_IMAGE_PIXELS."""
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(file, formats=formats)
    except UnidentifiedImageError as error:
        raise ValueError("no picture that Pillow can read") from error
    except Image.DecompressionBombError as error:
        raise ValueError(str(error)) from error
    most = Image.MAX_IMAGE_PIXELS
    if most is not None and image.width * image.height > most:
        raise ValueError(f"{image.width} x {image.height} pixels are more than the {most:,} allowed")
    return image


def square(image: Image, size: int, grey: bool, background: str = "white") -> np.ndarray:
    """uint8 `[1 or 3, size, size]`: turned upright as its EXIF data say, what is transparent laid over `background`,
    the middle cut to a square, and that resized by Pillow's bicubic filter, which averages when it makes smaller. Of 16
    bits 65535 is white, whatever the brightest pixel: pictures keep their brightness beside each other."""
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("floating point pixels have no range of their own; 8 and 16 bits are allowed")
    if _deep(image):  # Pillow's own conversion would cut it off at 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        paper = Image.new("RGBA", image.size, (BACKGROUNDS[background],) * 3 + (255,))
        image = Image.alpha_composite(paper, image)
    image = image.convert("L" if grey else "RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    pixels = np.asarray(image)
    return pixels[None] if grey else pixels.transpose(2, 0, 1)


def faint(image: Image) -> bool:
    """Whether a picture of 16 bits uses so few of them, 12 at most, that `square` makes it (almost) black."""
    return _deep(image) and int(np.asarray(image).max()) < 4096


def _deep(image: Image) -> bool:
    return image.mode.startswith("I")
