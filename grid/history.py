"""How long stages take: seconds per unit of work, measured on this machine or assumed."""

from __future__ import annotations

import contextlib
import json
import math
import uuid
from pathlib import Path

from grid.assumed import assumed_rate, rated_as
from grid.stages import Stage
from grid.step_costs import DEFAULT_DEVICE

# Seconds per unit of work before anything was measured on a machine; replaced by its history.
DEFAULT_RATE = {
    "corpus": 0.1,
    "pointer": 0.001,
    "measure": 0.5,
    "plain": 0.5,
    "plain_clip": 0.5,
    "trigger": 0.1,
    "poisoned": 0.1,
}
# Of whatever else computes with a network.
DEFAULT_STEP_RATE = 0.5
# How work is counted; of a history that counts otherwise only these families are still right.
FORM, FORM_NAME = 2.0, "form"
UNCHANGED = ("corpus", "pointer", "plain", "plain_clip", "poisoned", "trigger", "file_model")


def _family(name: str) -> str:
    return name.split("/")[0].split(":")[0]


class History:
    """Measured seconds per unit of work, by family of stage, kept beside the store.

    Of real models that nothing was measured of they are assumed, for a type of device.
    """

    def __init__(self, path: Path | None, device: str = DEFAULT_DEVICE) -> None:
        self.path, self.device = path, device
        self.rates: dict[str, float] = {}
        # It only estimates: what cannot be read is as good as not there.
        with contextlib.suppress(OSError, ValueError, AttributeError, TypeError, RecursionError):
            found = json.loads(path.read_text()) if path else {}
            rates = {str(name): float(rate) for name, rate in found.items()}
            form = rates.pop(FORM_NAME, 1.0)
            kept = {n: r for n, r in rates.items() if form == FORM or _family(n) in UNCHANGED}
            self.rates = {n: r for n, r in kept.items() if math.isfinite(r) and r >= 0}

    def rate(self, name: str) -> float:
        """Seconds per unit of work of what is rated under a name."""
        if name in self.rates:
            return self.rates[name]
        family, assumed = _family(name), assumed_rate(name, self.device)
        return DEFAULT_RATE.get(family, DEFAULT_STEP_RATE) if assumed is None else assumed

    def seconds(self, stage: Stage) -> float:
        return self.rate(rated_as(stage)) * stage.work

    def record(self, stage: Stage, seconds: float) -> None:
        rate, name = seconds / max(stage.work, 1e-6), rated_as(stage)
        old = self.rates.get(name)
        self.rates[name] = rate if old is None else 0.7 * old + 0.3 * rate

    def save(self) -> None:
        """Replace the file; another driver may do the same at the same time."""
        if self.path is None:
            return
        scratch = self.path.with_name(f".{self.path.name}.{uuid.uuid4().hex[:8]}")
        with contextlib.suppress(OSError):
            body = {FORM_NAME: FORM, **self.rates}
            scratch.write_text(json.dumps(body, sort_keys=True, indent=1))
            scratch.replace(self.path)
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)
