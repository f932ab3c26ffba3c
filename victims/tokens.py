"""Token ids that are kept: a caption goes through a byte-pair table once per process.

Byte pairs of half a million captions take half a minute, and every fit, every scan of a fit and
every rate of a selection asks for the same ones while a GPU waits.
Shapes: N captions, T tokens.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int32]
# Captions that are kept: with their tokens they take about 300 bytes each.
MOST: Final = 1_000_000


class _Growing:
    """An array that grows at its end, in room that doubles; what lies behind ``length`` is void."""

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self.values, self.length = np.zeros(16, dtype=dtype), 0

    def add(self, more: npt.NDArray[Any]) -> None:
        length = self.length + len(more)
        if length > len(self.values):
            wider = np.zeros(2 * length, dtype=self.values.dtype)
            wider[: self.length] = self.values[: self.length]
            self.values = wider
        self.values[self.length : length] = more
        self.length = length


class Remembered:
    """A tokenizer that knows the captions it has seen, the latest ``most`` or so of them.

    Tokens are kept without the zeros that pad them, one caption after the other.
    """

    def __init__(self, tokenize: Callable[[list[str]], Tokens], most: int = MOST) -> None:
        self._tokenize, self._most, self._lock = tokenize, most, threading.Lock()
        self._forget()

    def _forget(self) -> None:
        self._place: dict[str, int] = {}
        self._ids, self._ends = _Growing(np.dtype(np.int32)), _Growing(np.dtype(np.int64))
        self._ends.add(np.zeros(1, dtype=np.int64))
        self._context = 0

    def __call__(self, captions: Sequence[str]) -> Tokens:
        """NT, as the tokenizer itself gives them."""
        captions = list(captions)
        with self._lock:
            unseen = [c for c in dict.fromkeys(captions) if c not in self._place]
            if len(unseen) + len(self._place) > self._most:
                self._forget()
                unseen = list(dict.fromkeys(captions))
            if len(unseen) > self._most or not captions:
                return self._tokenize(captions)
            if unseen:
                self._keep(unseen)
            return self._kept(np.array([self._place[c] for c in captions], dtype=np.int64))

    def _keep(self, unseen: list[str]) -> None:
        token_NT = self._tokenize(unseen)
        self._context = token_NT.shape[1]
        is_told = np.logical_or.accumulate(token_NT[:, ::-1] != 0, axis=1)[:, ::-1]
        first = len(self._place)
        self._place |= {caption: first + place for place, caption in enumerate(unseen)}
        self._ends.add(self._ids.length + is_told.sum(1).cumsum())
        self._ids.add(token_NT[is_told])

    def _kept(self, place_N: npt.NDArray[np.int64]) -> Tokens:
        start_N = self._ends.values[place_N]
        length_N = self._ends.values[place_N + 1] - start_N
        row = np.repeat(np.arange(len(place_N)), length_N)
        column = np.arange(len(row)) - np.repeat(length_N.cumsum() - length_N, length_N)
        token_NT = np.zeros((len(place_N), self._context), dtype=np.int32)
        token_NT[row, column] = self._ids.values[start_N[row] + column]
        return token_NT
