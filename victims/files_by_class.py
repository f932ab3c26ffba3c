"""The files of a part that may have more than a million pictures: class by class, names alone are
kept, and a source is made for those that are asked for.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import overload

import numpy as np
from PIL import Image

from victims.corpora import Rows
from victims.picture_files import Part, open_picture, picture_names
from victims.tar_files import Source


class FilesByClass(Sequence[tuple[str, Source]]):
    """What the pictures of a part are called and where they lie, in the order of classes."""

    def __init__(self, part: str) -> None:
        self._part = part
        self._folders = list[Path]()
        self._inside = list[Mapping[str, Source]]()
        self._names = list[list[str]]()
        self._ends = [0]

    def add(self, folder: Path, inside: Mapping[str, Source]) -> int:
        """The next class: pictures of a folder, and of a tar file; their number."""
        own = picture_names(folder)
        names = sorted({*inside, *own}) if inside else own
        self._folders.append(folder)
        there = set(own)
        # A picture that lies in both is that of the folder.
        self._inside.append({name: at for name, at in inside.items() if name not in there})
        self._names.append(names)
        self._ends.append(self._ends[-1] + len(names))
        return len(names)

    def part(self) -> Part:
        """These pictures, which are opened when they are asked for."""
        return Part(self._labels(), self._pictures, self)

    def _labels(self) -> Rows:
        counts = [len(names) for names in self._names]
        return np.repeat(np.arange(len(counts), dtype=np.int64), counts)

    def _pictures(self, rows: Rows) -> Iterator[Image.Image]:
        return (open_picture(self[row][1]) for row in rows.tolist())

    def __len__(self) -> int:
        return self._ends[-1]

    @overload
    def __getitem__(self, index: int) -> tuple[str, Source]: ...
    @overload
    def __getitem__(self, index: slice) -> list[tuple[str, Source]]: ...
    def __getitem__(self, index: int | slice) -> tuple[str, Source] | list[tuple[str, Source]]:
        if isinstance(index, slice):
            return [self[row] for row in range(*index.indices(len(self)))]
        row = range(len(self))[index]
        label = bisect_right(self._ends, row) - 1
        name = self._names[label][row - self._ends[label]]
        source = self._inside[label].get(name) or self._folders[label] / name
        return f"{self._part}/{label:04d}/{name}", source
