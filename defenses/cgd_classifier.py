"""CGD as published: a CLIP and an early model split a labelled set, the victim is repaired on it.

Idea: rows whose label is hard for a clean CLIP, or very easy for a model that has hardly been
    trained, are suspects; relearn the rows that are neither, and unlearn the suspects' labels under
    the judge's guidance.
Reference: Xu, Yang, Dai, Tang, Zhang, "CLIP-Guided Backdoor Defense through Entropy-Based Poisoned
    Dataset Separation", ACM MM 2025, arXiv 2507.05113 (v2).
Symbols: a, b = entropies under judge and early model, X, Y = their ranks; D_c, D_p = the clean and
    the triggered split; sigma1, sigma2, alpha, beta, epsilon = the fields; T = ``temperature``.
Where: a, b -> `entropies`; X, Y, D_c, D_p -> `victims.entropy_split.split`; balance ->
    `victims.class_relearning.balanced_copies`; L_re + alpha L_kd + beta L_un ->
    `victims.class_relearning.ClassRelearning.forward`, from the victim.
Differences: the paper's budgets are epochs of 50,000 rows: with less data give more of them, since
    unlearning goes by u = beta lr steps / (1 - momentum), which the cell's row notes (published:
    .5). The early models have the victim's architecture and seeds of their own, are trained with
    Adam at a constant rate, and are asked in eval mode, as the judge is, with one ``prompt`` per
    class. Cosines are rated without a scale (``rank_scale``) and taught without one, as released,
    which makes a teacher of hardly any opinion; ``teacher_scale`` gives it one. The released code
    stops by accuracy on the test set and goes back an epoch: ``stop: held_out`` looks at 2 % of D_c
    (at least 200 rows, at most a quarter) before each epoch, and does not go back. A last batch
    that is not full is left out of its epoch, as in every fit of the loop; a batch is at most the
    rows there are. ``repair`` hands D_c to a defense (NAME or NAME:VARIANT) and the grid's repair
    recipe, for which D_c is its clean data; without it no recipe of the grid plays a part.
Cost: ``early_runs`` short trainings, logits of all rows under the judge and under each, then one
    view with gradient per row and epoch, at most ``steps_per_epoch`` batches of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, ClassVar

import numpy as np

from defenses.base import (
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
    Track,
    clean_data_defense,
    require,
)
from victims.class_relearning import ClassRelearningSpec, balanced_copies
from victims.draws import derive, numpy_rng
from victims.entropy_split import Scale, Split, Stop, entropies, split
from victims.errors import MethodFailure, UsageError
from victims.lab import DataRef, Lab, ModelRef
from victims.measuring import text_head
from victims.recipe import Augment, ClassifierRecipe, Optimizer, Schedule, Select
from victims.selection import ImageFeatures, Logits
from victims.work import Work

UNLEARN = "unlearn"
FEWEST_CLEAN = 4  # of which rows can be held out


class Balance(StrEnum):
    NONE = "none"
    RESAMPLE = "resample"


@dataclass(frozen=True, slots=True, kw_only=True)
class CgdClassifier(Defense):
    name: ClassVar[str] = "cgd_classifier"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "arXiv 2507.05113"
    phase: ClassVar[Phase] = Phase.FINETUNING
    tracks: ClassVar[frozenset[Track]] = frozenset({Track.SUPERVISED})
    needs: ClassVar[frozenset[Need]] = frozenset({Need.VICTIM, Need.SUSPECT_DATA, Need.REFERENCE})
    fidelity: ClassVar[Fidelity] = Fidelity.EXACT
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # For 10,000 pictures of 32 px and a network of 80,000 weights.
        "small": {
            "sigma1": 0.1,
            "sigma2": 0.05,
            "lr": 0.05,
            "beta": 0.1,
            "epochs": 5,
            "early_lr": 2e-3,
            "early_batch_size": 64,
            "early_epochs": 3,
        },
        "confident_teacher": {"teacher_scale": "100"},
        "relearn_only": {"alpha": 0.0, "beta": 0.0},
        "finetune": {"repair": "finetune"},
    }
    quick: ClassVar[Mapping[str, Any]] = {
        "batch_size": 32,
        "epochs": 2,
        "early_epochs": 1,
        "early_runs": 2,
        "early_batch_size": 64,
        "balance": "none",
    }
    knob: ClassVar[Knob | None] = Knob(name="beta", values=(0.0, 0.0025, 0.025, 0.25))
    space: ClassVar[Space] = {
        "sigma1": Between(low=0.1, high=0.4),
        "sigma2": Between(low=0.01, high=0.1),
        "beta": Between(low=1e-3, high=1.0, log=True),
        "lr": Between(low=1e-3, high=0.1, log=True),
    }

    sigma1: float = 0.2
    sigma2: float = 0.1
    alpha: float = 5e-4
    beta: float = 0.025
    temperature: float = 3.0
    epsilon: float = 1e-6
    prompt: str = "a photo of a {}"
    rank_scale: Scale = Scale.ONE
    teacher_scale: Scale = Scale.ONE
    early_epochs: int = 5
    early_runs: int = 3
    early_batch_size: int = 256
    early_lr: float = 3e-4
    balance: Balance = Balance.RESAMPLE
    stop: Stop = Stop.NONE
    lr: float = 0.01
    momentum: float = 0.0
    weight_decay: float = 5e-4
    batch_size: int = 256
    epochs: int = 10
    steps_per_epoch: int = 200
    augment: Augment = Augment.NONE
    repair: str = UNLEARN

    def check(self) -> None:
        positive = ("early_epochs", "early_runs", "early_batch_size", "epochs", "steps_per_epoch")
        require(
            self,
            sigma1=(0 <= self.sigma1 < 1, "in [0, 1)"),
            sigma2=(
                self._apart(),
                "in [0, 1) and at most sigma1: no row is relearned and unlearned",
            ),
            alpha=(self.alpha >= 0, "0 or more"),
            beta=(self.beta >= 0, "0 or more"),
            temperature=(self.temperature > 0, "above 0"),
            epsilon=(self.epsilon > 0, "above 0"),
            prompt=(_takes_a_class(self.prompt), "a text with one {} for the class"),
            early_lr=(self.early_lr > 0, "above 0"),
            lr=(self.lr > 0, "above 0"),
            momentum=(0 <= self.momentum < 1, "in [0, 1)"),
            weight_decay=(self.weight_decay >= 0, "0 or more"),
            batch_size=(self.batch_size >= 2, "at least 2"),
            **{name: (getattr(self, name) >= 1, "at least 1") for name in positive},
        )
        if self.repair != UNLEARN:
            clean_data_defense(self.repair, self.needed(), "repair", Track.SUPERVISED)

    def _apart(self) -> bool:
        unlearns = self.alpha > 0 or self.beta > 0
        return 0 <= self.sigma2 < 1 and (self.sigma2 <= self.sigma1 or not unlearns)

    def fits_by_recipe(self) -> bool:
        return self.repair != UNLEARN

    def claims(self) -> Fidelity:
        return Fidelity.EXACT if self.repair == UNLEARN else Fidelity.ADAPTED

    def caution(self, rate: float, num_rows: int) -> str:
        # Balanced, the rows that are listed are a few more.
        steps = self.epochs * min(self.steps_per_epoch, num_rows // self.batch_size)
        u = self.beta * self.lr / (1 - self.momentum) * steps
        if self.repair != UNLEARN or u <= 1 or self.stop != Stop.NONE:
            return ""
        return f"u is about {u:.2g} (published: .5): so much unlearning wants stop: held_out"

    def employs(self) -> Sequence[Defense]:
        # A name that nothing goes by is refused by `check`.
        with contextlib.suppress(UsageError):
            if self.repair != UNLEARN:
                return (clean_data_defense(self.repair, self.needed(), "repair", Track.SUPERVISED),)
        return ()

    def costs(self, recipes: Recipes, sizes: Sizes) -> Work:
        num_rows = sizes.suspect
        early = self.early_runs * self.early_epochs * num_rows
        # The judge's passes count as if it were the victim's network.
        found = Work(images_trained=early, images=(1 + self.early_runs) * num_rows)
        if self.repair != UNLEARN:
            (other,) = self.employs()
            clean = round((1 - self.sigma1) ** 2 * num_rows)
            return found + other.costs(recipes, replace(sizes, clean=clean))
        most_rows = min(self.steps_per_epoch * self.batch_size, num_rows)
        return found + Work(images_trained=self.epochs * most_rows)

    def apply(self, lab: Lab, case: Case) -> Defended:
        self.check()
        data = case.suspect_data
        label_N = lab.labels(data)
        judge_NK, scale = self._judged(lab, case.reference, data)
        early = [lab.score(Logits(), data, model) for model in self._early_models(lab, case)]
        judge_N = entropies(judge_NK * self.rank_scale.value_of(scale), label_N)
        early_N = entropies(np.mean(early, axis=0), label_N)
        found = split(judge_N, early_N, self.sigma1, self.sigma2)
        if self.repair == UNLEARN:
            done = self._unlearn(lab, case, found, label_N, judge_NK, scale)
        else:
            (other,) = self.employs()
            clean = lab.subset(data, np.flatnonzero(found.clean_N))
            done = other.apply(lab, case.lend(other, clean))
        notes = {
            "num_clean": float(found.clean_N.sum()),
            "num_triggered": float(found.triggered_N.sum()),
            "judge_agrees": float((judge_NK.argmax(1) == label_N).mean()),
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

    def _judged(self, lab: Lab, judge: ModelRef, data: DataRef) -> tuple[np.ndarray, float]:
        """Cosines of all pictures and classes under the judge, and the scale that it learned."""
        model = lab.load(judge)
        device = model.mean_C.device
        head_KD = text_head(model, model.tokenizer, lab.classes(data), [self.prompt], device)
        image_ND = lab.score(ImageFeatures(), data, judge)
        return image_ND @ head_KD.cpu().numpy().T, float(model.scale.detach())

    def _early_models(self, lab: Lab, case: Case) -> list[ModelRef]:
        recipe = ClassifierRecipe(
            epochs=self.early_epochs,
            batch_size=min(self.early_batch_size, len(case.suspect_data)),
            lr=self.early_lr,
            optimizer=Optimizer.ADAM,
            schedule=Schedule.CONSTANT,
        )
        seeds = [derive(case.seed, "early", run) for run in range(self.early_runs)]
        recipes = [replace(recipe, seed=seed) for seed in seeds]
        return [lab.train(lab.plain(recipe), case.suspect_data, recipe) for recipe in recipes]

    def _unlearn(
        self,
        lab: Lab,
        case: Case,
        found: Split,
        label_N: np.ndarray,
        judge_NK: np.ndarray,
        scale: float,
    ) -> Defended:
        """The repair by relearning and unlearning, with its notes."""
        data, held_N = case.suspect_data, np.zeros(len(label_N), dtype=bool)
        if self.stop == Stop.HELD_OUT:
            clean = np.flatnonzero(found.clean_N)
            if len(clean) < FEWEST_CLEAN:
                raise MethodFailure(
                    f"cgd_classifier: stop: held_out needs {FEWEST_CLEAN} clean rows, there are"
                    f" {len(clean)}"
                )
            rng = numpy_rng(case.seed, "stop", data.key)
            held_N[rng.choice(clean, Select().num_held_out(len(clean)), replace=False)] = True
        clean_N = found.clean_N & ~held_N
        copies_N = clean_N.astype(np.int64)
        if self.balance == Balance.RESAMPLE:
            rng = numpy_rng(case.seed, "balance", data.key)
            copies_N = balanced_copies(label_N, clean_N, len(lab.classes(data)), rng)
        copies_N[~found.clean_N] = 1
        batch_size = min(self.batch_size, int(copies_N.sum()))
        spec = ClassRelearningSpec(
            alpha=self.alpha,
            beta=self.beta,
            temperature=self.temperature,
            epsilon=self.epsilon,
            teacher_scale=self.teacher_scale.value_of(scale),
            augment=self.augment,
            num_listed=int(copies_N.sum()),
            most_rows=self.steps_per_epoch * batch_size,
            num_held=int(held_N.sum()),
        )
        recipe = ClassifierRecipe(
            epochs=self.epochs,
            batch_size=batch_size,
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            schedule=Schedule.CONSTANT,
            seed=case.seed,
        )
        columns = {"clean": clean_N, "triggered": found.triggered_N, "held": held_N}
        columns |= {"copies": copies_N, "judge": judge_NK}
        model = lab.train(spec, lab.annotate(data, **columns), recipe, init=case.victim)
        curves = lab.curves(model)
        steps = sum(record["steps"] for record in curves)
        u = self.beta * self.lr / (1 - self.momentum) * steps
        return Defended(model, notes={"u": u, "epochs": len(curves)})


def _takes_a_class(prompt: str) -> bool:
    try:
        return prompt.count("{}") == 1 and prompt.format("x") == prompt.replace("{}", "x")
    except (KeyError, IndexError, ValueError):
        return False
