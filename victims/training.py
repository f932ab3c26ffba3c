"""The only training loop in the repository.

An `Objective` is the whole difference between one method and another: the loop calls it and knows
no loss. Every rank runs this code on its share of each global batch; every random number is
derived from (seed, purpose, epoch or step), so a fit that is killed and resumed from a mid-fit
checkpoint, or run on another number of ranks, sees the same rows and the same draws.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from victims.batches import Batch, Loader, Scan, Scorer, score_rows
from victims.checkpoints import (
    Checkpoints,
    load_moments,
    moments,
    part,
    read_state,
    set_moments,
    write_state,
)
from victims.compiled import COMPILED_KEEPS, compiled_tower
from victims.corpora import Rows, View
from victims.distributed import barrier, parallel, rank, share_batch_norm, world_size
from victims.draws import Draws, derive, numpy_rng, torch_rng
from victims.errors import GridError, MethodFailure
from victims.losses import clip_loss
from victims.models import Clip, Meter, device_seconds
from victims.recipe import (
    BatchNormMode,
    ClassifierRecipe,
    Clock,
    Optimizer,
    Precision,
    Recipe,
    Runtime,
    lr_factor,
)
from victims.recompute import Passes, recomputing_blocks


class Objective(nn.Module):
    """How one fit differs from plain CLIP. State that must survive a restart is a buffer.

    What `forward` leaves in ``watched`` joins the training curves and no loss.
    """

    watched: Mapping[str, Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.watched = {}

    def views(self, batch: Batch, draws: Draws) -> Mapping[str, Tensor]:
        """Extra tensors of a batch, made on the model's device; they arrive in ``batch.views``."""
        return {}

    def begin_epoch(
        self, model: Clip, scan: Scan, clock: Clock, rng: np.random.Generator
    ) -> Rows | None:
        """Rows to visit this epoch, in order. None visits all, shuffled; no rows end the fit.

        Draws that must not change the shuffle come from ``rng.spawn``.
        """
        return None

    def rows_per_epoch(self, num_rows: int) -> int:
        """How many rows `begin_epoch` visits, by which the schedule counts its steps."""
        return num_rows

    def pace(self, clock: Clock) -> Clock:
        """The clock by which the schedule goes, where it is not the fit's own."""
        return clock

    def trainable(self, model: Clip) -> Iterable[nn.Parameter]:
        """The parameters that move; all others are frozen for this fit."""
        return model.parameters()

    def forward(self, model: Clip, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        """Named loss terms, already weighted; the loop minimises their sum."""
        raise NotImplementedError


class ObjectiveSpec(Protocol):
    """A frozen dataclass of hyperparameters that builds its objective."""

    def build(self, model: Clip) -> Objective: ...


class PlainClip(Objective):
    """L_mm on un-augmented pairs: the loss of every victim."""

    def forward(self, model: Clip, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        image_BD, text_BD = model.encode_image(batch.image), model.encode_text(batch.tokens)
        return {"clip": clip_loss(image_BD, text_BD, model.scale)}


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainClipSpec:
    name: ClassVar[str] = "plain_clip"
    version: ClassVar[int] = 1

    def build(self, model: Clip) -> Objective:
        return PlainClip()


@dataclass(frozen=True, slots=True)
class FitReport:
    """What a fit leaves beside its weights: one record per epoch, and what it cost."""

    curves: list[dict[str, float]]
    cost: dict[str, float]


class _Step(nn.Module):
    """Model and objective as one module: what DistributedDataParallel must wrap."""

    def __init__(self, model: Clip, objective: Objective) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        terms: dict[str, Tensor] = self.objective(self.model, batch, clock)
        return terms


def optimizer_for(model: Clip, objective: Objective, recipe: Recipe) -> torch.optim.Optimizer:
    """Fused AdamW: no decay below two dimensions, a learning rate of its own for the text side.

    A classifier's recipe names its optimizer, and decays all parameters.
    """
    every = isinstance(recipe, ClassifierRecipe)
    idle, chosen = model.idle(), {id(p) for p in objective.trainable(model)}
    chosen -= {id(p) for name, p in model.named_parameters() if name in idle}
    text = model.text_tower()
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(id(parameter) in chosen)
        if id(parameter) not in chosen:
            continue
        ratio = recipe.text_lr_ratio if name in text else 1.0
        decay = recipe.weight_decay if every or parameter.ndim >= 2 else 0.0
        groups.setdefault((ratio, decay), []).append(parameter)
    own = [p for p in objective.parameters() if p.requires_grad]
    if own:
        groups.setdefault((1.0, 0.0), []).extend(own)
    if not groups:
        raise GridError("nothing to train: the objective's `trainable` yields no parameter")
    listed = [
        {"params": params, "weight_decay": decay, "ratio": ratio}
        for (ratio, decay), params in groups.items()
    ]
    if isinstance(recipe, ClassifierRecipe) and recipe.optimizer is Optimizer.SGD:
        return torch.optim.SGD(listed, lr=recipe.rate, momentum=recipe.momentum, fused=True)
    coupled = isinstance(recipe, ClassifierRecipe) and recipe.optimizer is Optimizer.ADAM
    adam = torch.optim.Adam if coupled else torch.optim.AdamW
    betas = (recipe.beta1, recipe.beta2)
    return adam(listed, lr=recipe.rate, betas=betas, eps=recipe.eps, fused=True)


class _Curve:
    """Sums of the loss terms over an epoch, kept on the device; finds the first bad step."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.bad: dict[str, Tensor] = {}

    def add(self, terms: Mapping[str, Tensor], step: int) -> None:
        for name, term in terms.items():
            value = term.detach()
            if name not in self.sums:
                self.sums[name], self.counts[name] = torch.zeros_like(value), 0
                self.bad[name] = torch.full_like(value, math.inf)
            self.sums[name] += value
            self.counts[name] += 1
            first = torch.where(torch.isfinite(value), math.inf, float(step))
            torch.minimum(self.bad[name], first, out=self.bad[name])

    def check(self) -> None:
        """Raise, naming the terms, when any has not been finite."""
        bad = {name: float(step) for name, step in self.bad.items()}
        broken = {name: int(step) for name, step in bad.items() if math.isfinite(step)}
        if broken:
            shown = ", ".join(f"{name} at step {step}" for name, step in sorted(broken.items()))
            fine = sorted(set(bad) - set(broken))
            raise MethodFailure(
                f"the loss is not finite: {shown}"
                + (f"; still finite: {', '.join(fine)}" if fine else "")
                + ". Lower the learning rate or the weight of the term."
            )

    def means(self) -> dict[str, float]:
        return {name: float(total) / self.counts[name] for name, total in self.sums.items()}

    def state(self) -> dict[str, list[float]]:
        return {n: [float(s), float(self.counts[n])] for n, s in self.sums.items()}

    def restore(self, state: Mapping[str, list[float]], device: torch.device) -> None:
        for name, (total, count) in state.items():
            self.sums[name] = torch.tensor(total, device=device)
            self.counts[name] = int(count)
            self.bad[name] = torch.tensor(math.inf, device=device)


def _seed_global(seed: int, device: torch.device) -> None:
    """Seed torch's global generators of the CPU and of ``device``.

    `torch.manual_seed` gives the same numbers but turns to every backend there could be, which
    costs a quarter of a millisecond: one percent of a step of the tiny model.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


# Steps between looks at whether the loss is finite: each look waits for a GPU to catch up.
CHECK_EVERY = 50


class Fit:
    """One run of the loop. Call it once; afterwards ``model`` is trained in place."""

    def __init__(
        self,
        model: Clip,
        view: View,
        objective: Objective,
        recipe: Recipe,
        *,
        runtime: Runtime,
        checkpoints: Checkpoints | None = None,
        optimizer_state: Path | None = None,
        on_epoch: Callable[[Mapping[str, float]], None] | None = None,
    ) -> None:
        if recipe.batch_size % world_size():
            raise GridError(
                f"batch_size {recipe.batch_size} does not divide among {world_size()} workers"
            )
        if (recipe.batch_size // world_size()) % recipe.parts and world_size() > 1:
            raise GridError(
                f"micro_batch {recipe.micro_batch} cuts a batch of {recipe.batch_size} into"
                f" {recipe.parts} parts, which do not divide among {world_size()} workers: a batch"
                " norm would see other rows than on one. Give a multiple of the number of workers"
                " that divides batch_size."
            )
        if recipe.compile and runtime.checkpoint_activations:
            raise GridError(f"compile: {COMPILED_KEEPS}")
        num_rows = objective.rows_per_epoch(len(view))
        self.steps_per_epoch = num_rows // recipe.batch_size
        if self.steps_per_epoch < 1:
            raise GridError(
                f"{num_rows} rows do not fill one batch of {recipe.batch_size}: give more rows"
                " or a smaller batch_size"
            )
        self.device = torch.device(runtime.device)
        self.model, self.view, self.recipe, self.runtime = model, view, recipe, runtime
        self.objective = objective.to(self.device)
        self.checkpoints, self.on_epoch = checkpoints, on_epoch
        # What went by while others looked at the model or torch compiled it: no part of the fit.
        self.away, self.wall_away = 0.0, 0.0
        self._left = (0.0, 0.0)
        model.to(self.device)
        self.optimizer = optimizer_for(model, objective, recipe)
        if optimizer_state is not None:
            load_moments(self.optimizer, model, optimizer_state)
        self.loader = Loader(view, model, self.device)
        self.step, self.epoch = 0, 0
        self.order: Rows | None = None
        self.curve, self.curves = _Curve(), list[dict[str, float]]()
        # Of the device, and as a person waits.
        self.seconds, self.wall_seconds = 0.0, 0.0

    def __call__(self) -> FitReport:
        passes, recipe = self.model.passes, self.recipe
        before = (passes.parts, passes.rows)
        passes.parts, passes.rows = recipe.parts, recipe.micro_batch or recipe.batch_size
        try:
            with contextlib.ExitStack() as around:
                if self.runtime.checkpoint_activations:
                    around.enter_context(recomputing_blocks(self.model, self.model.spec.arch))
                if recipe.compile:
                    tell = {"began": self._leave, "ended": self._return}
                    around.enter_context(compiled_tower(self.model, **tell))
                return self._run()
        finally:
            passes.parts, passes.rows = before
            self.loader.close()

    def _run(self) -> FitReport:
        saved = self.checkpoints.load() if self.checkpoints else None
        if saved is not None and (whole := read_state(saved)) is not None:
            self._restore(*whole)
        self._set_mode()
        module: nn.Module = _Step(self.model, self.objective)
        if world_size() > 1:
            share_batch_norm(self.model)
            module = parallel(module)
        started, begun = device_seconds(self.device), time.perf_counter()
        last_save, apart = begun, self.runtime.checkpoint_seconds
        before, waited = self.seconds, self.wall_seconds
        while self.epoch < self.recipe.epochs:
            self.loader.begin_epoch(self.epoch)
            if self.order is None:
                self.order = self._choose_rows()
            if not len(self.order):
                break
            num_steps = len(self.order) // self.recipe.batch_size
            for index in range(self._step_in_epoch, num_steps):
                self._train_step(module, index)
                if self.step % CHECK_EVERY == 0:
                    self.curve.check()
                due = time.perf_counter() - last_save > apart
                if self.checkpoints is not None and due and rank() == 0:
                    self.curve.check()
                    self._read_clocks(before - started, waited - begun)
                    saving_since = time.perf_counter()
                    self._save(index + 1)
                    last_save = time.perf_counter()
                    apart = self.runtime.until_next_save(last_save - saving_since)
            self.curve.check()
            self._end_epoch(num_steps)
        self._read_clocks(before - started, waited - begun)
        for parameter in self.model.parameters():
            parameter.requires_grad_(True)
        self.model.eval()
        barrier()
        meter = self.model.meter
        cost = {
            "train_seconds": self.seconds,
            "wall_seconds": self.wall_seconds,
            "steps": float(self.step),
            "images_forward": float(meter.images_forward * world_size()),
            "images_backward": float(meter.images_backward * world_size()),
            "texts_forward": float(meter.texts_forward * world_size()),
            "texts_backward": float(meter.texts_backward * world_size()),
        }
        return FitReport(self.curves, cost)

    def _read_clocks(self, since: float, wall_since: float) -> None:
        self.seconds = since + device_seconds(self.device) - self.away
        self.wall_seconds = wall_since + time.perf_counter() - self.wall_away

    _step_in_epoch = 0

    def _set_mode(self) -> None:
        self.model.train()
        self.objective.train()
        if self.recipe.bn_mode == BatchNormMode.EVAL:
            for module in self.model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()

    def _choose_rows(self) -> Rows:
        rng = numpy_rng(self.recipe.seed, "order", self.epoch)
        clock = Clock(self.epoch, self.step, self.total_steps)

        def score(scorer: Scorer, view: View) -> np.ndarray:
            values = score_rows(self.model, view, scorer)
            self._set_mode()
            return values

        scan = Scan(self.view, score)
        chosen = self.objective.begin_epoch(self.model, scan, clock, rng)
        if chosen is None:
            return rng.permutation(len(self.view))
        named, batch_size = type(self.objective).__name__, self.recipe.batch_size
        if not len(chosen):
            return chosen
        if len(chosen) < batch_size:
            raise MethodFailure(
                f"{named}: begin_epoch chose {len(chosen)} rows in epoch {self.epoch}, which do not"
                f" fill one batch of {batch_size}. Choose more rows, or None for all of them."
            )
        if chosen.min() < 0 or chosen.max() >= len(self.view):
            raise MethodFailure(
                f"{named}: begin_epoch chose the row {chosen.min()} or {chosen.max()};"
                f" rows lie in 0..{len(self.view) - 1}"
            )
        return chosen

    @property
    def total_steps(self) -> int:
        return self.recipe.epochs * self.steps_per_epoch

    def _factor(self, clock: Clock) -> float:
        """What the recipe's learning rate is multiplied with at a step."""
        paced = self.objective.pace(clock)
        return lr_factor(self.recipe, paced.step, paced.total_steps // self.recipe.epochs)

    def _train_step(self, module: nn.Module, index: int) -> None:
        assert self.order is not None
        recipe, share = self.recipe, self.recipe.batch_size // world_size()
        start = rank() * share
        first = index * recipe.batch_size + start
        batch = self.loader(self.order[first : first + share])
        following = first + recipe.batch_size
        if (index + 2) * recipe.batch_size <= len(self.order):
            self.loader.expect(self.order[following : following + share])
        # Code inside an objective may use torch's global generator: make it a function of the step.
        _seed_global(derive(recipe.seed, "global", self.step), self.device)
        if type(self.objective).views is not Objective.views:
            draws = Draws(
                torch_rng(recipe.seed, "views", self.step, device=self.device),
                recipe.batch_size,
                start,
                start + share,
            )
            with torch.no_grad():
                views = self.objective.views(batch, draws)
            batch = Batch(batch.rows, batch.image, batch.tokens, batch.texts, batch.columns, views)
        clock = Clock(self.epoch, self.step, self.total_steps)
        factor = self._factor(clock)
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.rate * group["ratio"] * factor
        with torch.autocast(
            self.device.type, torch.bfloat16, enabled=recipe.precision == Precision.BF16
        ):
            terms = module(batch, clock)
        loss = torch.stack(list(terms.values())).sum()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.model.clamp_scale()
        self.curve.add({**terms, **self.objective.watched}, self.step)
        self.step += 1

    def _end_epoch(self, num_steps: int) -> None:
        last = Clock(self.epoch, self.step - 1, self.total_steps)
        record = {
            "epoch": float(self.epoch),
            "steps": float(num_steps),
            "lr": self.recipe.rate * self._factor(last),
            "scale": float(self.model.scale.detach()),
            **self.curve.means(),
        }
        self.curves.append(record)
        if self.on_epoch is not None:
            self._show(record)
        self.curve, self.order, self._step_in_epoch = _Curve(), None, 0
        self.epoch += 1

    def _show(self, record: Mapping[str, float]) -> None:
        """Let others look at the model; what they run through it costs the fit nothing."""
        assert self.on_epoch is not None
        self._leave()
        own = self.model.meter, self.model.passes
        self.model.meter, self.model.passes = Meter(), Passes()
        self.on_epoch(record)
        self.model.meter, self.model.passes = own
        self._return()

    def _leave(self) -> None:
        self._left = (device_seconds(self.device), time.perf_counter())

    def _return(self) -> None:
        started, begun = self._left
        self.away += device_seconds(self.device) - started
        self.wall_away += time.perf_counter() - begun

    # --- mid-fit checkpoints: weights, moments, buffers, and where in which epoch

    def _save(self, step_in_epoch: int) -> None:
        assert self.checkpoints is not None
        tensors = {f"model.{n}": t for n, t in self.model.state_dict().items()}
        tensors |= {f"objective.{n}": t for n, t in self.objective.state_dict().items()}
        tensors |= moments(self.optimizer)
        tensors["order"] = torch.from_numpy(np.asarray(self.order))
        meter = self.model.meter
        position = {
            "epoch": self.epoch,
            "step": self.step,
            "step_in_epoch": step_in_epoch,
            "seconds": self.seconds,
            "wall_seconds": self.wall_seconds,
            "curves": self.curves,
            "curve": self.curve.state(),
            "meter": [
                meter.images_forward,
                meter.images_backward,
                meter.texts_forward,
                meter.texts_backward,
            ],
        }
        self.checkpoints.save(lambda p: write_state(p, position, tensors))

    def _restore(self, position: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self.model.load_state_dict(part(tensors, "model."))
        self.objective.load_state_dict(part(tensors, "objective."))
        set_moments(self.optimizer, tensors)
        self.order = tensors["order"].numpy()
        self.epoch, self.step = position["epoch"], position["step"]
        self._step_in_epoch = position["step_in_epoch"]
        self.seconds, self.wall_seconds = position["seconds"], position["wall_seconds"]
        self.curves = position["curves"]
        self.curve.restore(position["curve"], self.device)
        meter = self.model.meter
        (meter.images_forward, meter.images_backward, meter.texts_forward, meter.texts_backward) = (
            position["meter"]
        )
