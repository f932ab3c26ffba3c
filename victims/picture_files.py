"""What readers of labelled pictures share: where files are, what a picture becomes, what is said
when something is not there.
"""

from __future__ import annotations

import io
import os
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from victims.corpora import Rows
from victims.errors import BadData, GridError, UsageError
from victims.tar_files import Member, Source

ENDINGS: Final = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".webp", ".tif", ".tiff", ".gif"}
# More than 8 bits a channel: a conversion to RGB would clip them.
_DEEP: Final = ("I", "F")
# What Pillow's decoders raise on files that are damaged or no pictures.
_UNREADABLE: Final = (
    *(OSError, ValueError, SyntaxError, EOFError, IndexError, struct.error),
    Image.DecompressionBombError,
)
_THREADS: Final = 16
_SHOWN: Final = 8  # names that an error lists of what it found


@dataclass(frozen=True, slots=True)
class Part:
    """The training or the test pictures of a set: a label each, decoded as they are asked for.

    ``files`` are what each picture comes from, by names that do not depend on where and in which
    form the set lies; none where a picture has no file of its own.
    """

    labels: Rows
    pictures: Callable[[Rows], Iterator[Image.Image]]
    files: Sequence[tuple[str, Source]] = ()


@dataclass(frozen=True, slots=True)
class Found:
    """A data set on disk. ``files`` are all that its parts and classes come from, by names that do
    not depend on where it lies; the parts are read when called for, pictures later still.
    ``names_apart``: its classes are in none of these files, and count beside them."""

    classes: tuple[str, ...]
    files: Mapping[str, Source]
    train: Callable[[], Part]
    test: Callable[[], Part]
    names_apart: bool = False


def open_picture(path: Source) -> Image.Image:
    """The picture in a file as RGB: grey is repeated, palettes are looked up, alpha is dropped."""
    try:
        read = io.BytesIO(path.read_bytes()) if isinstance(path, Member) else path
        with Image.open(read) as image:
            image.load()
            if image.mode.split(";")[0] in _DEEP:
                raise BadData(f"{path}: more than 8 bits a channel ({image.mode}). Convert it.")
            if "transparency" in image.info:
                return image.convert("RGBA").convert("RGB")
            return image.convert("RGB")
    except _UNREADABLE as error:
        raise BadData(
            f"{path}: cannot be read as a picture ({type(error).__name__}: {error}). "
            "Put an intact copy there, or take the file out of the set."
        ) from error


def fit(image: Image.Image, size: int) -> npt.NDArray[np.uint8]:
    """A picture as uint8 CHW at ``size``: Resize(short side, bicubic), then CenterCrop.

    The usual preprocessing of classifiers and CLIP alike. A picture that has the size keeps its
    bytes.
    """
    from torchvision.transforms import InterpolationMode, functional

    resized = functional.resize(image, size, InterpolationMode.BICUBIC)
    image_HWC = np.asarray(functional.center_crop(resized, size), dtype=np.uint8)
    return image_HWC.transpose(2, 0, 1)


def fit_rows(part: Part, rows: Rows, size: int) -> npt.NDArray[np.uint8]:
    """Some pictures of a part at ``size``, NCHW. Decoding and resizing let other threads run, so
    all cores are at it."""

    def one(row: int) -> npt.NDArray[np.uint8]:
        (picture,) = part.pictures(np.array([row], dtype=np.int64))
        return fit(picture, size)

    with ThreadPoolExecutor(max_workers=min(_THREADS, os.cpu_count() or 1)) as pool:
        return np.stack(list(pool.map(one, rows.tolist())))


def part_of_files(paths: Sequence[Source], labels: Sequence[int]) -> Part:
    """Pictures that have a file each."""

    def pictures(rows: Rows) -> Iterator[Image.Image]:
        return (open_picture(paths[row]) for row in rows.tolist())

    return Part(np.asarray(labels, dtype=np.int64), pictures)


def named_part(part: str, pictures: Iterable[tuple[str, int, Source]]) -> Part:
    """Pictures by their names, labels and sources, in the order of classes and names.

    What each is called holds its label: where labels come from need not count besides, and a set
    is the same in whichever form it lies.
    """
    named = sorted(
        ((f"{part}/{label:04d}/{name}", label, source) for name, label, source in pictures),
        key=lambda row: row[0],
    )
    made = part_of_files([source for *_, source in named], [label for _, label, _ in named])
    return Part(made.labels, made.pictures, [(name, source) for name, _, source in named])


class Lazily(Mapping[str, Source]):
    """A mapping that is made when it is first asked: a million files are listed for a reason."""

    def __init__(self, make: Callable[[], Mapping[str, Source]]) -> None:
        self._make = make

    @cached_property
    def _made(self) -> Mapping[str, Source]:
        return self._make()

    def __getitem__(self, name: str) -> Source:
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._made)

    def __len__(self) -> int:
        return len(self._made)


def files_of(*parts: Callable[[], Part]) -> Lazily:
    """All that some parts' pictures come from."""
    return Lazily(lambda: {name: source for part in parts for name, source in part().files})


def pictures_in(folder: Path) -> list[Path]:
    """The picture files right in a folder, by name. No such folder holds none."""
    return [folder / name for name in picture_names(folder)]


def picture_names(folder: Path) -> list[str]:
    """The names of the picture files right in a folder, sorted."""
    names = os.listdir(folder) if folder.is_dir() else []  # noqa: PTH208 - a million paths are slow
    return sorted(
        name
        for name in names
        if not name.startswith(".") and name[max(name.rfind("."), 0) :].lower() in ENDINGS
    )


def listed(folder: Path) -> list[Path]:
    """What lies in a folder, by name, without hidden files."""
    if not folder.is_dir():
        return []
    # Names are sorted, not paths: with 100,000 of them that is seconds.
    names = sorted(path.name for path in folder.iterdir())
    return [folder / name for name in names if not name.startswith(".")]


def absent(dataset: str, wanted: str, folder: Path, advice: str) -> UsageError:
    """The error for files that are not there."""
    names = [path.name + "/" * path.is_dir() for path in listed(folder)]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    found = ", ".join(names[:_SHOWN]) + more if names else "nothing"
    if not folder.is_dir():
        found = "a file, no folder" if folder.exists() else "no such folder"
    return UsageError(f"{dataset}: looked for {wanted} in {folder}. Found there: {found}. {advice}")


def text_of(path: Path) -> str:
    """A text file in UTF-8, with or without a byte order mark."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise GridError(f"{path}: not a text in UTF-8 ({error})") from error


def require_unique(names: Sequence[str], where: Path) -> tuple[str, ...]:
    """Class names, which are captions: none empty, none twice."""
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice or not all(name.strip() for name in names):
        found = f"more than once: {', '.join(twice[:5])}" if twice else "one is empty"
        raise GridError(f"{where}: names of classes must say something and differ; {found}")
    return tuple(names)
