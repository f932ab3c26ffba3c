"""CGD: split the data by a clean judge and the suspicious model, relearn one part, unlearn another.

Idea: rows that are hard for a clean CLIP, or very easy for the model that saw them, are suspects;
    go on training on the rows that are neither, and push the suspects' captions away.
Reference: Xu, Yang, Dai, Tang, Zhang, "CLIP-Guided Backdoor Defense through Entropy-Based Poisoned
    Dataset Separation", ACM MM 2025, arXiv 2507.05113 (v2).
Symbols: a, b = entropies under judge and early model, X, Y = their ranks; D_c, D_p = the clean and
    the triggered split; sigma1, sigma2, alpha, beta, epsilon = the fields; T = ``temperature``.
Where: a, b -> `victims.caption_bank.entropies`; X, Y, D_c, D_p -> `victims.entropy_split.split`;
    L = L_re + alpha T^2 KL(judge || f) + beta mean log(p + epsilon) ->
    `victims.relearning.RelearnUnlearn.forward`, from the victim on all suspect rows.
Differences: published for classifiers. Here the label is the caption, and the classes are a bank of
    captions of the data (in the repair: those of the batch). What says nearly the same as the row's
    own caption is no class for it (``bank_dedup``, a cosine under the judge). The judge is the
    reference, at its own scale; the paper's has none (``rank_scale``, ``teacher_scale``). The early
    model is the victim, since a fine-tuned CLIP learns a backdoor late; ``early: retrain`` trains
    some as the paper does. AdamW, epochs and schedule are those of the repair recipe; a batch is
    ``batch_size`` rows, at most a quarter of the data, and the learning rate grows with it from the
    recipe's. The released code stops by test accuracy: ``stop: held_out`` looks at rows of D_c that
    are kept out (2 %, but at least 200 and at most a quarter), before each epoch, and does not go
    back to earlier weights. D_c is not balanced:
    classes are unknown, and ``balance: caption`` draws every nearest caption of the bank equally
    often, as many rows as D_c has. ``repair`` hands D_c to another defense with its defaults.
Cost: features of all rows under two models, then one view with gradient per row and epoch, at most
    ``steps_per_epoch`` batches of them; the judge's features of all rows stay in memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, ClassVar

import numpy as np
import torch

from defenses.base import (
    LR,
    Between,
    Case,
    Defended,
    Defense,
    Fidelity,
    Knob,
    Need,
    Phase,
    Recipes,
    Sizes,
    Space,
    clean_data_defense,
    require,
)
from victims.caption_bank import (
    Alike,
    Question,
    Sight,
    against_bank,
    against_batches,
    caption_groups,
    caption_numbers,
    draw_bank,
    entropies,
)
from victims.corpora import Rows
from victims.draws import derive, numpy_rng
from victims.entropy_split import Scale, Stop, split
from victims.errors import MethodFailure, UsageError
from victims.lab import DataRef, Lab, ModelRef
from victims.recipe import Recipe, Select, lr_factor
from victims.relearning import Bank, RelearnUnlearnSpec, Sides
from victims.selection import ImageFeatures, TextFeatures
from victims.training import PlainClipSpec
from victims.work import SEEN, TRAINED, Work, fitted

UNLEARN = "unlearn"


class Early(StrEnum):
    VICTIM = "victim"
    RETRAIN = "retrain"


class Negatives(StrEnum):
    BANK = "bank"
    BATCH = "batch"


class Balance(StrEnum):
    NONE = "none"
    CAPTION = "caption"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cgd(Defense):
    name: ClassVar[str] = "cgd"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "arXiv 2507.05113"
    phase: ClassVar[Phase] = Phase.FINETUNING
    needs: ClassVar[frozenset[Need]] = frozenset({Need.VICTIM, Need.SUSPECT_DATA, Need.REFERENCE})
    fidelity: ClassVar[Fidelity] = Fidelity.ADAPTED
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "released_scale": {"rank_scale": "1", "teacher_scale": "1"},
        "retrain": {"early": "retrain"},
        "relearn_only": {"alpha": 0.0, "beta": 0.0},
        "distil_only": {"beta": 0.0},
        "finetune": {"repair": "finetune"},
        "cleanclip": {"repair": "cleanclip"},
    }
    # To a model that has hardly been trained, all captions say the same.
    quick: ClassVar[Mapping[str, Any]] = {"bank_dedup": None}
    knob: ClassVar[Knob | None] = Knob(name="beta", values=(0.0, 0.0025, 0.025, 0.25))
    space: ClassVar[Space] = {
        "sigma1": Between(low=0.1, high=0.4),
        "sigma2": Between(low=0.01, high=0.1),
        "beta": Between(low=1e-3, high=1.0, log=True),
        "recipe.lr": LR,
    }

    sigma1: float = 0.2
    sigma2: float = 0.1
    alpha: float = 5e-4
    beta: float = 0.025
    temperature: float = 3.0
    epsilon: float = 1e-6
    rank_scale: Scale = Scale.MODEL
    teacher_scale: Scale = Scale.MODEL
    early: Early = Early.VICTIM
    early_epochs: int = 1
    early_runs: int = 3
    bank_size: int = 1000
    bank_dedup: float | None = 0.9
    rank_negatives: Negatives = Negatives.BANK
    repair_negatives: Negatives = Negatives.BATCH
    sides: Sides = Sides.IMAGE
    balance: Balance = Balance.NONE
    stop: Stop = Stop.NONE
    batch_size: int | None = 256
    steps_per_epoch: int = 200
    repair: str = UNLEARN

    def check(self) -> None:
        size, cosine = self.batch_size, self.bank_dedup
        require(
            self,
            sigma1=(0 <= self.sigma1 < 1, "in [0, 1)"),
            alpha=(self.alpha >= 0, "0 or more"),
            beta=(self.beta >= 0, "0 or more"),
            temperature=(self.temperature > 0, "above 0"),
            epsilon=(self.epsilon > 0, "above 0"),
            early_epochs=(self.early_epochs >= 1, "at least 1"),
            early_runs=(self.early_runs >= 1, "at least 1"),
            bank_size=(self.bank_size >= 1, "at least 1"),
            sigma2=(
                self._apart(),
                "in [0, 1) and at most sigma1: no row is relearned and unlearned",
            ),
            bank_dedup=(cosine is None or -1 <= cosine <= 1, "a cosine, or null"),
            batch_size=(size is None or size >= 2, "at least 2, or null"),
            steps_per_epoch=(self.steps_per_epoch >= 1, "at least 1"),
        )
        if self.sides == Sides.BOTH and self.repair_negatives == Negatives.BANK:
            raise UsageError(
                "sides: both rates a caption against pictures, and a bank holds captions alone."
                " Set repair_negatives: batch, or sides: image."
            )
        if self.repair != UNLEARN:
            clean_data_defense(self.repair, self.needed(), "repair")

    def _apart(self) -> bool:
        unlearns = self.alpha > 0 or self.beta > 0
        return 0 <= self.sigma2 < 1 and (self.sigma2 <= self.sigma1 or not unlearns)

    def needed(self) -> frozenset[Need]:
        return self.needs | ({Need.START} if self.early == Early.RETRAIN else set())

    def employs(self) -> Sequence[Defense]:
        # A name that nothing goes by is refused by `check`.
        with contextlib.suppress(UsageError):
            if self.repair != UNLEARN:
                return (clean_data_defense(self.repair, self.needed(), "repair"),)
        return ()

    def costs(self, recipes: Recipes, sizes: Sizes) -> Work:
        num_rows, recipe = sizes.suspect, self._recipe(recipes.repair, sizes.suspect)
        runs = 1 if self.early == Early.VICTIM else self.early_runs
        # The judge and every early model look at all pairs.
        found = SEEN * ((1 + runs) * num_rows)
        if self.early == Early.RETRAIN:
            found += fitted(replace(recipes.victim, epochs=self.early_epochs), num_rows) * runs
        if self.repair != UNLEARN:
            (other,) = self.employs()
            clean = round((1 - self.sigma1) ** 2 * num_rows)
            return found + other.costs(recipes, replace(sizes, clean=clean))
        row = TRAINED
        if self.repair_negatives == Negatives.BANK:
            row += Work(texts_trained=self.bank_size / recipe.batch_size)
        most_rows = self.steps_per_epoch * recipe.batch_size
        return found + fitted(recipe, num_rows, row, most_rows=most_rows)

    def apply(self, lab: Lab, case: Case) -> Defended:
        self.check()
        data = case.suspect_data
        recipe = self._recipe(case.recipes.repair, len(data))
        judge = _seen(lab, case.reference, data)
        early = [_seen(lab, model, data) for model in self._early_models(lab, case)]
        number_N = caption_numbers(lab.captions(data))
        alike = Alike(judge.text_ND, number_N, self.bank_dedup)
        bank = draw_bank(number_N, self.bank_size, numpy_rng(case.seed, "bank", data.key))

        def questions() -> Iterator[Question]:
            if self.rank_negatives == Negatives.BANK:
                return against_bank(len(data), bank)
            rng = numpy_rng(case.seed, "batches", data.key)
            return against_batches(len(data), recipe.batch_size, rng)

        ranked = judge._replace(scale=self.rank_scale.value_of(judge.scale))
        judge_N, left_out = entropies([ranked], alike, questions())
        if left_out == 1:
            raise MethodFailure(
                "cgd: under the judge every other caption says nearly the same as a row's own, at"
                f" bank_dedup {self.bank_dedup:g}: nothing is left to rank by. Raise bank_dedup."
            )
        early_N, _ = entropies(early, alike, questions())
        found = split(judge_N, early_N, self.sigma1, self.sigma2)
        if not found.clean_N.any():
            raise MethodFailure(f"cgd: no row is in the clean split at sigma1 {self.sigma1}")
        if self.repair == UNLEARN:
            columns = {"clean": found.clean_N, "triggered": found.triggered_N}
            done = self._unlearn(lab, case, recipe, judge, alike, bank, columns)
        else:
            clean = lab.subset(data, np.flatnonzero(found.clean_N))
            (other,) = self.employs()
            done = other.apply(lab, case.lend(other, clean))
        notes = {
            "num_clean": float(found.clean_N.sum()),
            "num_triggered": float(found.triggered_N.sum()),
            "bank_left_out": left_out,
        }
        scores = {"judge": found.judge_N, "early": 1 - found.early_N}
        return replace(
            done,
            flagged=found.triggered_N,
            suspicion=found.suspicion_N.astype(np.float32),
            sets={"not_clean": ~found.clean_N},
            scores={name: values.astype(np.float32) for name, values in scores.items()},
            notes={**done.notes, **notes},
        )

    def _early_models(self, lab: Lab, case: Case) -> list[ModelRef]:
        """The victim, or short trainings like its own with shuffles of their own."""
        if self.early == Early.VICTIM:
            return [case.victim]
        plan = replace(case.recipes.victim, epochs=self.early_epochs)
        seeds = [derive(case.seed, "early", run) for run in range(self.early_runs)]
        recipes = [replace(plan, seed=seed) for seed in seeds]
        data, start = case.suspect_data, case.start
        return [lab.train(PlainClipSpec(), data, recipe, init=start) for recipe in recipes]

    def _recipe(self, repair: Recipe, num_rows: int) -> Recipe:
        """The repair recipe at our batch size, its learning rate scaled in proportion."""
        if self.batch_size is None:
            return repair
        size = min(self.batch_size, max(2, num_rows // 4))
        factor, lr = size / repair.batch_size, repair.lr
        if isinstance(lr, Select):
            lr = replace(lr, rates=tuple(rate * factor for rate in lr.rates))
        else:
            lr *= factor
        return replace(repair, batch_size=size, lr=lr)

    def _unlearn(
        self,
        lab: Lab,
        case: Case,
        recipe: Recipe,
        judge: Sight,
        alike: Alike,
        bank: Rows,
        columns: Mapping[str, np.ndarray],
    ) -> Defended:
        """The repair by relearning and unlearning, with its notes."""
        data, clean = case.suspect_data, np.flatnonzero(columns["clean"])
        held_N = np.zeros(len(data), dtype=bool)
        if self.stop == Stop.HELD_OUT:
            rng = numpy_rng(case.seed, "stop", data.key)
            held_N[rng.choice(clean, Select().num_held_out(len(clean)), replace=False)] = True
        columns = {name: mask_N & ~held_N for name, mask_N in columns.items()}
        columns |= {"held": held_N, "number": alike.number_N}
        columns |= {"judge_image": judge.image_ND, "judge_text": judge.text_ND}
        if self.balance == Balance.CAPTION:
            columns["group"] = caption_groups(alike, bank)
        captions = lab.captions(data)
        by_bank = Bank(
            captions=tuple(captions[row] for row in bank),
            numbers=tuple(alike.number_N[bank].tolist()),
            text_MD=torch.from_numpy(judge.text_ND[bank]),
        )
        spec = RelearnUnlearnSpec(
            alpha=self.alpha,
            beta=self.beta,
            temperature=self.temperature,
            epsilon=self.epsilon,
            teacher_scale=self.teacher_scale.value_of(judge.scale),
            limit=self.bank_dedup,
            bank=by_bank if self.repair_negatives == Negatives.BANK else None,
            sides=self.sides,
            balanced=self.balance == Balance.CAPTION,
            most_rows=self.steps_per_epoch * recipe.batch_size,
            num_held=int(held_N.sum()),
        )
        data, held_out = lab.annotate(data, **columns), np.flatnonzero(columns["clean"])
        model = lab.train(spec, data, recipe, init=case.victim, held_out=held_out)
        notes = {"u": self.beta * _path(lab, model, recipe), "epochs": len(lab.curves(model))}
        return Defended(model, notes=notes)


def _seen(lab: Lab, model: ModelRef, data: DataRef) -> Sight:
    image_ND, text_ND = [lab.score(s, data, model) for s in (ImageFeatures(), TextFeatures())]
    return Sight(image_ND, text_ND, float(lab.load(model).scale.detach()))


def _path(lab: Lab, model: ModelRef, recipe: Recipe) -> float:
    """The learning rate summed over the steps of a fit: what unlearning goes by."""
    rate, steps = recipe.lr, [int(record["steps"]) for record in lab.curves(model)]
    if isinstance(rate, Select):
        rate = list(lab.ledger.choices.values())[-1]["chosen"]
    return rate * sum(lr_factor(recipe, step, steps[0]) for step in range(sum(steps)))
