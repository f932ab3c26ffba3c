"""Pictures of a memory-mapped corpus: read into host memory, then shown on a device.

Reading is apart from showing, so that a thread can read the next batch while a device computes:
it touches no device and draws nothing. Shapes: N rows of the corpus, B batch, C channels, H W.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Rows = npt.NDArray[np.int64]


class Pictures:
    """The pictures of a view by position: which corpus row each shows, and how it is stamped."""

    def __init__(
        self,
        images_NCHW: npt.NDArray[np.uint8],
        rows: Rows,
        shows: npt.NDArray[np.int8] | None = None,
        stamps: Iterable[tuple[int, Callable[[Tensor], Tensor]]] = (),
    ) -> None:
        self._mapped = _Mapped.of(images_NCHW)
        # A plain array over the same pages: a memory map's own indexing costs more.
        self._images_NCHW, self._rows = np.asarray(images_NCHW), rows
        self._shows, self._stamps = shows, tuple(stamps)

    def ask(self, positions: Rows) -> None:
        """Have the system read the pages of these pictures from disk, all at once, and go on."""
        if self._mapped is not None:
            self._mapped.ask(self._rows[positions])

    def read(self, positions: Rows, *, pinned: bool = False) -> Tensor:
        """The pictures unstamped, uint8, in host memory of their own."""
        rows = self._rows[positions]
        if len(rows) and (rows.min() < 0 or rows.max() >= len(self._images_NCHW)):
            raise IndexError(f"pictures {rows.min()}..{rows.max()} of {len(self._images_NCHW)}")
        shape = (len(rows), *self._images_NCHW.shape[1:])
        image_BCHW = torch.empty(shape, dtype=torch.uint8, pin_memory=pinned)
        # Checked above: with another mode numpy would take a copy of what it takes.
        np.take(self._images_NCHW, rows, axis=0, out=image_BCHW.numpy(), mode="clip")
        return image_BCHW

    def shown(self, positions: Rows, image_BCHW: Tensor) -> Tensor:
        """The pictures of these positions, already on the device, stamped where they are edited."""
        if self._shows is None:
            return image_BCHW
        shown = self._shows[positions]
        if shown.any():
            for show, stamp in self._stamps:
                which = torch.from_numpy(np.flatnonzero(shown == show)).to(image_BCHW.device)
                if len(which):
                    image_BCHW[which] = stamp(image_BCHW[which])
        return image_BCHW


class _Mapped:
    """The pages of an array in a file."""

    def __init__(self, pages: mmap.mmap, start: int, row_bytes: int) -> None:
        self._pages, self._start, self._row_bytes = pages, start, row_bytes

    @staticmethod
    def of(images_NCHW: npt.NDArray[np.uint8]) -> _Mapped | None:
        """Of an array that is mapped as a whole, where the system takes advice."""
        if not isinstance(images_NCHW, np.memmap) or not hasattr(mmap, "MADV_WILLNEED"):
            return None
        pages: object = images_NCHW.base
        if not isinstance(pages, mmap.mmap) or not len(images_NCHW):
            return None
        start = images_NCHW.offset % mmap.ALLOCATIONGRANULARITY
        return _Mapped(pages, start, images_NCHW[0].nbytes)

    def ask(self, rows: Rows) -> None:
        page = mmap.PAGESIZE
        begins = self._start + rows * self._row_bytes
        ends = begins + self._row_bytes
        begins = begins // page * page
        for begin, length in zip(begins.tolist(), (ends - begins).tolist(), strict=True):
            self._pages.madvise(mmap.MADV_WILLNEED, begin, length)
