"""Sets whose release is arrays of numbers: STL-10 in its binary form, SVHN's cropped digits.

Coates et al., AISTATS 2011; Netzer et al., NIPS workshop 2011.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from victims.corpora import Rows
from victims.errors import GridError
from victims.mat_files import read_mat
from victims.picture_files import Found, Part, absent, require_unique, text_of

Pixels = npt.NDArray[np.uint8]

_SIDE: Final = 96
_DIGITS: Final = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def stl10(root: Path) -> Found:
    """STL-10 without its unlabelled pictures."""
    names = ("class_names.txt", "train_X.bin", "train_y.bin", "test_X.bin", "test_y.bin")
    folder = _folder("stl10", root, "stl10_binary", names)
    classes = require_unique(text_of(folder / names[0]).split(), folder / names[0])

    def part(split: str) -> Part:
        label_N = np.fromfile(folder / f"{split}_y.bin", np.uint8).astype(np.int64) - 1
        raw = np.fromfile(folder / f"{split}_X.bin", np.uint8)
        if len(raw) != len(label_N) * 3 * _SIDE**2:
            raise GridError(f"{folder}: {split}_X.bin is no picture for each label: cut off?")
        # Columns come before rows in these files.
        pixels_NHWC = raw.reshape(-1, 3, _SIDE, _SIDE).transpose(0, 3, 2, 1)
        return _part(label_N, pixels_NHWC, len(classes), folder / f"{split}_y.bin")

    return Found(
        classes=classes,
        files={name: folder / name for name in names},
        train=partial(part, "train"),
        test=partial(part, "test"),
    )


def svhn(root: Path) -> Found:
    """Street-view digits, cropped to 32 px, without the extra part. A 0 is labelled 10."""
    names = ("train_32x32.mat", "test_32x32.mat")
    folder = _folder("svhn", root, "svhn", names)

    def part(split: str) -> Part:
        path = folder / f"{split}_32x32.mat"
        found = read_mat(path)
        if not {"X", "y"} <= found.keys() or found["X"].ndim != 4 or found["X"].dtype != np.uint8:
            raise GridError(f"{path}: needs the pictures X and their labels y")
        label_N = found["y"].ravel().astype(np.int64)
        label_N[label_N == 10] = 0
        pixels_NHWC = found["X"].transpose(3, 0, 1, 2).view(np.uint8)
        if len(label_N) != len(pixels_NHWC):
            raise GridError(f"{path}: {len(pixels_NHWC)} pictures and {len(label_N)} labels")
        return _part(label_N, pixels_NHWC, len(_DIGITS), path)

    return Found(
        classes=_DIGITS,
        files={name: folder / name for name in names},
        train=partial(part, "train"),
        test=partial(part, "test"),
        names_apart=True,
    )


def _folder(dataset: str, root: Path, own: str, names: tuple[str, ...]) -> Path:
    folder = next((at for at in (root / own, root) if (at / names[-1]).is_file()), None)
    advice = f"Give as root the folder that holds {own}/, or {own}/ itself."
    if folder is None:
        raise absent(dataset, f"{own}/{names[-1]}", root, advice)
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise absent(dataset, ", ".join(missing), folder, advice)
    return folder


def _part(label_N: Rows, pixels_NHWC: Pixels, num_classes: int, where: Path) -> Part:
    if not len(label_N) or label_N.min() < 0 or label_N.max() >= num_classes:
        raise GridError(f"{where}: labels must name one of {num_classes} classes each")

    def pictures(rows: Rows) -> Iterator[Image.Image]:
        for row in rows.tolist():
            yield Image.fromarray(np.ascontiguousarray(pixels_NHWC[row]))

    return Part(label_N, pictures)
