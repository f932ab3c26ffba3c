"""UBT: overfit on weakly matching pairs to expose the poison, then forget its local tokens.

Idea: poisoned pairs match badly, so they are among the weakest pairs of the suspect data; sharpen
    the shortcut by overfitting on these, pick the rows that it pulls together most, and push
    pictures away from the few caption words on which their match hangs, and from nothing else.
Reference: S. Liang, K. Liu, Gong, J. Liang, Xun, Chang, Cao, "Unlearning Backdoor Threats:
    Enhancing Backdoor Defense in Multimodal Contrastive Learning via Local Token Unlearning",
    arXiv 2403.16257 (v1); K. Liu, S. Liang, J. Liang, Dai, Cao, "Efficient Backdoor Defense in
    Multimodal Contrastive Learning: A Token-Level Unlearning Method for Mitigating Threats",
    arXiv 2409.19526 (v2). No code is known.
Symbols: q = ``q``, D_low = the weak rows; n_s, n_u = ``n_s``, ``n_u``; D_u = the rows to forget;
    T_loc = the caption's local tokens; c = ``target_cosine``; beta = ``beta``.
Where: weak pairs -> `Unlearning._similar`; overfitting -> `victims.overfitting`; finding ->
    `Ubt._find`; tokens -> `victims.local_tokens`; L = L_u + beta L_mm(D_keep), L_u =
    mean (<I, T_loc> - c)^2, and the stop -> `victims.forgetting`.
Differences: no equation is public, so all of the above is our reading. Weak pairs are those that a
    clean model finds weak, as a poisoned one finds poison strong. ``overfit_loss: clip`` lets weak
    pairs be each other's negatives: poisons name the same target and push each other apart, so
    `outside` takes the negatives from the other rows. On one victim of the embedded world
    (badnet, 1 %), over three rates and 1 to 10 epochs, the AUROC of the poison inside D_low went
    from .75 to between .88 and .998 with `outside`; with `clip` it was .94 at best, after one
    epoch, and .04 to .15 after ten. That decided the default. ``forget: ascent`` is -L_mm on
    D_u, held below ``ascent_limit`` nats: a step of Adam does not depend on the length of a
    gradient, so clipping it would bound nothing. Rates are constant; `lr: select` holds rows of
    D_keep out, which were judged clean. With N rows D_low has at
    least 64 (or N / 4), n_s is at most half of D_low, n_u at most the poisoned subset, n_keep at
    most N / 4, and a step takes min(``batch``, n_u) rows of D_u and as many to keep, at most half
    of these.
Cost: one forward of the suspect data, 2 x 3 q N pairs with gradient to overfit, and per forgetting
    step two half batches with gradient and a forward of D_u.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

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
    require,
)
from victims.corpora import Rows
from victims.draws import numpy_rng
from victims.errors import UsageError
from victims.forgetting import Forget, LocalForgettingSpec
from victims.keys import content_key
from victims.lab import DataRef, Lab, ModelRef
from victims.local_tokens import LocalTokens, TokenSide, num_patches, telling_word
from victims.overfitting import (
    EarlyClipSpec,
    OutsideClipSpec,
    PairSimilarity,
    highest,
    mask_of,
    mean_cosines,
)
from victims.recipe import Recipe, Schedule
from victims.selection import TextFeatures
from victims.training import PlainClipSpec
from victims.work import SEEN, TRAINED, Work, fitted, rates_of

Values = npt.NDArray[np.float32]
TOKENS = 10  # of a caption, about


class SimilarityModel(StrEnum):
    """Whose similarity calls a pair weak; `victim_early` is the victim's training, cut short."""

    REFERENCE = "reference"
    VICTIM_EARLY = "victim_early"


class OverfitLoss(StrEnum):
    """Where the negatives of a weak pair come from: the other rows, or the other weak pairs."""

    OUTSIDE = "outside"
    CLIP = "clip"


class RankBy(StrEnum):
    """`gain` is the similarity after overfitting less that of the victim."""

    SIM = "sim"
    GAIN = "gain"


class Selection(StrEnum):
    """`random` forgets rows drawn from all suspect data: what forgetting does by itself."""

    LOW = "low"
    RANDOM = "random"


class KeepFrom(StrEnum):
    """Rows to keep: the suspect data's most similar ones, or drawn from the clean data."""

    SUSPECT = "suspect"
    CLEAN = "clean"


class UnlearnFrom(StrEnum):
    VICTIM = "victim"
    OVERFIT = "overfit"


@dataclass(frozen=True, slots=True, kw_only=True)
class Unlearning(Defense):
    """What forgets rows, however these were found."""

    similarity_model: SimilarityModel = SimilarityModel.REFERENCE
    early_epochs: int = 1
    n_u: int = 64
    token_side: TokenSide = TokenSide.TEXT
    token_mass: float = 0.5
    token_cap: float = 0.3
    forget: Forget = Forget.SQUARE
    ascent_limit: float = 10.0
    target_cosine: float = 0.0
    stop_margin: float = 0.05
    beta: float = 1.0
    n_keep: int = 1000
    keep_from: KeepFrom = KeepFrom.SUSPECT
    batch: int = 64
    max_steps: int = 500

    def needed(self) -> frozenset[Need]:
        early = self.similarity_model == SimilarityModel.VICTIM_EARLY
        needs = self.needs - {Need.REFERENCE} | {Need.START if early else Need.REFERENCE}
        return needs | ({Need.CLEAN_DATA} if self.keep_from == KeepFrom.CLEAN else set())

    def replaces_training(self) -> bool:
        return False

    def check(self) -> None:
        require(
            self,
            early_epochs=(self.early_epochs >= 1, "at least 1"),
            n_u=(self.n_u >= 0, "0 or more"),
            token_mass=(0 < self.token_mass <= 1, "above 0 and at most 1"),
            token_cap=(0 < self.token_cap <= 1, "above 0 and at most 1"),
            ascent_limit=(self.ascent_limit > 0, "above 0"),
            target_cosine=(-1 <= self.target_cosine <= 1, "a cosine, in -1..1"),
            stop_margin=(self.stop_margin >= 0, "0 or more"),
            beta=(self.beta >= 0, "0 or more"),
            n_keep=(self.n_keep >= 2, "at least 2"),
            batch=(self.batch >= 1, "at least 1"),
            max_steps=(self.max_steps >= 1, "at least 1"),
        )

    def _looking(self, recipes: Recipes, sizes: Sizes) -> Work:
        """What sim_0 of every suspect pair costs."""
        found = SEEN * sizes.suspect
        if self.similarity_model == SimilarityModel.VICTIM_EARLY:
            epochs = min(self.early_epochs, recipes.victim.epochs)
            found += fitted(replace(recipes.victim, epochs=epochs), sizes.suspect)
        return found

    def _forgetting(self, recipes: Recipes, sizes: Sizes, num_rows: int) -> Work:
        """What it costs to forget so many rows, if it never stops before ``max_steps``."""
        num_rows = min(num_rows, self.n_u)
        pool = sizes.suspect // 4 if self.keep_from == KeepFrom.SUSPECT else sizes.clean
        keep = min(self.n_keep, pool)
        batch = max(1, min(self.batch, num_rows or self.batch, keep // 2))
        step = TRAINED * (2 * batch if num_rows else batch) + SEEN * num_rows
        # Which tokens are local is found by leaving out one of them after the other.
        return step * (self.max_steps * rates_of(recipes.repair)) + Work(
            images=num_rows, texts=TOKENS * num_rows
        )

    def _similar(self, lab: Lab, case: Case) -> Values:
        """sim_0 of every suspect pair."""
        if self.similarity_model == SimilarityModel.REFERENCE:
            return lab.score(PairSimilarity(), case.suspect_data, case.reference)
        spec = EarlyClipSpec(epochs=self.early_epochs)
        early = lab.train(spec, case.suspect_data, case.recipes.victim, init=case.start)
        return lab.score(PairSimilarity(), case.suspect_data, early)

    def _keep(self, lab: Lab, case: Case, rows: Rows, similar_N: Values) -> DataRef:
        if self.keep_from == KeepFrom.CLEAN:
            clean = case.clean_data
            rng = numpy_rng(case.seed, "keep", clean.key)
            count = min(self.n_keep, len(clean))
            return lab.subset(clean, np.sort(rng.choice(len(clean), count, replace=False)))
        num_rows = len(similar_N)
        others_N = np.where(mask_of(rows, num_rows), -np.inf, similar_N)
        return lab.subset(case.suspect_data, highest(others_N, min(self.n_keep, num_rows // 4)))

    def _unlearn(
        self, lab: Lab, case: Case, rows: Rows, similar_N: Values, init: ModelRef
    ) -> Defended:
        """Forget the rows, starting from ``init``."""
        local = LocalTokens(side=self.token_side, mass=self.token_mass, cap=self.token_cap)
        data, keep = lab.subset(case.suspect_data, rows), self._keep(lab, case, rows, similar_N)
        pairs = lab.tensor(local, data, case.victim) if len(rows) else {}
        share = float(pairs.pop("share").mean()) if pairs else 0.0
        batch = min(self.batch, len(rows) or self.batch, len(keep) // 2)
        spec = LocalForgettingSpec(
            made_of=content_key("pairs", local, [data.key, case.victim.key]),
            pairs=pairs,
            batch=batch,
            forget=self.forget,
            ascent_limit=self.ascent_limit,
            target_cosine=self.target_cosine,
            stop_margin=self.stop_margin,
            beta=self.beta,
        )
        recipe = replace(
            case.recipes.repair,
            epochs=self.max_steps,
            batch_size=batch,
            schedule=Schedule.CONSTANT,
        )
        # All rows of this fit were judged clean: a rate may be chosen on any of them.
        model = lab.train(spec, keep, recipe, init=init, held_out=np.arange(len(keep)))
        curves = lab.curves(model)
        notes = {
            "stopped_at": float(len(curves)),
            "unlearned_rows": float(len(rows)),
            "kept_rows": float(len(keep)),
            "local_share": share,
        }
        if pairs and self.token_side == TokenSide.TEXT:
            tokenizer, captions = lab.load(case.victim).tokenizer, lab.captions(case.suspect_data)
            word, notes["telling_share"] = telling_word(
                tokenizer, captions, pairs["tokens"], rows.tolist()
            )
            lab.report(f"ubt: the word that is forgotten is {word!r}")
        if curves and pairs:
            notes["remembered_first"] = curves[0]["remembered"]
            notes["remembered_last"] = curves[-1]["remembered"]
        unlearned = mask_of(rows, len(similar_N))
        return Defended(
            model,
            flagged=unlearned,
            sets={"unlearned": unlearned},
            scores={"weak": -similar_N},
            notes=notes,
        )

    def _refuse_without_patches(self, lab: Lab, case: Case) -> None:
        if self.token_side == TokenSide.IMAGE:
            num_patches(lab.load(case.victim))


@dataclass(frozen=True, slots=True, kw_only=True)
class Ubt(Unlearning):
    name: ClassVar[str] = "ubt"
    version: ClassVar[int] = 3
    paper: ClassVar[str] = "arXiv 2403.16257, 2409.19526"
    phase: ClassVar[Phase] = Phase.FINETUNING
    needs: ClassVar[frozenset[Need]] = frozenset({Need.VICTIM, Need.SUSPECT_DATA, Need.REFERENCE})
    fidelity: ClassVar[Fidelity] = Fidelity.READING
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "clip_overfit": {"overfit_loss": "clip"},
        "by_victim": {"overfit_epochs": 0},
        "whole_caption": {"token_side": "none"},
        "random": {"selection": "random"},
        "no_reference": {"similarity_model": "victim_early"},
    }
    knob: ClassVar[Knob] = Knob(name="beta", values=(0.1, 0.3, 1.0, 3.0, 10.0))
    space: ClassVar[Space] = {
        "recipe.lr": LR,
        "beta": Between(low=0.1, high=10.0, log=True),
        "q": Between(low=0.003, high=0.1, log=True),
        "n_u": Between(low=8, high=512, log=True),
        "overfit_epochs": Between(low=0, high=10),
    }

    quick: ClassVar[Mapping[str, Any]] = {"max_steps": 20}

    q: float = 0.01
    overfit_epochs: int = 3
    overfit_lr: float = 1e-5
    overfit_batch: int = 64
    overfit_loss: OverfitLoss = OverfitLoss.OUTSIDE
    n_s: int = 500
    rank_by: RankBy = RankBy.SIM
    selection: Selection = Selection.LOW
    unlearn_from: UnlearnFrom = UnlearnFrom.VICTIM

    def check(self) -> None:
        Unlearning.check(self)
        require(
            self,
            q=(0 < self.q <= 0.5, "in (0, 0.5]"),
            overfit_epochs=(self.overfit_epochs >= 0, "0 or more"),
            overfit_batch=(self.overfit_batch >= 1, "at least 1"),
            overfit_lr=(self.overfit_lr > 0, "above 0"),
            n_s=(self.n_s >= 2, "at least 2"),
        )
        if not self.overfit_epochs and self.rank_by == RankBy.GAIN:
            raise UsageError("rank_by: gain needs overfit_epochs of at least 1: nothing is gained")

    def apply(self, lab: Lab, case: Case) -> Defended:
        self.check()
        self._refuse_without_patches(lab, case)
        similar_N, num_rows = self._similar(lab, case), len(case.suspect_data)
        if self.selection == Selection.RANDOM:
            rng = numpy_rng(case.seed, "random", case.suspect_data.key)
            rows = np.sort(rng.choice(num_rows, min(self.n_u, num_rows // 4), replace=False))
            return self._unlearn(lab, case, rows, similar_N, case.victim)
        low = np.sort(highest(-similar_N, self._num_low(num_rows)))
        overfitted = self._overfit(lab, case, low)
        weak = lab.subset(case.suspect_data, low)
        sharp_L = lab.score(PairSimilarity(), weak, overfitted)
        blunt_L = lab.score(PairSimilarity(), weak, case.victim)
        if self.rank_by == RankBy.GAIN:
            sharp_L = sharp_L - blunt_L
        suspicious, closeness_S = self._find(lab, case, low, sharp_L)
        subset = suspicious[closeness_S >= np.median(closeness_S)]
        rows = suspicious[highest(closeness_S, min(self.n_u, len(subset)))]
        from_victim = self.unlearn_from == UnlearnFrom.VICTIM
        init = case.victim if from_victim else overfitted
        done = self._unlearn(lab, case, np.sort(rows), similar_N, init)
        # What the stages say, the last one first; a row not looked at is below all that were.
        # How strongly weak pairs hold together, before and after overfitting, is told of these.
        sharpened_N, blunt_N = np.full((2, num_rows), np.nan, dtype=np.float32)
        sharpened_N[low], blunt_N[low] = sharp_L, blunt_L
        closest_N = np.full(num_rows, -2.0)
        closest_N[suspicious] = closeness_S
        suspicion_N = np.zeros(num_rows, dtype=np.float32)
        order_N = np.lexsort((-similar_N, np.nan_to_num(sharpened_N, nan=-2), closest_N))
        suspicion_N[order_N] = np.arange(num_rows)
        return replace(
            done,
            flagged=mask_of(subset, num_rows),
            suspicion=suspicion_N,
            sets={
                "low": mask_of(low, num_rows),
                "suspicious": mask_of(suspicious, num_rows),
                **done.sets,
            },
            scores={**done.scores, "blunt": blunt_N, "sharpened": sharpened_N},
            notes={**done.notes, "weak_rows": len(low), "suspicious_rows": len(suspicious)},
        )

    def _num_low(self, num_rows: int) -> int:
        return max(round(self.q * num_rows), min(64, num_rows // 4))

    def costs(self, recipes: Recipes, sizes: Sizes) -> Work:
        found = self._looking(recipes, sizes)
        if self.selection == Selection.RANDOM:
            return found + self._forgetting(recipes, sizes, sizes.suspect // 4)
        low = self._num_low(sizes.suspect)
        suspicious = min(self.n_s, low // 2)
        pairs = max(1, min(self.overfit_batch, low))
        each = 2 if self.overfit_loss == OverfitLoss.OUTSIDE else 1
        found += TRAINED * (self.overfit_epochs * each * (low // pairs) * pairs)
        found += SEEN * (2 * low) + Work(texts=suspicious)
        return found + self._forgetting(recipes, sizes, -(-suspicious // 2))

    def _overfit(self, lab: Lab, case: Case, low: Rows) -> ModelRef:
        """theta_o: the victim, overfitted on the weak pairs."""
        if not self.overfit_epochs:
            return case.victim
        pairs = min(self.overfit_batch, len(low))
        recipe: Recipe = replace(
            case.recipes.repair,
            epochs=self.overfit_epochs,
            batch_size=pairs,
            lr=self.overfit_lr,
            warmup_steps=0,
            schedule=Schedule.CONSTANT,
        )
        data = case.suspect_data
        if self.overfit_loss == OverfitLoss.CLIP:
            return lab.train(PlainClipSpec(), lab.subset(data, low), recipe, init=case.victim)
        others = np.setdiff1d(np.arange(len(data)), low)
        ordered = lab.subset(data, np.concatenate([low, others]))
        spec = OutsideClipSpec(weak=len(low), pairs=pairs)
        return lab.train(spec, ordered, replace(recipe, batch_size=2 * pairs), init=case.victim)

    def _find(
        self, lab: Lab, case: Case, low: Rows, sharp_L: Values
    ) -> tuple[Rows, npt.NDArray[np.float64]]:
        """The suspicious rows, and how close each one's caption is to the others'."""
        rows = np.sort(low[highest(sharp_L, min(self.n_s, len(low) // 2))])
        text_SD = lab.score(TextFeatures(), lab.subset(case.suspect_data, rows), case.victim)
        return rows, mean_cosines(text_SD)


@dataclass(frozen=True, slots=True, kw_only=True)
class UbtOracle(Unlearning):
    """The last stage with perfect detection: D_u is drawn from the poisoned rows."""

    name: ClassVar[str] = "ubt_oracle"
    version: ClassVar[int] = 2
    paper: ClassVar[str] = "control of arXiv 2403.16257"
    phase: ClassVar[Phase] = Phase.CONTROL
    needs: ClassVar[frozenset[Need]] = Ubt.needs | {Need.TRUTH}
    fidelity: ClassVar[Fidelity] = Fidelity.READING
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    quick: ClassVar[Mapping[str, Any]] = {"max_steps": 20}

    def costs(self, recipes: Recipes, sizes: Sizes) -> Work:
        return self._looking(recipes, sizes) + self._forgetting(recipes, sizes, self.n_u)

    def apply(self, lab: Lab, case: Case) -> Defended:
        self.check()
        self._refuse_without_patches(lab, case)
        poisoned = np.flatnonzero(case.truth.poisoned)
        rng = numpy_rng(case.seed, "oracle", case.suspect_data.key)
        rows = np.sort(rng.permutation(poisoned)[: self.n_u])
        return self._unlearn(lab, case, rows, self._similar(lab, case), case.victim)
