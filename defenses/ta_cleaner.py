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
    L_t2i) -> `SubTextAlignment.forward`; sub-texts -> `victims.subtexts`.
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

import math
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from enum import StrEnum
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

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
    Space,
    require,
)
from victims.augment import policy_from
from victims.batches import Batch, Scan, cat_tokens
from victims.corpora import Rows
from victims.distributed import gather
from victims.draws import Draws
from victims.errors import MethodFailure, UsageError
from victims.in_modal import InModalSpec, Side, encode_sides, in_modal_terms, in_modal_views
from victims.lab import Lab
from victims.losses import similarity
from victims.models import Clip
from victims.recipe import Clock
from victims.rewrite import EdaMode, eda_text, pinned_source
from victims.subtexts import (
    NegativeKind,
    NegativeText,
    Parser,
    PositiveText,
    parse,
    parser_digest,
)
from victims.training import Objective


class Denominator(StrEnum):
    SUBSET = "subset"
    OWN = "own"
    BATCH = "batch"


class Mode(StrEnum):
    ADD = "add"
    REPLACE = "replace"


class Sides(StrEnum):
    BOTH = "both"
    POSITIVE = "positive"
    NEGATIVE = "negative"


class Aligned(StrEnum):
    """Which picture the sub-texts are aligned with."""

    PLAIN = "plain"
    AUGMENTED = "augmented"


def image_to_text(image_SD: Tensor, positive_SD: Tensor, others_SM: Tensor, s: Tensor) -> Tensor:
    """L_i2t: row i must pick P_i over its other candidates, whose logits are given (-inf: none)."""
    own_S1 = s * (image_SD * positive_SD).sum(-1, keepdim=True)
    return (torch.cat([own_S1, others_SM], 1).logsumexp(1) - own_S1[:, 0]).mean()


def text_to_image(positive_SD: Tensor, image_GD: Tensor, own_S: Tensor, s: Tensor) -> Tensor:
    """L_t2i: P_i must pick its picture, in row ``own`` of the batch, among all of them."""
    return F.cross_entropy(similarity(positive_SD, image_GD, s), own_S)


def count_of(k_fraction: float, num_rows: int) -> int:
    """K = floor(k_fraction N), of the decimals as written: 0.29 of 100 rows is 29."""
    return int(Decimal(str(k_fraction)) * num_rows)


class SubTextAlignment(Objective):
    """The rows chosen for the epoch are a buffer: they survive a restart."""

    chosen_N: Tensor

    def __init__(self, spec: SubTextAlignmentSpec) -> None:
        super().__init__()
        self.spec = spec
        self.register_buffer("chosen_N", torch.zeros(spec.num_rows, dtype=torch.bool))

    def views(self, batch: Batch, draws: Draws) -> Mapping[str, Tensor]:
        return in_modal_views(self.spec.base, batch, draws)

    def begin_epoch(
        self, model: Clip, scan: Scan, clock: Clock, rng: np.random.Generator
    ) -> Rows | None:
        eligible = np.flatnonzero(scan.columns["eligible"])
        count = min(count_of(self.spec.k_fraction, len(scan)), len(eligible))
        rows = rng.spawn(1)[0].choice(eligible, count, replace=False)
        self.chosen_N.zero_()
        self.chosen_N[torch.from_numpy(rows).to(self.chosen_N.device)] = True
        return None

    def forward(self, model: Clip, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        spec, s = self.spec, model.scale
        seen = encode_sides(spec.base, model, batch)
        terms = in_modal_terms(spec.base, seen, s)
        if not spec.k_fraction:
            return terms
        mine_B = self.chosen_N[batch.rows]
        # Which rows of the global batch are chosen, and which captions are one and the same.
        marks_G2 = gather(torch.stack([mine_B.long(), batch.columns["caption"]], 1))
        chosen_G, caption_G = marks_G2[:, 0].bool(), marks_G2[:, 1]
        image_BD = seen.image_BD if spec.aligned == Aligned.PLAIN else seen.view_BD
        self.watched = {"chosen": chosen_G.sum().float()}
        named = ("sub_image",) if spec.sides == Sides.NEGATIVE else ("sub_image", "sub_text")
        if not chosen_G.any():
            return terms | {name: image_BD.new_zeros(()) for name in named}

        image_GD, text_GD = gather(image_BD), gather(seen.text_BD)
        if spec.mode == Mode.REPLACE:
            logit_GG = similarity(text_GD, gather(seen.eda_BD), s)
            terms["inmodal_text"] = spec.base.inmodal_weight / 2 * rows_loss(logit_GG, ~chosen_G)
        subs = {name: batch.texts[name][mine_B] for name in spec.texts}
        encoded = _encoded(model, subs, mine_B, seen.text_BD)
        image_SD = image_GD[chosen_G]
        positive_SD = encoded["positive"][chosen_G] if "positive" in encoded else text_GD[chosen_G]
        negative_SD = encoded["negative"][chosen_G] if "negative" in encoded else None
        others_SM = self._others(image_SD, positive_SD, negative_SD, s)
        if spec.denominator == Denominator.BATCH:
            same_SG = caption_G[chosen_G, None] == caption_G
            logit_SG = similarity(image_SD, text_GD, s).masked_fill(same_SG, -math.inf)
            others_SM = torch.cat([others_SM, logit_SG], 1)
        loss = image_to_text(image_SD, positive_SD, others_SM, s)
        terms["sub_image"] = spec.weight / 2 * loss
        if "sub_text" in named:
            loss = text_to_image(positive_SD, image_GD, chosen_G.nonzero()[:, 0], s)
            terms["sub_text"] = spec.weight / 2 * loss
        return terms

    def _others(
        self, image_SD: Tensor, positive_SD: Tensor, negative_SD: Tensor | None, s: Tensor
    ) -> Tensor:
        """s I_i.X for the sub-texts X of S that row i must not pick; -inf where there is none."""
        logits = [image_SD.new_zeros(len(image_SD), 0)]
        if negative_SD is not None:
            logit_SS = similarity(image_SD, negative_SD, s)
            own = self.spec.denominator == Denominator.OWN
            logits.append(logit_SS.diagonal()[:, None] if own else logit_SS)
        if self.spec.sides != Sides.NEGATIVE and self.spec.denominator != Denominator.OWN:
            diagonal_SS = torch.eye(len(image_SD), dtype=torch.bool, device=image_SD.device)
            logit_SS = similarity(image_SD, positive_SD, s)
            logits.append(logit_SS.masked_fill(diagonal_SS, -math.inf))
        return torch.cat(logits, 1)


def rows_loss(logit_GG: Tensor, kept_G: Tensor) -> Tensor:
    """CE of the kept rows with the diagonal as targets; 0 where no row is kept."""
    target_G = torch.arange(len(logit_GG), device=logit_GG.device)
    loss_G = F.cross_entropy(logit_GG, target_G, reduction="none")
    return (loss_G * kept_G).sum() / kept_G.sum().clamp(min=1)


def _encoded(
    model: Clip, tokens: Mapping[str, Tensor], mine_B: Tensor, text_BD: Tensor
) -> dict[str, Tensor]:
    """Features of the chosen rows' sub-texts at their rows of the global batch, GD.

    Every rank hands over a whole batch, 0 where a row has none, so that they can be gathered; and
    one that depends on its weights even without chosen rows, as the backward pass is gathered too.
    """
    found = dict.fromkeys(tokens, 0 * text_BD)
    if mine_B.any():
        rows_TU = list(tokens.values())
        joined = rows_TU[0] if len(rows_TU) == 1 else cat_tokens(*rows_TU)
        features = model.encode_text(joined).chunk(len(rows_TU))
        for name, part_SD in zip(tokens, features, strict=True):
            found[name] = found[name].index_put((mine_B,), part_SD)
    return {name: gather(feature_BD) for name, feature_BD in found.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class SubTextAlignmentSpec:
    name: ClassVar[str] = "sub_text_alignment"
    version: ClassVar[int] = 1

    base: InModalSpec
    num_rows: int
    k_fraction: float
    weight: float
    denominator: Denominator
    mode: Mode
    sides: Sides
    aligned: Aligned

    @property
    def texts(self) -> tuple[str, ...]:
        """The sub-texts that are aligned."""
        return ("positive", "negative") if self.sides == Sides.BOTH else (self.sides.value,)

    def build(self, model: Clip) -> Objective:
        return SubTextAlignment(self)


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
