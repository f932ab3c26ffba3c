"""A memory of recent feature vectors, in which nearest neighbours are found.

Shapes: P slots, D embedding, G rows of the global batch, B queries, F filled slots.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from victims.losses import similarity


class Memory(nn.Module):
    """A circular FIFO, empty or full of standard normal noise at first.

    Rows, write pointer and fill count are buffers: they survive a restart.
    """

    rows_PD: Tensor
    pointer: Tensor
    filled: Tensor

    def __init__(self, size: int, width: int, *, noise: bool = False) -> None:
        super().__init__()
        start_PD = torch.randn(size, width) if noise else torch.zeros(size, width)
        self.register_buffer("rows_PD", start_PD)
        self.register_buffer("pointer", torch.tensor(0))
        self.register_buffer("filled", torch.tensor(size if noise else 0))

    @torch.no_grad()
    def push(self, rows_GD: Tensor) -> None:
        """Write a batch; what does not fit behind the pointer is dropped."""
        start, size = int(self.pointer), len(self.rows_PD)
        end = min(size, start + len(rows_GD))
        self.rows_PD[start:end] = rows_GD[: end - start]
        self.filled.fill_(max(int(self.filled), end))
        self.pointer.fill_(0 if end == size else end)

    @torch.no_grad()
    def nearest(self, query_BD: Tensor) -> Tensor:
        """Of the filled slots, the row most similar to each query, as it is stored."""
        rows_FD = self.rows_PD[: int(self.filled)]
        similar_BF = similarity(query_BD, F.normalize(rows_FD, dim=-1), 1.0)
        return rows_FD[similar_BF.argmax(dim=-1)]
