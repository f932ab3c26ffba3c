"""A fit of a few steps that is timed: what `benchmarks.gpu_steps` puts in the place of a fit."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from grid.step_costs import peak_of
from victims.batches import Batch
from victims.corpora import Rows
from victims.training import Fit

WARM_UP, STEPS = 3, 6


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Measured(Fit):
    """A fit of a few steps, timed: fed by its loader, and on one batch that is on the device."""

    def __init__(self, found: list[dict[str, Any]], *given: Any, **more: Any) -> None:
        alone = {"checkpoints": None, "on_epoch": None}
        super().__init__(*given, **{**more, **alone})
        self.found, self.marks, self.flops = found, list[float](), 0
        self.memory: int | None = None

    def _choose_rows(self) -> Rows:
        """As many rows as the steps take, some of them again; none in the second epoch."""
        chosen = super()._choose_rows()
        if self.epoch or not len(chosen):
            return chosen[:0]
        return np.resize(chosen, (WARM_UP + 2 * STEPS) * self.recipe.batch_size)

    def _train_step(self, module: nn.Module, index: int) -> None:
        cuda = self.device.type == "cuda"
        if index == WARM_UP - 1:
            # Kernels that were compiled are not counted: the layers are, one by one.
            eager = torch.compiler.set_stance("force_eager")
            with eager, FlopCounterMode(display=False) as counter:
                super()._train_step(module, index)
            self.flops = counter.get_total_flops()
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            self._mark()
            return
        super()._train_step(module, index)
        if index == WARM_UP + STEPS - 1:
            self._mark()
            loader, batch = self.loader, self.loader(self.order[: self.recipe.batch_size])  # type: ignore[index]
            self.staged, self.fed = _Staged(batch), loader
            self.loader = self.staged  # type: ignore[assignment]
            self._mark()
        if index == WARM_UP + 2 * STEPS - 1:
            self._mark()
            self.loader = self.fed
            self.memory = torch.cuda.max_memory_allocated() if cuda else None
            self._keep()

    def _mark(self) -> None:
        synchronize(self.device)
        self.marks.append(time.perf_counter())

    def _keep(self) -> None:
        fed, staged = self.marks[1] - self.marks[0], self.marks[3] - self.marks[2]
        rows = self.recipe.batch_size
        named = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        peak = peak_of(named, self.recipe.precision)
        rate = rows * STEPS / fed
        self.found.append(
            {
                "objective": type(self.objective).__name__,
                "rows": rows,
                "samples_per_second": rate,
                "flops_per_sample": self.flops / rows,
                "share_of_peak": None if peak is None else rate * self.flops / rows / peak,
                "waiting_share": max(0.0, 1 - staged / fed),
                "peak_memory_bytes": self.memory,
            }
        )


class _Staged:
    """A loader whose one batch is there already."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def __call__(self, positions: Rows) -> Batch:
        return self.batch

    def expect(self, positions: Rows) -> None:
        return None

    def begin_epoch(self, epoch: int) -> None:
        return None

    def close(self) -> None:
        return None
