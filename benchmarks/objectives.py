"""A step of each defense's objective, against the plain step on the same batch: that of CLIP, or
the cross-entropy step of an image classifier for a defense of these.

Every plan of a defense that trains, and of the configurations in `VARIANTS`, is applied to the
victim of the contract kit's world. Each step of its fits is followed (or, every other time,
preceded) by a step of a plain twin on the same rows, under the same recipe. The factor that the
algorithm explains is what its passes through the towers cost:

    1 + sum over towers of (b - 1) x (forward and backward) + (f - b) x (forward alone) + views

with b the passes per row of the batch that take a gradient and f all passes, as the model's meter
counts them, and every cost in units of a plain step. The towers are timed on the plain model, one
batch of as many rows at a time (two views in one batch cost a small model less than two batches:
such steps stay below 1), the augmentation of `Objective.views` in the step itself. Views that pass
through the towers are explained by these passes and not by their seconds; what takes a gradient
there takes it for the pictures alone, through frozen weights, at that price. The rest (loss terms,
pools, masks, passes that no meter counts) must fit into the margin. A classifier has no text tower.
Steps that pass other numbers of rows are figures of their own; what an objective does between
epochs is no step. Ratios are of CPU seconds, step by step; their medians are shown. An objective
without a figure is an error; the plain ones, being the units, have none.
"""

from __future__ import annotations

import copy
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import astuple, dataclass, replace
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.common import Figure, Figures, Work, interleaved, one_thread, ratio, timed
from defenses.base import Defense, Phase, Recipes
from grid.decode import decode
from grid.kit_base import Kit
from grid.kit_runs import applied, stage_of
from grid.nodes import Where
from grid.registry import resolve, table
from victims.batches import Batch
from victims.corpora import Reader, View, open_corpus, whole
from victims.draws import Draws
from victims.lab import ModelRef
from victims.labels import CrossEntropy, plain
from victims.models import Clip, frozen_copy
from victims.pixels import unit
from victims.recipe import Clock, Recipe
from victims.training import Fit, Objective, PlainClip

UNITS = (PlainClip.__name__, CrossEntropy.__name__)
WARM_UP = 2
LEAST = 3  # steps of a figure
MARGIN = 1.25

Fields = Mapping[str, Any]

# Configurations whose objective or path no defense's default takes, by the name of their figures;
# one control's is its own, too.
VARIANTS: Mapping[str, tuple[str, Fields]] = {
    "abd, pgd": ("abd", {"patch_source": "pgd"}),
    "cgd, bank": ("cgd", {"repair_negatives": "bank"}),
    "cgd, both sides": ("cgd", {"sides": "both"}),
    "finetune, image": ("finetune", {"trainable": "image"}),
    "ubt, victim_early": (
        "ubt",
        {"similarity_model": "victim_early", "early_epochs": 12, "overfit_epochs": 0},
    ),
    "augment_only": ("augment_only", {}),
}
# What gives every fit enough steps in the kit's world. No mean cosine is below -1: UBT never stops.
# Half of the classes have a trigger below the median.
LONGER: Mapping[str, Fields] = {
    "ubt": {"overfit_epochs": 30, "target_cosine": -1.0, "stop_margin": 0.0},
    "abl": {"isolation_share": 1.0, "unlearn_share": 2.0},
    "neural_cleanse": {"limit": 0.0},
}


class Passes(NamedTuple):
    """Rows through the towers per row of the batch, in the order of the meter, and how many of the
    pictures with a gradient took it for their pixels alone."""

    images_forward: float
    images_backward: float
    texts_forward: float
    texts_backward: float
    pixels_backward: float = 0.0


@dataclass(frozen=True, slots=True)
class Step:
    """One step of an objective on so many rows, in units of its twin's."""

    rows: int
    passes: Passes
    whole: float
    views: float
    seconds: float


Found = dict[str, list[Step]]
Shares = Mapping[str, float]


def plain_objective(model: Clip, recipe: Recipe) -> Objective:
    return plain(model.spec, recipe).build(model)


class Twin(Fit):
    """A fit whose every step is timed against a plain step on the same rows."""

    def __init__(
        self, found: Found, model: Clip, view: View, objective: Objective, *rest: Any, **more: Any
    ) -> None:
        self.steps, twin = found.setdefault(type(objective).__name__, []), copy.deepcopy(model)
        super().__init__(model, view, objective, *rest, **more)
        alone = {**more, "checkpoints": None, "optimizer_state": None, "on_epoch": None}
        self.plain = Fit(twin, view, plain_objective(twin, rest[0]), *rest, **alone)
        self.pair: nn.Module = _Pair(twin, self.plain.objective)
        self.view_seconds, self.view_pixels, inner = 0.0, 0, objective.views

        def views(batch: Batch, draws: Draws) -> Mapping[str, Tensor]:
            made: dict[str, Tensor] = {}
            before = replace(model.meter)
            seconds = timed(lambda: made.update(inner(batch, draws))).cpu
            self.view_seconds = seconds if model.meter == before else 0.0
            self.view_pixels = model.meter.images_backward - before.images_backward
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
        passes = Passes(*spent)._replace(pixels_backward=self.view_pixels / rows)
        one = seconds[plain]
        step = Step(rows, passes, seconds[ours] / one, self.view_seconds / one, seconds[ours])
        self.steps.append(step)


class _Pair(nn.Module):
    """What the loop calls: a model and its objective."""

    def __init__(self, model: Clip, objective: Objective) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        terms: dict[str, Tensor] = self.objective(self.model, batch, clock)
        return terms


def tower_shares(kit: Kit, rounds: int, num_rows: int) -> Shares:
    """What a pass of a batch of so many rows through a tower costs, in units of a plain step."""
    lab = kit.lab(store=kit.ready)
    model = lab.load(ModelRef(kit.victims()[0].key))
    pool = open_corpus(kit.ready, kit.corpus("suspect").key, Reader.TRAINING)
    how = replace(kit.recipe(epochs=1), batch_size=num_rows)
    fit = Fit(model, whole(pool), plain_objective(model, how), how, runtime=kit.runtime)
    fit.order, pair = np.arange(num_rows), _Pair(model, fit.objective)
    batch, frozen = fit.loader(fit.order), frozen_copy(model)
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

    def pixels() -> None:
        image_BCHW = unit(batch.image).requires_grad_(True)
        torch.autograd.grad(frozen.encode_image(image_BCHW).sum(), image_BCHW)

    works = {
        "step": lambda: lambda: fit._train_step(pair, 0),
        "image_forward": alone(image, backward=False),
        "image_both": alone(image, backward=True),
        "image_pixels": lambda: pixels,
    }
    texts = {"text_forward": alone(text, backward=False), "text_both": alone(text, backward=True)}
    found = interleaved(works if kit.labelled else {**works, **texts}, rounds)
    shares = {name: ratio(seconds, found["step"]) for name, seconds in found.items()}
    return {**dict.fromkeys(texts, 0.0), **shares}


def explained(passes: Passes, views: float, shares: Shares) -> float:
    """The factor of the module's docstring."""
    factor = 1 + views
    factor += (passes.images_backward - passes.pixels_backward - 1) * shares["image_both"]
    factor += passes.pixels_backward * shares["image_pixels"]
    factor += (passes.images_forward - passes.images_backward) * shares["image_forward"]
    factor += (passes.texts_backward - 1) * shares["text_both"]
    factor += (passes.texts_forward - passes.texts_backward) * shares["text_forward"]
    return factor


@cache
def plans() -> Mapping[str, tuple[str, Fields]]:
    """What is measured, by the name of its figures: every defense of the table that is no control
    with its defaults, then the variants."""
    names = [n for n in table("defenses") if resolve("defenses", n).phase != Phase.CONTROL]
    return {**{name: (name, {}) for name in names}, **VARIANTS}


def applied_with(make_fit: Callable[..., Fit], title: str, kit: Kit, epochs: int) -> None:
    """Apply a plan, its fits made by ``make_fit``."""
    name, fields = plans()[title]
    cls = resolve("defenses", name)
    values = {**getattr(cls, "quick", {}), **LONGER.get(name, {}), **fields}
    defense: Defense = decode(cls, values, Where(path=title))
    kit = kit.suited(defense)
    stage = replace(
        stage_of(defense, kit),
        recipes=Recipes(victim=kit.recipe(epochs), repair=kit.recipe(2 * epochs)),
    )
    with patch("victims.lab.Fit", make_fit):
        applied(defense, kit, stage)


def steps_of(title: str, kit: Kit, epochs: int) -> Found:
    """The steps of all fits in a plan, by the name of the objective, which may have none."""
    found: Found = {}
    applied_with(partial(Twin, found), title, kit, epochs)
    return {kind: steps for kind, steps in found.items() if kind not in UNITS}


def figures_of(
    title: str, kind: str, steps: Sequence[Step], shares: Callable[[int], Shares]
) -> Figures:
    """Of each kind of step: samples per second, the factor, and what is left unexplained.

    ``shares`` are those of a batch of so many rows. Kinds of fewer steps than `LEAST` are left out,
    but not all of them.
    """
    groups: dict[tuple[int, Passes], list[Step]] = defaultdict(list)
    for step in steps:
        groups[step.rows, step.passes].append(step)
    figures: Figures = {}
    for (rows, passes), group in sorted(groups.items()):
        if len(group) < LEAST:
            continue
        name = f"{title}, {kind}"
        name += f", passes {_shown(passes)} of {rows} rows" if len(groups) > 1 else ""
        factor = median(step.whole for step in group)
        due = explained(passes, median(step.views for step in group), shares(rows))
        rate = rows / median(step.seconds for step in group)
        figures[f"{name}: samples/s"] = Figure(value=rate, unit="/s")
        figures[f"{name}: plain steps"] = Figure(value=factor, unit="x")
        figures[f"{name}: explained"] = Figure(value=due, unit="x")
        figures[f"{name}: / explained"] = Figure(value=factor / due, unit="x", at_most=MARGIN)
    if not figures:
        raise RuntimeError(
            f"{title}: the fits of {kind} made {len(steps)} steps after their first {WARM_UP},"
            f" never {LEAST} of a kind, which is no figure; set longer fits for the plan in LONGER"
        )
    return figures


def _shown(passes: Passes) -> str:
    return " ".join(f"{count:.2g}" for count in passes)


def main(
    *, quick: bool = False, titles: Sequence[str] | None = None, kit: Kit | None = None
) -> Figures:
    """The figures of every plan that trains by an objective of its own."""
    epochs, rounds = (4, 10) if quick else (12, 60)
    figures: Figures = {}
    with ExitStack() as stack:
        stack.enter_context(one_thread())
        world = kit or Kit(Path(stack.enter_context(tempfile.TemporaryDirectory())))

        @cache
        def shares(suited: Kit, rows: int) -> Shares:
            found = tower_shares(suited, rounds, rows)
            of = "a classifier's plain step" if suited.labelled else "a plain step"
            for tower, share in found.items():
                if tower != "step" and share:
                    name = f"{tower} of {of} on {rows} rows"
                    figures[name] = Figure(value=share, unit="x")
            return found

        for title in titles or plans():
            suited = world.suited(resolve("defenses", plans()[title][0]))
            for kind, steps in steps_of(title, world, epochs).items():
                figures |= figures_of(title, kind, steps, partial(shares, suited))
    return figures
