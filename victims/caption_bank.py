"""How hard it is for a model to find a picture's own caption among other captions.

Captions that say nearly the same are no alternatives to each other, and are left out row by row.
Shapes: N rows, B some of them, M captions of a bank, D embedding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from victims.corpora import Rows

Floats = npt.NDArray[np.float64]
Features = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]

CHUNK = 4096


class Sight(NamedTuple):
    """What a model makes of the data: normalised features and the scale of its logits."""

    image_ND: Features
    text_ND: Features
    scale: float


class Question(NamedTuple):
    """Some rows, and the rows whose captions they are rated against beside their own."""

    rows_B: Rows
    others_M: Rows


@dataclass(frozen=True, slots=True)
class Alike:
    """Which captions are no alternatives to a row's own: equal ones, and those whose text-text
    cosine with it exceeds ``limit`` (None: equal ones alone)."""

    text_ND: Features
    number_N: Rows
    limit: float | None

    def __call__(self, rows_B: Rows, others_M: Rows) -> Bools:
        """BM, true where the other row's caption is to be left out."""
        same_BM: Bools = self.number_N[rows_B, None] == self.number_N[others_M]
        if self.limit is None:
            return same_BM
        near_BM = self.text_ND[rows_B] @ self.text_ND[others_M].T > self.limit
        return np.asarray(same_BM | near_BM)


def caption_numbers(captions: Sequence[str]) -> Rows:
    """A number per row, the same for equal captions, by first appearance."""
    known = {caption: number for number, caption in enumerate(dict.fromkeys(captions))}
    return np.array([known[caption] for caption in captions], dtype=np.int64)


def draw_bank(number_N: Rows, size: int, rng: np.random.Generator) -> Rows:
    """Rows of at most ``size`` different captions, in rising order."""
    _, first = np.unique(number_N, return_index=True)
    return np.sort(rng.choice(first, min(size, len(first)), replace=False))


def against_bank(num_rows: int, bank_M: Rows) -> Iterator[Question]:
    """Every row against one and the same bank."""
    for start in range(0, num_rows, CHUNK):
        yield Question(np.arange(start, min(start + CHUNK, num_rows)), bank_M)


def against_batches(num_rows: int, size: int, rng: np.random.Generator) -> Iterator[Question]:
    """Every row against the captions of one random batch that it is in.

    The last batch is filled with rows of the one before, so that all sets are equally large.
    """
    order = rng.permutation(num_rows)
    for start in range(0, num_rows, size):
        stop = min(start + size, num_rows)
        yield Question(order[start:stop], order[max(0, stop - size) : stop])


def entropies(
    sights: Sequence[Sight], alike: Alike, questions: Iterable[Question]
) -> tuple[Floats, float]:
    """- log p(own caption) of every row, and the share of other captions that was left out.

    p is the softmax over the row's own caption and the others; the logits of several models are
    averaged.
    """
    found_N = np.full(len(alike.number_N), np.nan)
    left_out = asked = 0
    for rows_B, others_M in questions:
        own_B, other_BM = np.zeros(len(rows_B)), np.zeros((len(rows_B), len(others_M)))
        for image_ND, text_ND, scale in sights:
            image_BD = image_ND[rows_B].astype(np.float64) * (scale / len(sights))
            own_B += (image_BD * text_ND[rows_B]).sum(1)
            other_BM += image_BD @ text_ND[others_M].T.astype(np.float64)
        out_BM = alike(rows_B, others_M)
        other_BM[out_BM] = -np.inf
        # log(1 + sum of exp(other - own)), the own logit being the first of the softmax.
        gap_BM = np.concatenate([np.zeros((len(rows_B), 1)), other_BM - own_B[:, None]], axis=1)
        found_N[rows_B] = np.logaddexp.reduce(gap_BM, axis=1)
        left_out, asked = left_out + int(out_BM.sum()), asked + out_BM.size
    return found_N, left_out / max(1, asked)


def caption_groups(alike: Alike, bank_M: Rows) -> Rows:
    """A group per row: the nearest to its caption among the captions of the bank, of which those
    that say nearly the same as an earlier one are left out."""
    kept: list[int] = []
    for row in bank_M.tolist():
        if not alike(np.array([row]), np.array(kept, dtype=np.int64)).any():
            kept.append(row)
    text_GD = alike.text_ND[kept]
    starts = range(0, len(alike.number_N), CHUNK)
    parts = [(alike.text_ND[s : s + CHUNK] @ text_GD.T).argmax(1) for s in starts]
    return np.concatenate(parts).astype(np.int64)


def own_first(own_B: Tensor, other_BM: Tensor, out_BM: Tensor) -> Tensor:
    """Logits of a row's own caption, in front, and of the others; what is left out cannot win."""
    return torch.cat([own_B[:, None], other_BM.masked_fill(out_BM, -torch.inf)], dim=1)
