"""From a view to batches on the model's device, and scores of every row."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from victims.corpora import Rows, View, subset
from victims.models import Clip, Tokens
from victims.pulse import beat


@dataclass(frozen=True, slots=True)
class Batch:
    """This rank's share of a global batch.

    ``image`` is uint8 BCHW with triggers already in it, ``tokens`` BT cut after the longest
    caption, ``texts`` the tokens of alternative captions, ``columns`` the annotations, ``views``
    what the objective's own hook made. Nothing tells which rows are poisoned.
    """

    rows: Tensor
    image: Tensor
    tokens: Tensor
    texts: Mapping[str, Tensor] = field(default_factory=dict)
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    views: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.tokens)


class Scorer(Protocol):
    """A frozen dataclass, so that its parameters key the scores it makes."""

    def __call__(self, model: Clip, batch: Batch) -> Tensor: ...


class ReadsText:
    """A scorer that derives from this looks at no picture, and none is read for it."""

    __slots__ = ()


class Scan:
    """The rows of a fit as an objective sees them between epochs: how many, their annotations, and
    scores of all or some of them under the model as it is now."""

    def __init__(self, view: View, score: Callable[[Scorer, View], np.ndarray]) -> None:
        self._view, self._score = view, score

    def __len__(self) -> int:
        return len(self._view)

    @property
    def columns(self) -> Mapping[str, np.ndarray]:
        return self._view.columns

    def __call__(self, scorer: Scorer, rows: Rows | None = None) -> np.ndarray:
        """``scorer`` in eval mode on the rows, in the order given."""
        view = self._view if rows is None else subset(self._view, rows)
        return self._score(scorer, view)


class _Host(NamedTuple):
    """A batch in host memory, before it goes to the device."""

    rows: Tensor
    image: Tensor
    tokens: Tensor
    texts: dict[str, Tensor]
    columns: dict[str, Tensor]


class Loader:
    """Batches of a view, as tensors on the device, each rank its own rows of each batch.

    For a GPU the batch that is expected next is put together by a thread, in pinned memory; else
    (`ahead` is false) its pictures are only asked of the disk. Neither changes a batch. Without
    ``pictures`` none are read: those of a batch have no pixels.
    """

    def __init__(
        self,
        view: View,
        model: Clip,
        device: torch.device,
        *,
        ahead: bool | None = None,
        pictures: bool = True,
    ) -> None:
        self.view, self.model, self.device = view, model, device
        self._pictures = view.pictures() if pictures else None
        self.tokens_NT = model.tokenizer(view.captions())
        self.lengths_N = caption_lengths(self.tokens_NT)
        self._texts: dict[str, tuple[Tokens, Rows]] = {}
        self._columns = {
            n: torch.from_numpy(np.ascontiguousarray(c)) for n, c in view.columns.items()
        }
        self._pinned = device.type == "cuda"
        self._ahead = self._pinned if ahead is None else ahead
        self._pool: ThreadPoolExecutor | None = None
        self._next: tuple[Rows, Future[_Host]] | None = None
        self.waited_seconds = 0.0  # for batches that were not there when they were asked for

    def begin_epoch(self, epoch: int) -> None:
        """Draw the alternative captions: once, or anew for the views that ask for it."""
        self.close()
        for name, text in self.view.texts.items():
            if name not in self._texts or text.per_epoch:
                captions = text.rewrite(self.view.captions(), epoch if text.per_epoch else 0)
                tokens_NT = self.model.tokenizer(captions)
                self._texts[name] = (tokens_NT, caption_lengths(tokens_NT))

    def expect(self, positions: Rows) -> None:
        """Say which batch comes next: it is read while the device computes."""
        if not self._ahead:
            self._ask(positions)
            return
        if self._pool is None:
            self._pool = self._thread()
        self._next = positions, self._pool.submit(self._read, positions)

    def _thread(self) -> ThreadPoolExecutor:
        if not self._pinned:
            return ThreadPoolExecutor(1, "loader")
        # Pinned memory belongs to a device's context: without this a thread would open GPU 0's.
        index = torch.cuda.current_device() if self.device.index is None else self.device.index
        return ThreadPoolExecutor(1, "loader", torch.cuda.set_device, (index,))

    def close(self) -> None:
        """Forget what is expected; the thread ends."""
        if self._pool is not None:
            self._pool.shutdown()
        self._pool, self._next = None, None

    def __call__(self, positions: Rows) -> Batch:
        beat()
        started = time.perf_counter()
        expected, self._next = self._next, None
        if expected is not None and np.array_equal(expected[0], positions):
            host = expected[1].result()
        else:
            host = self._read(positions)
        self.waited_seconds += time.perf_counter() - started
        return Batch(
            rows=self._moved(host.rows),
            image=self._shown(positions, self._moved(host.image)),
            tokens=self._moved(host.tokens),
            texts={n: self._moved(t) for n, t in host.texts.items()},
            columns={n: self._moved(c) for n, c in host.columns.items()},
        )

    def _moved(self, tensor: Tensor) -> Tensor:
        # From pinned memory without waiting: torch keeps that memory until the copy is done.
        return tensor.to(self.device, non_blocking=self._pinned)

    def _read(self, positions: Rows) -> _Host:
        self._ask(positions)
        return _Host(
            rows=self._held(torch.from_numpy(positions)),
            image=self._images(positions),
            tokens=self._cut(self.tokens_NT, self.lengths_N, positions),
            texts={n: self._cut(*pair, positions) for n, pair in self._texts.items()},
            columns={n: self._held(c[positions]) for n, c in self._columns.items()},
        )

    def _ask(self, positions: Rows) -> None:
        if self._pictures is not None:
            self._pictures.ask(positions)

    def _images(self, positions: Rows) -> Tensor:
        if self._pictures is None:
            return torch.empty((len(positions), 3, 0, 0), dtype=torch.uint8)
        return self._pictures.read(positions, pinned=self._pinned)

    def _shown(self, positions: Rows, image_BCHW: Tensor) -> Tensor:
        if self._pictures is None:
            return image_BCHW
        return self._pictures.shown(positions, image_BCHW)

    def _cut(self, tokens_NT: Tokens, lengths_N: Rows, positions: Rows) -> Tensor:
        cut = tokens_NT[positions, : int(lengths_N[positions].max())]
        return self._held(torch.from_numpy(cut).long())

    def _held(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory() if self._pinned else tensor


def caption_lengths(tokens_NT: Tokens) -> Rows:
    """Tokens of each caption up to its last one that is no padding.

    Not the number of ids other than 0: byte-pair tables give that id to ``!``, too.
    """
    last: Rows = tokens_NT.shape[1] - (tokens_NT[:, ::-1] != 0).argmax(1)
    return last


@torch.no_grad()
def score_rows(model: Clip, view: View, scorer: Scorer, batch_size: int = 256) -> np.ndarray:
    """``scorer`` on every row of a view, in order, in eval mode."""
    was_training = model.training
    model.eval()
    pictures = not isinstance(scorer, ReadsText)
    loader = Loader(view, model, model.mean_C.device, pictures=pictures)
    loader.begin_epoch(0)
    starts = range(0, len(view), batch_size)
    spans = [np.arange(s, min(s + batch_size, len(view)), dtype=np.int64) for s in starts]
    parts = []
    for index, positions in enumerate(spans):
        batch = loader(positions)
        if index + 1 < len(spans):
            loader.expect(spans[index + 1])
        parts.append(scorer(model, batch).float().cpu())
    loader.close()
    model.train(was_training)
    return torch.cat(parts).numpy() if parts else np.zeros(0, dtype=np.float32)


def cat_tokens(first_BT: Tensor, second_BU: Tensor) -> Tensor:
    """Two batches of tokens as one, padded to the longer."""
    width = max(first_BT.shape[1], second_BU.shape[1])
    return torch.cat([F.pad(t, (0, width - t.shape[1])) for t in (first_BT, second_BU)])
