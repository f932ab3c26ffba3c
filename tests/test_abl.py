"""ABL: the held-up loss and its gradient by hand, who is isolated, what each stage trains on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from defenses.abl import (
    Abl,
    Bound,
    LocalAscentSpec,
    Over,
    UnlearningSpec,
    held_up,
    share_of,
)
from defenses.base import Defended, Need
from tests.labelled import RECIPES, case_of, lab_of, rows_of
from victims.draws import torch_rng
from victims.entropy_split import entropies
from victims.errors import UsageError
from victims.lab import DataRef, Lab, ModelRef
from victims.recipe import Augment, Recipe, Schedule
from victims.selection import Logits
from victims.store import Store
from victims.training import ObjectiveSpec

LOSSES = (0.1, 0.4, 0.6, 1.5)  # mean 0.65


def of_losses(bound: Bound, over: Over, gamma: float = 0.5) -> tuple[float, list[float]]:
    """The term, and its gradient for every row's loss."""
    loss_G = torch.tensor(LOSSES, dtype=torch.float64, requires_grad=True)
    term = held_up(loss_G, gamma, bound, over)
    (gradient_G,) = torch.autograd.grad(term, loss_G)
    return float(term.detach()), gradient_G.tolist()


def test_a_row_below_gamma_climbs_and_one_above_descends() -> None:
    term, gradient = of_losses(Bound.ASCENT, Over.ROW)
    assert term == pytest.approx((-0.1 - 0.4 + 0.6 + 1.5) / 4)
    assert gradient == pytest.approx([-0.25, -0.25, 0.25, 0.25])


@pytest.mark.parametrize(("gamma", "sign"), [(0.5, 1), (0.7, -1)])
def test_the_mean_of_a_batch_turns_all_of_its_rows(gamma: float, sign: int) -> None:
    term, gradient = of_losses(Bound.ASCENT, Over.BATCH, gamma)
    assert term == pytest.approx(sign * 0.65)
    assert gradient == pytest.approx([sign / 4] * 4)


def test_flooding_is_its_equation_and_turns_the_same_rows() -> None:
    term, gradient = of_losses(Bound.FLOODING, Over.ROW)
    assert term == pytest.approx(0.5 + (0.4 + 0.1 + 0.1 + 1.0) / 4)
    assert gradient == of_losses(Bound.ASCENT, Over.ROW)[1]
    term, gradient = of_losses(Bound.FLOODING, Over.BATCH, 0.7)
    assert term == pytest.approx(0.7 + 0.05)
    assert gradient == pytest.approx([-0.25] * 4)


def test_the_least_a_loss_can_be_held_at_is_gamma() -> None:
    """Steps on the loss itself settle around gamma, from both sides."""
    loss_G = torch.tensor([0.0, 2.0], requires_grad=True)
    for _ in range(200):
        (gradient_G,) = torch.autograd.grad(held_up(loss_G, 0.5, Bound.ASCENT, Over.ROW), loss_G)
        loss_G = (loss_G - 0.02 * gradient_G).detach().requires_grad_()
    assert loss_G.tolist() == pytest.approx([0.5, 0.5], abs=0.011)


def test_shares_of_the_victims_epochs() -> None:
    assert [share_of(s, 100) for s in (0.2, 0.6, 0.2)] == [20, 60, 20]
    assert [share_of(s, 6) for s in (0.2, 0.6, 0.25, 0.01)] == [1, 4, 2, 1]


# --- the plan

TENTH = Abl(isolation_rate=0.1)


class Watched:
    """A lab that notes what it is told to train."""

    def __init__(self, lab: Lab) -> None:
        self.lab, self.fits = lab, list[tuple[ObjectiveSpec, DataRef, Recipe, Any]]()
        self.models = list[ModelRef]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.lab, name)

    def train(
        self, spec: ObjectiveSpec, data: DataRef, recipe: Recipe, init: ModelRef | None = None
    ) -> ModelRef:
        self.fits.append((spec, data, recipe, init))
        self.models.append(self.lab.train(spec, data, recipe, init=init))
        return self.models[-1]


def applied(defense: Abl, store: Store) -> tuple[Watched, Defended]:
    lab = Watched(lab_of(store))
    return lab, defense.apply(lab, case_of(defense, lab.lab))  # type: ignore[arg-type]


def losses(lab: Watched, model: ModelRef) -> np.ndarray:
    data = rows_of(lab.lab.store, "suspect")
    return entropies(lab.lab.score(Logits(), data, model), lab.lab.labels(data))


def test_the_rows_of_lowest_loss_are_isolated(small_store: Store) -> None:
    lab, done = applied(TENTH, small_store)
    loss_N = losses(lab, lab.models[0])
    assert done.flagged is not None
    assert done.flagged.sum() == 25  # the floor of a tenth of 256
    assert loss_N[done.flagged].max() <= loss_N[~done.flagged].min()
    assert done.suspicion == pytest.approx(-loss_N, rel=1e-6)
    assert done.notes["isolated_loss"] == pytest.approx(loss_N[done.flagged].max())


def test_each_stage_goes_on_from_the_one_before(small_store: Store) -> None:
    lab, done = applied(TENTH, small_store)
    (spec, every, first, start), (plain, rest, second, isolating), last = lab.fits
    unlearning, isolated, third, tuned = last
    assert spec == LocalAscentSpec(
        gamma=0.5, bound=Bound.ASCENT, over=Over.ROW, augment=Augment.NONE
    )
    assert (start, len(every), len(rest)) == (None, 256, 231)
    assert plain == lab.lab.plain(RECIPES.victim)
    assert unlearning == UnlearningSpec(augment=Augment.NONE)
    # Of the victim's two epochs.
    assert [recipe.epochs for recipe in (first, second, third)] == [1, 1, 1]
    assert [recipe.schedule for recipe in (first, third)] == [Schedule.CONSTANT] * 2
    assert second == replace(RECIPES.victim, epochs=1)
    assert third.lr == 5e-4
    assert [isolating, tuned, done.model] == lab.models
    # 25 rows, again and again, fill a batch of 64.
    assert len(isolated) == 64
    assert done.flagged is not None
    assert set(lab.lab._view(isolated).rows.tolist()) == set(np.flatnonzero(done.flagged).tolist())


def test_unlearning_makes_the_isolated_rows_harder(small_store: Store) -> None:
    lab, done = applied(replace(TENTH, unlearn_lr=0.05, unlearn_share=1.0), small_store)
    harder = losses(lab, lab.models[2]) - losses(lab, lab.models[1])
    assert done.flagged is not None
    assert harder[done.flagged].min() > 0
    assert len(applied(replace(TENTH, unlearn_share=0.0), small_store)[0].fits) == 2


def test_it_never_sees_a_victim_or_clean_data() -> None:
    assert Abl().needed() == {Need.SUSPECT_DATA, Need.START}
    assert Abl().replaces_training()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"gamma": -0.1}, "gamma must be 0 or more"),
        ({"isolation_rate": 0.0}, "isolation_rate must be in"),
        ({"finetune_share": 0.0}, "finetune_share must be above 0"),
        ({"unlearn_lr": 0.0}, "unlearn_lr must be above 0"),
    ],
)
def test_what_cannot_be_meant_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Abl(**fields).check()


def test_one_row_at_least_is_isolated() -> None:
    assert Abl(isolation_rate=0.001)._count(256) == 1
    assert Abl()._count(50_000) == 500


def slow_held_up(losses: list[float], gamma: float) -> float:
    total = 0.0
    for loss in losses:
        total += loss if loss > gamma else -loss if loss < gamma else 0.0
    return total / len(losses)


def test_the_loss_is_its_loop() -> None:
    loss_G = 2 * torch.rand(50, generator=torch_rng(0), dtype=torch.float64)
    loss_G[3] = 0.5
    found: Tensor = held_up(loss_G, 0.5, Bound.ASCENT, Over.ROW)
    assert float(found) == pytest.approx(slow_held_up(loss_G.tolist(), 0.5))
