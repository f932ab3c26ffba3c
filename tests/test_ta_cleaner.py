"""TA-Cleaner against a reference written from its equations, and against CleanCLIP."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from defenses.base import Case, Defended, Need, Recipes
from defenses.cleanclip import CleanClip
from defenses.ta_cleaner import TaCleaner
from tests.test_losses import features, slow
from tests.test_training import IN_MODAL, Kept, run_fit, state, view_of
from victims.batches import Batch
from victims.corpora import TextView, View, annotate, with_text
from victims.errors import MethodFailure, UsageError
from victims.in_modal import Side
from victims.lab import Lab
from victims.losses import clip_loss
from victims.models import Clip, ModelSpec
from victims.recipe import Clock, Recipe, Runtime
from victims.store import Store
from victims.sub_text_alignment import (
    Aligned,
    Denominator,
    Mode,
    Sides,
    SubTextAlignment,
    SubTextAlignmentSpec,
    image_to_text,
)
from victims.subtexts import (
    NegativeKind,
    NegativeText,
    Parser,
    PositiveText,
    parse,
    parser_digest,
)
from victims.training import PlainClipSpec

SPEC = SubTextAlignmentSpec(
    base=IN_MODAL,
    num_rows=64,
    k_fraction=0.25,
    weight=0.7,
    denominator=Denominator.SUBSET,
    mode=Mode.ADD,
    sides=Sides.BOTH,
    aligned=Aligned.PLAIN,
)
RECIPE = Recipe(epochs=2, batch_size=16, lr=1e-2, warmup_steps=0, seed=4)
START = Clock(0, 0, 1)


def dressed(view: View) -> View:
    """The view with what the objective reads beside CleanCLIP's captions."""
    pin = parser_digest(Parser.WORDNET, "lexicon")
    shared: dict[str, Any] = {
        "parser": Parser.WORDNET,
        "source": "lexicon",
        "source_digest": pin,
        "seed": 0,
    }
    texts: dict[str, TextView] = {
        "positive": PositiveText(**shared),
        "negative": NegativeText(**shared, kind=NegativeKind.ANY, forbidden=""),
    }
    captions = view.captions()
    eligible = parse(captions, Parser.WORDNET, "lexicon").eligible(NegativeKind.ANY, "")
    same = np.unique(np.array(captions), return_inverse=True)[1].astype(np.int64)
    return with_text(annotate(view, {"eligible": eligible, "caption": same}), texts)


# --- the loss on given features


@dataclass
class Stub:
    """A model that answers with given features: I, I', T, T', then the chosen rows' P and M."""

    sides: Sequence[Tensor]
    subs: Sequence[Tensor]
    scale: Tensor
    passes: int = 0

    def encode_image(self, image_BCHW: Tensor) -> Tensor:
        return torch.cat(list(self.sides[:2]))

    def encode_text(self, tokens_BT: Tensor) -> Tensor:
        """The chosen rows are told by their tokens, whose first is the number of the row."""
        self.passes += 1
        if self.passes == 1:
            return torch.cat(list(self.sides[2:]))
        rows, kinds = tokens_BT[:, 0], tokens_BT[:, 1]
        return torch.stack([self.subs[k][r] for r, k in zip(rows, kinds, strict=True)])


def step(
    spec: SubTextAlignmentSpec,
    sides: Sequence[Tensor],
    subs: Sequence[Tensor],
    chosen: Sequence[int],
    caption: Sequence[int] | None = None,
    scale: float = 5.0,
) -> tuple[dict[str, Tensor], Stub]:
    num_rows = len(sides[0])
    rows = torch.arange(num_rows)
    names = ("positive", "negative")
    texts = {n: torch.stack([rows, torch.full_like(rows, k)], 1) for k, n in enumerate(names)}
    batch = Batch(
        rows=rows,
        image=torch.zeros(num_rows, 3, 32, 32, dtype=torch.uint8),
        tokens=torch.ones(num_rows, 4, dtype=torch.long),
        texts={"eda": torch.ones(num_rows, 6, dtype=torch.long), **texts},
        columns={"caption": rows if caption is None else torch.tensor(caption)},
        views={"image": torch.zeros(num_rows, 3, 32, 32)},
    )
    objective = SubTextAlignment(spec)
    objective.chosen_N[list(chosen)] = True
    stub = Stub(sides, subs, torch.tensor(scale, dtype=torch.float64))
    return objective(cast("Clip", stub), batch, START), stub


def reference(
    spec: SubTextAlignmentSpec,
    sides: Sequence[Tensor],
    subs: Sequence[Tensor],
    chosen: Sequence[int],
    caption: Sequence[int],
    s: float,
) -> dict[str, float]:
    """Both terms and the text half of L_ss, row by row."""
    image, view, text, eda = [side.tolist() for side in sides]
    positive, negative = [sub.tolist() for sub in subs]
    image = view if spec.aligned is Aligned.AUGMENTED else image

    def e(a: list[float], b: list[float]) -> float:
        return math.exp(s * sum(x * y for x, y in zip(a, b, strict=True)))

    to_text, to_image = 0.0, 0.0
    for i in chosen:
        own = e(image[i], text[i] if spec.sides is Sides.NEGATIVE else positive[i])
        z = own
        if spec.sides is not Sides.POSITIVE:
            rows = [i] if spec.denominator is Denominator.OWN else chosen
            z += sum(e(image[i], negative[j]) for j in rows)
        if spec.sides is not Sides.NEGATIVE and spec.denominator is not Denominator.OWN:
            z += sum(e(image[i], positive[j]) for j in chosen if j != i)
        if spec.denominator is Denominator.BATCH:
            others = [j for j in range(len(text)) if caption[j] != caption[i]]
            z += sum(e(image[i], text[j]) for j in others)
        to_text -= math.log(own / z) / len(chosen)
        all_images = sum(e(positive[i], image[j]) for j in range(len(image)))
        to_image -= math.log(e(positive[i], image[i]) / all_images) / len(chosen)
    found = {"sub_image": spec.weight * to_text / 2}
    if spec.sides is not Sides.NEGATIVE:
        found["sub_text"] = spec.weight * to_image / 2
    kept = [j for j in range(len(text)) if spec.mode is Mode.ADD or j not in chosen]
    inner = 0.0
    for i in kept:
        inner -= math.log(e(text[i], eda[i]) / sum(e(text[i], other) for other in eda))
    found["inmodal_text"] = spec.base.inmodal_weight * inner / 2 / max(1, len(kept))
    return found


@pytest.mark.parametrize("denominator", Denominator)
@pytest.mark.parametrize("sides", Sides)
@pytest.mark.parametrize("chosen", [[1, 2, 5], [4], list(range(7))])
def test_each_term_is_its_equation(
    denominator: Denominator, sides: Sides, chosen: list[int]
) -> None:
    four, subs = [features(n) for n in range(4)], [features(n) for n in (4, 5)]
    caption = [0, 1, 2, 0, 2, 1, 3]
    for mode in Mode:
        for aligned in Aligned:
            spec = replace(SPEC, denominator=denominator, sides=sides, mode=mode, aligned=aligned)
            found, _ = step(spec, four, subs, chosen, caption)
            expected = reference(spec, four, subs, chosen, caption, 5.0)
            shown = {name: float(found[name]) for name in expected}
            assert shown == pytest.approx(expected, rel=1e-9)
            assert set(found) == {"clip", "inmodal_image"} | set(expected)
            assert float(found["clip"]) == pytest.approx(slow("clip", four[0], four[2], 5.0))


def test_one_row_against_its_own_negative() -> None:
    """L_i2t = ln(1 + e^{s (I.M - I.P)}), and ln 2 where both are alike."""
    four, subs = [features(n) for n in range(4)], [features(n) for n in (4, 5)]
    spec = replace(SPEC, denominator=Denominator.OWN, weight=2.0)
    found, _ = step(spec, four, subs, [3])
    apart = float(four[0][3] @ (subs[1][3] - subs[0][3]))
    assert float(found["sub_image"]) == pytest.approx(math.log(1 + math.exp(5 * apart)))
    alike, _ = step(spec, four, [subs[0], subs[0]], [3])
    assert float(alike["sub_image"]) == pytest.approx(math.log(2))


def test_captions_as_positives_of_all_rows_add_the_clip_loss() -> None:
    four = [features(n) for n in range(4)]
    spec = replace(SPEC, sides=Sides.POSITIVE, weight=1.0, k_fraction=1.0)
    found, _ = step(spec, four, [four[2], features(5)], list(range(7)))
    added = found["sub_image"] + found["sub_text"]
    scale = torch.tensor(5.0, dtype=torch.float64)
    assert float(added) == pytest.approx(float(clip_loss(four[0], four[2], scale)), rel=1e-12)
    assert float(added) == pytest.approx(float(found["clip"]), rel=1e-12)


def test_gradient_reaches_all_that_is_aligned() -> None:
    """Nothing is detached: pictures, sub-texts, the batch's captions and the scale."""
    four = [features(n).requires_grad_() for n in range(4)]
    subs = [features(n).requires_grad_() for n in (4, 5)]
    found, stub = step(replace(SPEC, denominator=Denominator.BATCH), four, subs, [1, 2])
    stub.scale.requires_grad_()
    grads = torch.autograd.grad(found["sub_image"], [four[0], four[2], *subs])
    assert all(float(grad.abs().max()) > 1e-3 for grad in grads)
    for grad in grads[2:]:
        assert not grad[[0, 3, 4, 5, 6]].any(), "rows that are not chosen are not encoded"


@pytest.mark.parametrize("mode", Mode)
def test_without_chosen_rows_a_step_is_cleanclips(mode: Mode) -> None:
    plain = [features(n).requires_grad_() for n in range(4)]
    found, stub = step(replace(SPEC, mode=mode), plain, [features(4), features(5)], [])
    assert stub.passes == 1, "nothing more is encoded"
    assert float(found["sub_image"]) == float(found["sub_text"]) == 0
    total = torch.autograd.grad(torch.stack(list(found.values())).sum(), plain)
    other = [side.detach().clone().requires_grad_() for side in plain]
    base, _ = step(replace(SPEC, k_fraction=0.0), other, [], [])
    assert set(base) == {"clip", "inmodal_image", "inmodal_text"}
    wanted = torch.autograd.grad(torch.stack(list(base.values())).sum(), other)
    assert all(torch.equal(a, b) for a, b in zip(total, wanted, strict=True))


def test_all_rows_replaced_leave_no_text_term_and_no_gap() -> None:
    four, subs = [features(n) for n in range(4)], [features(n) for n in (4, 5)]
    found, _ = step(replace(SPEC, mode=Mode.REPLACE), four, subs, list(range(7)))
    assert float(found["inmodal_text"]) == 0
    assert all(bool(torch.isfinite(term)) for term in found.values())


def test_far_logits_stay_finite() -> None:
    """At s = 100 an exponential of a logit would overflow in single precision."""
    row = F.normalize(torch.ones(2, 4), dim=-1)
    others = torch.tensor([[100.0, -math.inf], [-math.inf, -math.inf]])
    loss = image_to_text(row, -row, others, torch.tensor(100.0))
    assert float(loss) == pytest.approx(100.0)


# --- whole fits


def data(store: Store, rows: int = 64) -> View:
    return dressed(view_of(store, rows))


def differing(first: dict[str, Tensor], second: dict[str, Tensor]) -> list[str]:
    return [
        name
        for name, tensor in first.items()
        if name.startswith("model.") and not torch.equal(tensor, second[name])
    ]


def test_no_rows_or_no_weight_is_cleanclip_bit_for_bit(small_store: Store) -> None:
    """Same shuffle, same draws, same sums: sub-texts have streams of their own."""
    view = data(small_store, 32)
    plain, base = run_fit(view_of(small_store, 32), IN_MODAL, RECIPE)
    none, first = run_fit(view, replace(SPEC, k_fraction=0.0), RECIPE)
    still, second = run_fit(view, replace(SPEC, weight=0.0), RECIPE)
    moved, _ = run_fit(view, SPEC, RECIPE)
    assert not differing(state(plain), state(none))
    assert not differing(state(plain), state(still))
    assert differing(state(plain), state(moved))
    assert base is not None
    assert first is not None
    assert second is not None
    assert first.curves == base.curves
    for name in ("images_backward", "texts_forward", "texts_backward", "steps"):
        assert first.cost[name] == base.cost[name]
    assert second.cost["texts_backward"] > base.cost["texts_backward"]


class Watched(SubTextAlignment):
    """TA-Cleaner that remembers which rows were chosen and what they read."""

    def __init__(self, spec: SubTextAlignmentSpec) -> None:
        super().__init__(spec)
        self.chosen: list[list[int]] = []
        self.negatives: list[dict[int, list[int]]] = []

    def forward(self, model: Clip, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        if clock.epoch == len(self.chosen):
            self.chosen.append(self.chosen_N.nonzero()[:, 0].tolist())
            self.negatives.append({})
        for row, tokens in zip(batch.rows.tolist(), batch.texts["negative"], strict=True):
            self.negatives[-1][row] = tokens[tokens != 0].tolist()
        return super().forward(model, batch, clock)


def test_each_epoch_chooses_its_own_share_of_the_eligible_rows(small_store: Store) -> None:
    view = data(small_store)
    eligible = set(np.flatnonzero(view.columns["eligible"]).tolist())
    assert 20 < len(eligible) < 60
    watched = Watched(replace(SPEC, k_fraction=0.29))
    _, report = run_fit(view, watched, replace(RECIPE, epochs=3))
    assert [len(rows) for rows in watched.chosen] == [18] * 3  # floor of 18.56
    assert all(set(rows) <= eligible for rows in watched.chosen)
    assert len({tuple(rows) for rows in watched.chosen}) == 3
    assert watched.negatives[0] != watched.negatives[1]
    assert report is not None
    # Pictures twice; captions twice and, for the chosen rows, two sub-texts.
    assert report.cost["images_backward"] == 3 * 2 * 64
    assert report.cost["texts_backward"] == 3 * (2 * 64 + 2 * 18)
    assert [curve["chosen"] for curve in report.curves] == [18 / 4] * 3


def test_more_than_there_are_is_all_of_them(small_store: Store) -> None:
    view = data(small_store)
    watched = Watched(replace(SPEC, k_fraction=1.0))
    run_fit(view, watched, replace(RECIPE, epochs=1, lr=0.0))
    assert watched.chosen == [np.flatnonzero(view.columns["eligible"]).tolist()]


@pytest.mark.parametrize("stop_at", [2, 6])
def test_killed_and_resumed_it_ends_at_the_same_weights(
    small_store: Store, tmp_path: Path, stop_at: int
) -> None:
    """In the middle of an epoch: the chosen rows are restored, not drawn again."""
    view, kept = data(small_store), Kept(tmp_path / "fit")
    whole, report = run_fit(view, SPEC, RECIPE)
    run_fit(view, SPEC, RECIPE, checkpoints=kept, stop_at=stop_at)
    again, resumed = run_fit(view, SPEC, RECIPE, checkpoints=kept)
    before, after = state(whole), state(again)
    assert before["objective.chosen_N"].sum() == 16
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert report is not None
    assert resumed is not None
    assert resumed.curves == report.curves


# --- the plan


def lab_and_case(store: Store, **fields: Any) -> tuple[Lab, Case]:
    lab = Lab(store, ModelSpec(), Runtime())
    clean = lab.put(view_of_clean(store))
    victim = lab.train(PlainClipSpec(), clean, replace(RECIPE, epochs=1))
    grants = {Need.VICTIM: lambda: victim, Need.CLEAN_DATA: lambda: clean}
    recipe = replace(RECIPE, epochs=1, **fields)
    return lab, Case("ta_cleaner", grants, (Recipes(victim=recipe, repair=recipe), 0))


def view_of_clean(store: Store) -> View:
    return replace(view_of(store, 32), texts={})


def test_the_plan_is_one_fit_whose_key_holds_every_option(small_store: Store) -> None:
    lab, case = lab_and_case(small_store)

    def apply(**fields: Any) -> Defended:
        return TaCleaner(**fields).apply(lab, case)

    first = apply()
    made = len(lab.ledger.made)
    assert apply().model == first.model
    assert len(lab.ledger.made) == made
    assert first.notes["chosen_per_step"] == 3 / 2
    assert first.notes["oracle_knowledge"] == 0
    forbidding = apply(forbid_words="circle disc")
    assert forbidding.notes["oracle_knowledge"] == 1
    others = [
        apply(k_fraction=0.2),
        apply(denominator=Denominator.BATCH),
        apply(mode=Mode.REPLACE),
        apply(sides=Sides.POSITIVE),
        apply(sides=Sides.NEGATIVE),
        apply(negative_kind=NegativeKind.NOUN),
        apply(parser=Parser.DELETION),
        apply(aligned=Aligned.AUGMENTED),
    ]
    keys = {done.model.key for done in (first, forbidding, *others)}
    assert len(keys) == 2 + len(others)


def test_no_rows_is_cleanclips_own_fit(small_store: Store) -> None:
    lab, case = lab_and_case(small_store, seed=12)
    clean = CleanClip(inmodal_weight=2.0).apply(lab, case)
    made = len(lab.ledger.made)
    for fraction in (0.0, 0.03):  # of 32 rows: none
        none = TaCleaner(k_fraction=fraction, inmodal_weight=2.0).apply(lab, case)
        assert none.model == clean.model
    assert len(lab.ledger.made) == made


def test_nearly_all_rows_come_with_a_caution() -> None:
    assert TaCleaner().caution(0.01, 5000) == ""
    assert "false negatives" in TaCleaner(k_fraction=1.0).caution(0.01, 5000)


def test_captions_without_what_is_asked_are_a_failure_of_the_method(small_store: Store) -> None:
    lab, case = lab_and_case(small_store)
    with pytest.raises(MethodFailure, match=r"none of 32 captions .*negative_kind: verb"):
        TaCleaner(negative_kind=NegativeKind.VERB).apply(lab, case)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"k_fraction": 1.5}, r"k_fraction must be in 0\.\.1, got 1\.5"),
        ({"weight": -1.0}, r"weight must be 0 or more, got -1\.0"),
        ({"sides": Sides.POSITIVE, "denominator": Denominator.OWN}, "denominator: own has no"),
        ({"sides": Sides.POSITIVE, "negative_kind": NegativeKind.NOUN}, "there is no negative"),
        ({"sides": Sides.POSITIVE, "forbid_words": "circle"}, "forbid_words has no meaning"),
        ({"parser": Parser.DELETION, "negative_kind": NegativeKind.NOUN}, "no part of speech"),
        ({"side": Side.IMAGE, "mode": Mode.REPLACE}, "no text term to replace"),
        ({"image_policy": "nonsense"}, "image policy"),
        ({"synonyms": "nonsense"}, "source of synonyms"),
    ],
)
def test_what_cannot_be_meant_is_refused(fields: dict[str, Any], message: str) -> None:
    TaCleaner().check()
    with pytest.raises(UsageError, match=message):
        TaCleaner(**fields).check()
