"""CIFAR-10 and CIFAR-100 from their files: the python batches or the binary release.

The python batches are pickles; they are read by `victims.plain_pickles`, which runs nothing.
Krizhevsky, "Learning multiple layers of features from tiny images", 2009.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from victims.corpora import Rows
from victims.errors import GridError
from victims.picture_files import Found, Part, absent, require_unique, text_of
from victims.plain_pickles import read_plain

_SIDE: Final = 32
_BYTES: Final = 3 * _SIDE * _SIDE  # the planes of a picture, red first


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layout:
    """One form in which a release lies on disk."""

    folder: str
    train: tuple[str, ...]
    test: str
    meta: str
    names: str  # key of the class names, where the metadata is a pickle
    labels: str  # key of the labels, where batches are pickles
    label_bytes: int = 0  # bytes before each picture, the label last; 0: pickles

    @property
    def files(self) -> tuple[str, ...]:
        return (*self.train, self.test, self.meta)


_BATCHES: Final = tuple(f"data_batch_{number}" for number in range(1, 6))
_CIFAR10: Final = (
    _Layout(
        folder="cifar-10-batches-py",
        train=_BATCHES,
        test="test_batch",
        meta="batches.meta",
        names="label_names",
        labels="labels",
    ),
    _Layout(
        folder="cifar-10-batches-bin",
        train=tuple(f"{name}.bin" for name in _BATCHES),
        test="test_batch.bin",
        meta="batches.meta.txt",
        names="",
        labels="",
        label_bytes=1,
    ),
)
_CIFAR100: Final = (
    _Layout(
        folder="cifar-100-python",
        train=("train",),
        test="test",
        meta="meta",
        names="fine_label_names",
        labels="fine_labels",
    ),
    _Layout(
        folder="cifar-100-binary",
        train=("train.bin",),
        test="test.bin",
        meta="fine_label_names.txt",
        names="",
        labels="",
        label_bytes=2,
    ),
)


def cifar10(root: Path) -> Found:
    """``cifar-10-batches-py`` or ``cifar-10-batches-bin``, as folder or in the folder given."""
    return _find("cifar10", root, _CIFAR10)


def cifar100(root: Path) -> Found:
    """``cifar-100-python`` or ``cifar-100-binary``, with the 100 fine labels."""
    return _find("cifar100", root, _CIFAR100)


def _find(dataset: str, root: Path, layouts: Sequence[_Layout]) -> Found:
    for layout in layouts:
        for folder in (root / layout.folder, root):
            there = [name for name in layout.files if (folder / name).is_file()]
            if not there:
                continue
            if missing := [name for name in layout.files if name not in there]:
                advice = "Unpack the whole release there, or name another folder as root."
                raise absent(dataset, ", ".join(missing), folder, advice)
            classes = _classes(folder / layout.meta, layout)
            read = partial(_part, layout, num_classes=len(classes))
            return Found(
                classes=classes,
                files={name: folder / name for name in layout.files},
                train=partial(read, [folder / name for name in layout.train]),
                test=partial(read, [folder / layout.test]),
            )
    folders = " or ".join(f"{layout.folder}/" for layout in layouts)
    advice = f"Give as root the folder that holds {folders}, or that folder itself."
    raise absent(dataset, f"{folders} (or the files of one)", root, advice)


def _classes(path: Path, layout: _Layout) -> tuple[str, ...]:
    if layout.label_bytes:
        names = [line.strip() for line in text_of(path).splitlines() if line.strip()]
    else:
        names = [_text(name, path) for name in _list(read_plain(path), layout.names, path)]
    return require_unique([name.replace("_", " ") for name in names], path)


def _part(layout: _Layout, paths: Sequence[Path], *, num_classes: int) -> Part:
    read = _records if layout.label_bytes else _batch
    loaded = [read(path, layout) for path in paths]
    for path, (_, labels) in zip(paths, loaded, strict=True):
        if len(labels) and not 0 <= labels.min() <= labels.max() < num_classes:
            raise GridError(f"{path}: labels must lie in 0..{num_classes - 1}")
    image_NCHW = np.concatenate([images for images, _ in loaded])

    def pictures(rows: Rows) -> Iterator[Image.Image]:
        return (Image.fromarray(image.transpose(1, 2, 0)) for image in image_NCHW[rows])

    return Part(np.concatenate([labels for _, labels in loaded]), pictures)


def _records(path: Path, layout: _Layout) -> tuple[npt.NDArray[np.uint8], Rows]:
    """Pictures and labels of a file of the binary release."""
    width = layout.label_bytes + _BYTES
    raw = np.frombuffer(path.read_bytes(), np.uint8)
    if not len(raw) or len(raw) % width:
        raise GridError(
            f"{path}: {len(raw)} bytes are no whole number of records of {width}: the file is "
            "truncated. Put an intact copy there."
        )
    record_NB = raw.reshape(-1, width)
    labels = record_NB[:, layout.label_bytes - 1].astype(np.int64)
    return record_NB[:, layout.label_bytes :].reshape(-1, 3, _SIDE, _SIDE), labels


def _batch(path: Path, layout: _Layout) -> tuple[npt.NDArray[np.uint8], Rows]:
    """Pictures and labels of a python batch."""
    held = read_plain(path)
    data = held.get("data")
    labels = [_int(label, path) for label in _list(held, layout.labels, path)]
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8:
        raise GridError(f"{path}: 'data' is no array of bytes; is it a batch of pictures?")
    if data.shape != (len(labels), _BYTES):
        raise GridError(
            f"{path}: {len(labels)} labels need pictures of shape ({len(labels)}, {_BYTES}); "
            f"found {data.shape}"
        )
    return data.reshape(-1, 3, _SIDE, _SIDE), np.asarray(labels, dtype=np.int64)


def _list(held: dict[str, Any], key: str, path: Path) -> list[Any]:
    found = held.get(key)
    if isinstance(found, np.ndarray) and found.ndim == 1:
        return list(found.tolist())
    if not isinstance(found, list):
        known = ", ".join(sorted(held)) or "nothing"
        raise GridError(f"{path}: no list {key!r} in it; it holds {known}")
    return found


def _int(value: Any, path: Path) -> int:
    if not isinstance(value, int):
        raise GridError(f"{path}: a label is a {type(value).__name__}, not a number")
    return value


def _text(value: Any, path: Path) -> str:
    if isinstance(value, bytes):
        return value.decode("latin-1")
    if not isinstance(value, str):
        raise GridError(f"{path}: a class name is a {type(value).__name__}, not text")
    return value
