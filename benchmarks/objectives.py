"""A step of each defense's objective, against the plain CLIP step on the same batch.

Every defense that trains is applied to the victim of the contract kit's world. Each step of its
fits is followed (or, every other time, preceded) by a step of a plain twin on the same rows, under
the same recipe. The factor that the algorithm explains is what its passes through the towers cost:

    1 + sum over towers of (b - 1) x (forward and backward) + (f - b) x (forward alone) + views

with b the passes per row of the batch that take a gradient and f all passes, as the model's meter
counts them, and every cost in units of a plain step. The towers are timed on the plain model, one
batch at a time (two views in one batch cost a small model less than two batches: such steps stay
below 1), the augmentation of `Objective.views` in the step itself. The rest (loss terms, pools,
masks, passes that no meter counts) must fit into the margin. Steps that pass other numbers of rows
are figures of their own; what an objective does between epochs is no step. Ratios are of CPU
seconds, step by step; their medians are shown.
"""

from __future__ import annotations

import copy
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import astuple, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.common import Figure, Figures, Work, interleaved, one_thread, ratio, timed
from defenses.base import Phase, Recipes
from grid.kit_base import Kit, recipe
from grid.kit_common import built
from grid.kit_runs import applied, stage_of
from grid.registry import resolve, table
from victims.batches import Batch
from victims.corpora import Reader, View, open_corpus, whole
from victims.draws import Draws
from victims.lab import ModelRef
from victims.models import Clip
from victims.recipe import Clock
from victims.training import Fit, Objective, PlainClip

BATCH = 64
WARM_UP = 2
MARGIN = 1.25


class Passes(NamedTuple):
    """Rows through the towers per row of the batch, in the order of the meter."""

    images_forward: float
    images_backward: float
    texts_forward: float
    texts_backward: float


@dataclass(frozen=True, slots=True)
class Step:
    """One step of an objective, in units of its twin's."""

    passes: Passes
    whole: float
    views: float
    seconds: float


Found = dict[str, list[Step]]


class Twin(Fit):
    """A fit whose every step is timed against a plain step on the same rows."""

    def __init__(
        self, found: Found, model: Clip, view: View, objective: Objective, *rest: Any, **more: Any
    ) -> None:
        self.found, plain = found, copy.deepcopy(model)
        super().__init__(model, view, objective, *rest, **more)
        alone = {**more, "checkpoints": None, "optimizer_state": None, "on_epoch": None}
        self.plain = Fit(plain, view, PlainClip(), *rest, **alone)
        self.pair: nn.Module = _Pair(plain, self.plain.objective)
        self.view_seconds, inner = 0.0, objective.views

        def views(batch: Batch, draws: Draws) -> Mapping[str, Tensor]:
            made: dict[str, Tensor] = {}
            self.view_seconds = timed(lambda: made.update(inner(batch, draws))).cpu
            return made

        if type(objective).views is not Objective.views:
            objective.views = views  # type: ignore[method-assign]

    def _train_step(self, module: nn.Module, index: int) -> None:
        self.plain.order, self.plain.step, self.plain.epoch = self.order, self.step, self.epoch
        self.plain._set_mode()
        before, number = astuple(self.model.meter), self.step

        def plain() -> None:
            self.plain._train_step(self.pair, index)

        def ours() -> None:
            super(Twin, self)._train_step(module, index)

        order = (plain, ours) if number % 2 else (ours, plain)
        seconds = {work: timed(work).cpu for work in order}
        if number < WARM_UP:
            return
        rows = self.recipe.batch_size
        spent = [(b - a) / rows for a, b in zip(before, astuple(self.model.meter), strict=True)]
        unit = seconds[plain]
        step = Step(Passes(*spent), seconds[ours] / unit, self.view_seconds / unit, seconds[ours])
        self.found[type(self.objective).__name__].append(step)


class _Pair(nn.Module):
    """What the loop calls: a model and its objective."""

    def __init__(self, model: Clip, objective: Objective) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        terms: dict[str, Tensor] = self.objective(self.model, batch, clock)
        return terms


def tower_shares(kit: Kit, rounds: int) -> dict[str, float]:
    """What a pass of one batch through a tower costs, in units of a plain step."""
    lab = kit.lab(store=kit.ready)
    model = lab.load(ModelRef(kit.victims()[0].key))
    pool = open_corpus(kit.ready, kit.corpus("suspect").key, Reader.TRAINING)
    fit = Fit(model, whole(pool), PlainClip(), recipe(epochs=1), runtime=kit.runtime)
    fit.order, pair = np.arange(BATCH), _Pair(model, fit.objective)
    batch = fit.loader(fit.order)
    fit._set_mode()

    def alone(encode: Callable[[], Tensor], *, backward: bool) -> Callable[[], Work]:
        def work() -> None:
            with torch.set_grad_enabled(backward):
                features_BD = encode()
            if backward:
                features_BD.sum().backward()  # type: ignore[no-untyped-call]
                for parameter in model.parameters():
                    parameter.grad = None

        return lambda: work

    def image() -> Tensor:
        return model.encode_image(batch.image)

    def text() -> Tensor:
        return model.encode_text(batch.tokens)

    found = interleaved(
        {
            "step": lambda: lambda: fit._train_step(pair, 0),
            "image_forward": alone(image, backward=False),
            "image_both": alone(image, backward=True),
            "text_forward": alone(text, backward=False),
            "text_both": alone(text, backward=True),
        },
        rounds,
    )
    return {name: ratio(seconds, found["step"]) for name, seconds in found.items()}


def explained(passes: Passes, views: float, shares: Mapping[str, float]) -> float:
    """The factor of the module's docstring."""
    factor = 1 + views
    factor += (passes.images_backward - 1) * shares["image_both"]
    factor += (passes.images_forward - passes.images_backward) * shares["image_forward"]
    factor += (passes.texts_backward - 1) * shares["text_both"]
    factor += (passes.texts_forward - passes.texts_backward) * shares["text_forward"]
    return factor


def trained() -> list[str]:
    """Every defense of the table that is no control."""
    return [n for n in table("defenses") if resolve("defenses", n).phase != Phase.CONTROL]


def steps_of(name: str, kit: Kit, epochs: int) -> Found:
    """The steps of all fits in a defense's plan, by the name of the objective."""
    defense = built(resolve("defenses", name))
    stage = replace(
        stage_of(defense, kit),
        recipes=Recipes(victim=recipe(epochs=epochs), repair=recipe(epochs=2 * epochs)),
    )
    found: Found = defaultdict(list)
    with patch("victims.lab.Fit", partial(Twin, found)):
        applied(defense, kit, stage)
    return {kind: steps for kind, steps in found.items() if kind != PlainClip.__name__}


def figures_of(name: str, kind: str, steps: Sequence[Step], shares: Mapping[str, float]) -> Figures:
    """Of each kind of step: samples per second, the factor, and what is left unexplained."""
    groups: dict[Passes, list[Step]] = defaultdict(list)
    for step in steps:
        groups[step.passes].append(step)
    figures: Figures = {}
    for passes, group in sorted(groups.items()):
        if len(group) < 3:
            continue
        title = f"{name}, {kind}" + (f", passes {_shown(passes)}" if len(groups) > 1 else "")
        factor = median(step.whole for step in group)
        due = explained(passes, median(step.views for step in group), shares)
        rate = BATCH / median(step.seconds for step in group)
        figures[f"{title}: samples/s"] = Figure(value=rate, unit="/s")
        figures[f"{title}: plain steps"] = Figure(value=factor, unit="x")
        figures[f"{title}: explained"] = Figure(value=due, unit="x")
        figures[f"{title}: / explained"] = Figure(value=factor / due, unit="x", at_most=MARGIN)
    return figures


def _shown(passes: Passes) -> str:
    return " ".join(f"{count:.2g}" for count in passes)


def main(*, quick: bool = False, names: Sequence[str] | None = None) -> Figures:
    """The figures of every defense that trains by an objective of its own."""
    epochs, rounds = (4, 10) if quick else (12, 60)
    figures: Figures = {}
    with ExitStack() as stack:
        stack.enter_context(one_thread())
        kit = Kit(Path(stack.enter_context(tempfile.TemporaryDirectory())))
        shares = tower_shares(kit, rounds)
        for tower, share in shares.items():
            if tower != "step":
                figures[f"{tower} of a plain step"] = Figure(value=share, unit="x")
        for name in names or trained():
            for kind, steps in steps_of(name, kit, epochs).items():
                figures |= figures_of(name, kind, steps, shares)
    return figures
