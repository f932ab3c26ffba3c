"""A picture's file to its pixels, or the reason why it has none."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from victims.ingest.below import Unusable, read_below
from victims.ingest.items import Reason, first_line
from victims.picture_files import fit

# Formats of photographs. Pillow knows others, some of which run programs to be read.
FORMATS: Final = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
CONVERTED, ANIMATED = "converted", "animated"
_MOST_PIXELS: Final = 89_478_485  # Pillow's own limit, which a process may have changed
_DEEP_MODES: Final = ("I", "I;16", "I;16L", "I;16B", "I;16N")


class Picture(NamedTuple):
    """uint8 CHW at the size asked for, and what had to be done to it."""

    image_CHW: npt.NDArray[np.uint8]
    notes: tuple[str, ...]


def read_picture(root: str, path: str) -> bytes:
    """The bytes of a picture's file below the root, wherever links lead."""
    try:
        return read_below(root, path)
    except Unusable:
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
        raise Unusable(Reason.MISSING_IMAGE, f"no file {path}") from error
    except (OSError, ValueError) as error:  # a name with a zero byte, say
        raise Unusable(Reason.UNREADABLE_IMAGE, first_line(error)) from error


@contextmanager
def strict_pillow() -> Iterator[None]:
    """Pillow's hints about odd files are not said, but that of a bomb, which is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def decode(data: bytes, size: int) -> Picture:
    """The first frame of a picture as RGB, at ``size`` as `fit` makes it."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_pixels(image, size)
            frames = int(getattr(image, "n_frames", 1))
            animated = frames > 1 and image.format in ("GIF", "WEBP", "PNG", "TIFF")
            image.seek(0)
            image.load()
            rgb = to_rgb(image)
            notes = [CONVERTED] if rgb is not image else []
            notes += [ANIMATED] if animated else []
            return Picture(fit(rgb, size), tuple(notes))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning, MemoryError) as error:
        raise Unusable(Reason.TOO_MANY_PIXELS, first_line(error)) from error
    except UnidentifiedImageError as error:
        raise Unusable(Reason.CORRUPT_IMAGE, "no picture of a known format") from error
    except Unusable:
        raise
    except Exception as error:  # decoders raise what they like on damaged files
        raise Unusable(Reason.CORRUPT_IMAGE, first_line(error)) from error


def _check_pixels(image: Image.Image, size: int) -> None:
    """A small file may hold a picture that fills the memory, or one so thin that resizing does."""
    width, height = image.size
    long, short = max(width, height), min(width, height)
    grown = long * size * size // max(1, short)
    if width * height > _MOST_PIXELS or grown > _MOST_PIXELS:
        raise Unusable(Reason.TOO_MANY_PIXELS, f"{width} x {height}")


def to_rgb(image: Image.Image) -> Image.Image:
    """Any picture as RGB: grey is repeated, palettes are looked up, alpha is dropped, of 16 bits
    the upper eight are kept."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in _DEEP_MODES:
        level_HW = np.asarray(image).astype(np.int64)
        if level_HW.size and (level_HW.min() < 0 or level_HW.max() > 0xFFFF):
            raise Unusable(Reason.UNSUPPORTED_IMAGE, f"more than 16 bits a channel ({image.mode})")
        return Image.fromarray((level_HW >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise Unusable(Reason.UNSUPPORTED_IMAGE, "levels are real numbers of no known range (F)")
    if "transparency" in image.info:
        return image.convert("RGBA").convert("RGB")
    return image.convert("RGB")
