"""TA-Cleaner (later CleanerCLIP): CleanCLIP, with finer captions for a few rows of each epoch.

Idea: an edit of some words hardly moves the text space. For rows drawn anew in every epoch, a
    caption that says less (positive) and one that says something else (negative) are aligned with
    the picture.
Reference: Xun, Liang, Jia, Liu, Cao, "TA-Cleaner: A Fine-grained Text Alignment Backdoor Defense
    Strategy for Multimodal Contrastive Learning", arXiv 2409.17601 v1, 2024; v3 is called
    "CleanerCLIP: Fine-grained Counterfactual Semantic Augmentation for Backdoor Defense in
    Contrastive Learning". No code is known.
Symbols: K = floor(``k_fraction`` N) rows an epoch, S: those of a batch; lambda = ``weight``; P, M:
    features of positives and negatives; I: those of the pictures as they are (``aligned``:
    augmented); s = the model's own scale; Z = ``denominator``.
Where: L_i2t = -mean_S log e^{s I_i.P_i} / Z_i -> `image_to_text`; L_t2i = -mean_S log
    e^{s P_i.I_i} / sum_batch e^{s P_i.I_j} -> `text_to_image`; L = L_CleanCLIP + lambda/2 (L_i2t +
    L_t2i) -> `SubTextAlignment.forward`, all three in
    `victims.sub_text_alignment`; sub-texts -> `victims.subtexts`.
Differences: the paper's equations, K, weights and parser are not known to us, all of them are our
    reading. ``denominator: subset`` contrasts with all positives and negatives of S, ``own`` with
    M_i alone, ``batch`` also with the batch's captions that differ from the row's own. ``sides:
    negative`` leaves L_t2i out and takes the caption for P_i. ``mode: replace`` drops chosen rows
    from the text half of L_ss. Our reading's parser is spaCy's small English model; the default is
    ``parser: wordnet``, which looks words up and needs no download (in WordNet where ``synonyms``
    names it, else in a list of ours); ``spacy`` gives spaCy's tags to the same rules;
    ``deletion`` is the ablation without
    grammar. A negative may name the attacker's target, and as often as the captions do:
    ``forbid_words`` would tell the defender what to spare, is for ablations, and is noted as oracle
    knowledge. A replaced attribute may still be true of the picture. Near K = N on few classes,
    equal positives of other rows become false negatives.
Cost: two views of each picture with gradient per clean pair and epoch, and 2 + 2 ``k_fraction``
    texts; the parse, once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from defenses.base import (
    EPOCHS,
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
from victims.augment import policy_from
from victims.errors import MethodFailure, UsageError
from victims.in_modal import InModalSpec, Side
from victims.lab import Lab
from victims.rewrite import EdaMode, eda_text, pinned_source
from victims.sub_text_alignment import (
    Aligned,
    Denominator,
    Mode,
    Sides,
    SubTextAlignmentSpec,
    count_of,
)
from victims.subtexts import (
    NegativeKind,
    NegativeText,
    Parser,
    PositiveText,
    parse,
    parser_digest,
)
from victims.work import TRAINED, Work, fitted


@dataclass(frozen=True, slots=True, kw_only=True)
class TaCleaner(Defense):
    name: ClassVar[str] = "ta_cleaner"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "arXiv 2409.17601"
    phase: ClassVar[Phase] = Phase.FINETUNING
    needs: ClassVar[frozenset[Need]] = frozenset({Need.VICTIM, Need.CLEAN_DATA})
    fidelity: ClassVar[Fidelity] = Fidelity.READING
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "positives": {"sides": "positive"},
        "negatives": {"sides": "negative"},
        "batch": {"denominator": "batch"},
        "replace": {"mode": "replace"},
        "deletion": {"parser": "deletion"},
    }
    knob: ClassVar[Knob] = Knob(name="k_fraction", values=(0.0, 0.01, 0.05, 0.1, 0.25, 1.0))
    space: ClassVar[Space] = {
        "recipe.lr": LR,
        "recipe.epochs": EPOCHS,
        "k_fraction": Between(low=0.01, high=0.5, log=True),
        "weight": Between(low=0.1, high=2.0, log=True),
        "inmodal_weight": Between(low=0.5, high=8.0, log=True),
    }

    k_fraction: float = 0.1
    weight: float = 1.0
    denominator: Denominator = Denominator.SUBSET
    mode: Mode = Mode.ADD
    sides: Sides = Sides.BOTH
    negative_kind: NegativeKind = NegativeKind.ANY
    parser: Parser = Parser.WORDNET
    aligned: Aligned = Aligned.PLAIN
    forbid_words: str = ""
    clip_weight: float = 1.0
    inmodal_weight: float = 1.0
    image_policy: str = "autoaugment"
    eda: EdaMode = EdaMode.STATIC
    synonyms: str = "lexicon"
    side: Side = Side.BOTH
    concat_views: bool = True

    def check(self) -> None:
        policy_from(self.image_policy)
        pinned_source(self.synonyms)
        parser_digest(self.parser, self.synonyms)
        require(
            self,
            k_fraction=(0 <= self.k_fraction <= 1, "in 0..1"),
            weight=(self.weight >= 0, "0 or more"),
        )
        if self.sides == Sides.POSITIVE:
            self._refuse(self.denominator == Denominator.OWN, "denominator: own", "no negative")
            self._refuse(self.negative_kind != NegativeKind.ANY, "negative_kind", "no negative")
            self._refuse(bool(self.forbid_words), "forbid_words", "no negative")
        if self.parser == Parser.DELETION:
            known = self.negative_kind != NegativeKind.ANY
            self._refuse(known, "negative_kind", "no part of speech")
        if self.side == Side.IMAGE:
            self._refuse(self.mode == Mode.REPLACE, "mode: replace", "no text term to replace")

    def _refuse(self, wrong: bool, what: str, lacks: str) -> None:
        if wrong:
            raise UsageError(
                f"ta_cleaner: {what} has no meaning where there is {lacks} (sides: {self.sides},"
                f" parser: {self.parser}, side: {self.side}). Leave it at its default."
            )

    def caution(self, rate: float, num_rows: int) -> str:
        if self.k_fraction <= 0.5:
            return ""
        return (
            f"with {self.k_fraction:g} of all rows chosen and few classes, positives that say the"
            " same of other rows become false negatives"
        )

    def costs(self, recipes: Recipes, sizes: Sizes) -> Work:
        finer = 2 if self.sides == Sides.BOTH else 1
        row = TRAINED * 2 + Work(texts_trained=finer * self.k_fraction)
        return fitted(recipes.repair, sizes.clean, row)

    def apply(self, lab: Lab, case: Case) -> Defended:
        recipe = case.recipes.repair
        base = InModalSpec(
            clip_weight=self.clip_weight,
            inmodal_weight=self.inmodal_weight,
            image_policy=self.image_policy,
            side=self.side,
            concat_views=self.concat_views,
        )
        data = lab.with_text(case.clean_data, eda=eda_text(self.eda, self.synonyms, recipe.seed))
        if not count_of(self.k_fraction, len(data)):
            return Defended(lab.train(base, data, recipe, init=case.victim))
        captions = lab.captions(data)
        kind = None if self.sides == Sides.POSITIVE else self.negative_kind
        parsed = parse(captions, self.parser, self.synonyms)
        eligible = parsed.eligible(kind, self.forbid_words)
        if not eligible.any():
            raise MethodFailure(
                f"ta_cleaner: none of {len(captions)} captions says more than a noun and has a"
                f" negative (negative_kind: {self.negative_kind}, parser: {self.parser})"
            )
        pin = parser_digest(self.parser, self.synonyms)
        texts: dict[str, PositiveText | NegativeText] = {
            "positive": PositiveText(
                parser=self.parser, source=self.synonyms, source_digest=pin, seed=recipe.seed
            ),
            "negative": NegativeText(
                parser=self.parser,
                source=self.synonyms,
                source_digest=pin,
                kind=self.negative_kind,
                forbidden=self.forbid_words,
                seed=recipe.seed,
            ),
        }
        spec = SubTextAlignmentSpec(
            base=base,
            num_rows=len(data),
            k_fraction=self.k_fraction,
            weight=self.weight,
            denominator=self.denominator,
            mode=self.mode,
            sides=self.sides,
            aligned=self.aligned,
        )
        # Equal captions by number: two rows that say the same are no contrast to each other.
        same = np.unique(np.array(captions), return_inverse=True)[1].astype(np.int64)
        data = lab.annotate(data, eligible=eligible, caption=same)
        data = lab.with_text(data, **{name: texts[name] for name in spec.texts})
        model = lab.train(spec, data, recipe, init=case.victim)
        curves = lab.curves(model)
        notes = {
            "eligible_share": float(eligible.mean()),
            "chosen_per_step": sum(one["chosen"] for one in curves) / len(curves),
            "oracle_knowledge": float(bool(self.forbid_words)),
        }
        return Defended(model, notes=notes)
