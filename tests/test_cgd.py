"""CGD: entropies, terms and rows against slow references, and the plan on a small victim."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from defenses.base import Case, Defended, Need, Recipes
from defenses.cgd import Balance, Cgd, Early, Negatives
from defenses.finetune import Finetune
from grid.stages import CorpusStage, DefendStage, ModelStage
from tests.conftest import corpus_spec
from tests.test_losses import features
from tests.test_training import Kept, assert_same, run_fit, state
from victims.batches import Batch, Scan
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
    own_first,
)
from victims.corpora import Reader, View, annotate, corpus_key, open_corpus, subset, whole
from victims.draws import numpy_rng, torch_rng
from victims.entropy_split import Scale, Stop
from victims.errors import Forbidden, MethodFailure, UsageError
from victims.lab import DataRef, Lab, ModelRef, model_key
from victims.models import Clip, ModelSpec, fresh
from victims.recipe import Clock, Recipe, Runtime, Select
from victims.relearning import (
    Bank,
    RelearnUnlearnSpec,
    Sides,
    distill_term,
    mean_over,
    relearn_term,
    unlearn_term,
)
from victims.selection import ImageFeatures
from victims.store import Store
from victims.training import PlainClipSpec

MODEL, ROWS = ModelSpec(), 128
FIT = Recipe(epochs=1, batch_size=16, lr=2e-3, warmup_steps=1, seed=4)
SPEC = RelearnUnlearnSpec(
    alpha=0.5,
    beta=0.25,
    temperature=3.0,
    epsilon=1e-6,
    teacher_scale=20.0,
    limit=0.9,
    bank=None,
    sides=Sides.IMAGE,
    balanced=False,
    most_rows=10**6,
    num_held=0,
)


@cache
def young() -> Clip:
    """Where a model is asked for and not looked at."""
    return fresh(MODEL, 0)


def units(seed: int, rows: int, width: int = 4) -> np.ndarray:
    return features(seed, rows, width).numpy()


# --- how hard a caption is to find


@dataclass
class World:
    """Two models and a judge of captions on 14 rows, two of which share a caption."""

    sights: list[Sight]
    alike: Alike
    captions: list[str]


def world(limit: float | None = 0.6) -> World:
    captions = [f"caption {row % 13}" for row in range(14)]
    text = units(9, 14)
    text[13], text[5] = text[0], 0.8 * text[4] + 0.2 * text[5]
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    sights = [Sight(units(i, 14), units(i + 20, 14), 5.0 + 4 * i) for i in range(2)]
    return World(sights, Alike(text, caption_numbers(captions), limit), captions)


def slow_entropy(w: World, row: int, others: list[int]) -> float:
    """- log( e^own / (e^own + sum of e^other over captions that are not nearly the same) )."""

    def logit(other: int) -> float:
        each = [s.scale * float(s.image_ND[row] @ s.text_ND[other]) for s in w.sights]
        return sum(each) / len(each)

    total = math.exp(logit(row))
    for other in others:
        cosine = float(w.alike.text_ND[row] @ w.alike.text_ND[other])
        near = w.alike.limit is not None and cosine > w.alike.limit
        if w.captions[other] != w.captions[row] and not near:
            total += math.exp(logit(other))
    return math.log(total) - logit(row)


@pytest.mark.parametrize("limit", [0.6, 0.9, None])
def test_an_entropy_is_its_equation(limit: float | None) -> None:
    w, bank = world(limit), np.array([0, 3, 4, 5, 11])
    found, left_out = entropies(w.sights, w.alike, against_bank(14, bank))
    assert found == pytest.approx([slow_entropy(w, r, bank.tolist()) for r in range(14)], rel=1e-12)
    out = sum(bool(w.alike(np.array([r]), np.array([b]))[0, 0]) for r in range(14) for b in bank)
    assert left_out == pytest.approx(out / (14 * 5))
    # Its own caption counts once, also where the bank holds it or one that is equal.
    assert out >= 6


def test_near_captions_are_no_alternatives() -> None:
    w, bank = world(), np.arange(13)
    assert w.alike(np.array([5]), np.array([4]))[0, 0]
    before, _ = entropies(w.sights, w.alike, against_bank(14, bank))
    for sight in w.sights:
        sight.text_ND[4] = sight.image_ND[5]  # now row 5's picture would choose caption 4
    after, _ = entropies(w.sights, w.alike, against_bank(14, bank))
    assert after[5] == before[5]
    strict = replace(w.alike, limit=None)
    assert entropies(w.sights, strict, against_bank(14, bank))[0][5] > before[5] + 0.1


def test_equal_features_are_as_hard_as_there_are_captions() -> None:
    sight = Sight(np.ones((20, 1), np.float32), np.ones((20, 1), np.float32), 7.0)
    alike = Alike(sight.text_ND, np.arange(20), None)
    found, _ = entropies([sight], alike, against_bank(20, np.arange(10)))
    assert found[:10] == pytest.approx(math.log(10))
    assert found[10:] == pytest.approx(math.log(11))


def test_the_order_of_the_bank_does_not_matter() -> None:
    w, bank = world(), np.arange(1, 13)
    shuffled = numpy_rng(0).permutation(bank)
    one, other = (entropies(w.sights, w.alike, against_bank(14, b))[0] for b in (bank, shuffled))
    assert one == pytest.approx(other, rel=1e-12)


def test_batches_hold_every_row_once_and_are_equally_large() -> None:
    asked = list(against_batches(14, 4, numpy_rng(0)))
    assert sorted(row for q in asked for row in q.rows_B) == list(range(14))
    assert [len(q.others_M) for q in asked] == [4] * 4
    assert all(set(q.rows_B) <= set(q.others_M) for q in asked)
    w = world()
    found, _ = entropies(w.sights, w.alike, asked)
    for rows, others in asked:
        expected = [slow_entropy(w, row, others.tolist()) for row in rows]
        assert found[rows] == pytest.approx(expected, rel=1e-12)


def test_a_row_that_nobody_asks_for_has_no_entropy() -> None:
    w = world()
    found, _ = entropies(w.sights, w.alike, [Question(np.arange(3), np.arange(5))])
    assert np.isnan(found[3:]).all()


def test_a_bank_is_of_different_captions() -> None:
    number = np.array([3, 3, 0, 1, 0, 2, 3])
    assert sorted(number[draw_bank(number, 9, numpy_rng(0))]) == [0, 1, 2, 3]
    banks = {tuple(draw_bank(number, 2, numpy_rng(seed))) for seed in range(40)}
    assert all(len({number[row] for row in bank}) == 2 for bank in banks)
    assert len(banks) == 6


def test_groups_are_the_nearest_captions_that_differ() -> None:
    w, bank = world(), np.array([4, 5, 8, 2])
    cosine = [[float(a @ b) for b in w.alike.text_ND] for a in w.alike.text_ND]
    kept: list[int] = []
    for row in bank.tolist():
        if all(cosine[row][other] <= 0.6 for other in kept):
            kept.append(row)
    assert 5 not in kept
    assert len(kept) > 1
    found = caption_groups(w.alike, bank)
    for row in range(14):
        cosines = [cosine[row][k] for k in kept]
        assert found[row] == cosines.index(max(cosines))


# --- the terms


@dataclass
class Stub:
    """A model that answers with given features; every forward of text beside the batch's is that
    of the bank."""

    image: Tensor
    text: Tensor
    scale: Tensor
    bank: Tensor | None = None

    def encode_image(self, image_BCHW: Tensor) -> Tensor:
        assert len(image_BCHW) == len(self.image), "all rows of a batch in one forward pass"
        return self.image

    def encode_text(self, tokens_BT: Tensor) -> Tensor:
        if len(tokens_BT) == len(self.text):
            return self.text
        assert self.bank is not None
        return self.bank


CLEAN = torch.tensor([1, 1, 0, 1, 0, 0, 1, 0, 0, 1]).bool()
TRIGGERED = torch.tensor([0, 0, 1, 0, 1, 1, 0, 0, 0, 0]).bool()
NUMBERS = torch.tensor([0, 1, 2, 3, 2, 5, 6, 7, 8, 5])


class Setting:
    """Ten rows: judge and student, a clean and a triggered part, two pairs of equal captions and
    one pair of near ones; and a bank of four captions, one of them equal to a row's."""

    def __init__(self) -> None:
        self.image, self.text = features(0, 10).requires_grad_(), features(1, 10).requires_grad_()
        judge_text = features(3, 10)
        judge_text[4], judge_text[9] = judge_text[2], judge_text[5]
        judge_text[8] = torch.nn.functional.normalize(judge_text[5] + 0.1 * judge_text[8], dim=0)
        self.columns = {
            "clean": CLEAN,
            "triggered": TRIGGERED,
            "held": torch.zeros(10).bool(),
            "number": NUMBERS,
            "judge_image": features(2, 10),
            "judge_text": judge_text,
        }
        judge_bank = features(5, 4)
        judge_bank[0] = judge_text[2]
        self.bank = Bank(captions=tuple("abcd"), numbers=(2, 30, 31, 32), text_MD=judge_bank)
        self.bank_text = features(4, 4).requires_grad_()
        self.scale = torch.tensor(9.0, dtype=torch.float64, requires_grad=True)

    def terms(self, spec: RelearnUnlearnSpec) -> dict[str, Tensor]:
        batch = Batch(
            rows=torch.arange(10),
            image=torch.zeros(10, 3, 32, 32, dtype=torch.uint8),
            tokens=torch.ones(10, 4, dtype=torch.long),
            columns=self.columns,
        )
        stub = Stub(self.image, self.text, self.scale, self.bank_text)
        objective = spec.build(young())
        found: dict[str, Tensor] = objective(cast("Clip", stub), batch, Clock(0, 0, 1))
        return found

    def slow(self, spec: RelearnUnlearnSpec) -> dict[str, float]:
        s = float(self.scale.detach())
        image, text = self.image.detach().numpy(), self.text.detach().numpy()
        judge_image, judge_text = (
            self.columns[f"judge_{side}"].numpy() for side in ("image", "text")
        )
        clean, triggered = (np.flatnonzero(self.columns[n]) for n in ("clean", "triggered"))
        relearn = 0.0
        for i in clean:
            for a, b in ((image, text), (text, image)):
                total = sum(math.exp(s * float(a[i] @ b[j])) for j in clean)
                relearn += (math.log(total) - s * float(a[i] @ b[i])) / (2 * len(clean))
        distill = unlearn = 0.0
        numbers = self.columns["number"].tolist()
        for i in triggered:
            ways = []
            for side in (0, 1) if spec.sides == Sides.BOTH else (0,):
                student = [(s, (image, text)[side][i], (text, image)[side][i])]
                judge = [(spec.teacher_scale, (judge_image, judge_text)[side][i])]
                judge_own = (judge_text, judge_image)[side][i]
                seen = [s * float(student[0][1] @ student[0][2])]
                taught = [spec.teacher_scale * float(judge[0][1] @ judge_own)]
                if spec.bank is None:
                    others = [
                        (
                            numbers[j],
                            judge_text[j],
                            (text, image)[side][j],
                            (judge_text, judge_image)[side][j],
                        )
                        for j in range(10)
                    ]
                else:
                    bank = spec.bank.text_MD.numpy()
                    student_bank = self.bank_text.detach().numpy()
                    others = [
                        (n, bank[m], student_bank[m], bank[m])
                        for m, n in enumerate(spec.bank.numbers)
                    ]
                for number, said, feature, judged in others:
                    near = spec.limit is not None and float(judge_text[i] @ said) > spec.limit
                    if number != numbers[i] and not near:
                        seen.append(s * float(student[0][1] @ feature))
                        taught.append(spec.teacher_scale * float(judge[0][1] @ judged))
                ways.append((seen, taught))
            for seen, taught in ways:
                p = math.exp(seen[0]) / sum(map(math.exp, seen))
                unlearn += math.log(p + spec.epsilon) / len(triggered) / len(ways)
                t = spec.temperature
                p_t = [math.exp(x / t) / sum(math.exp(y / t) for y in seen) for x in seen]
                q_t = [math.exp(x / t) / sum(math.exp(y / t) for y in taught) for x in taught]
                kl = sum(q * math.log(q / p) for q, p in zip(q_t, p_t, strict=True))
                distill += t * t * kl / len(triggered) / len(ways)
        return {"relearn": relearn, "distill": spec.alpha * distill, "unlearn": spec.beta * unlearn}


@pytest.mark.parametrize("limit", [0.9, None])
@pytest.mark.parametrize("kind", ["image", "both", "bank"])
def test_each_term_is_its_equation(kind: str, limit: float | None) -> None:
    setting = Setting()
    spec = replace(SPEC, limit=limit, sides=Sides.BOTH if kind == "both" else Sides.IMAGE)
    spec = replace(spec, bank=setting.bank if kind == "bank" else None)
    found = {name: float(term.detach()) for name, term in setting.terms(spec).items()}
    assert found == pytest.approx(setting.slow(spec), rel=1e-9)


def test_weights_are_factors() -> None:
    setting = Setting()
    one, other = setting.terms(SPEC), setting.terms(replace(SPEC, alpha=1.0, beta=0.5))
    ratios = {name: float((other[name] / one[name]).detach()) for name in one}
    assert ratios == pytest.approx({"relearn": 1, "distill": 2, "unlearn": 2})


@pytest.mark.parametrize("missing", ["clean", "triggered", "both"])
def test_a_term_without_rows_is_zero_and_so_is_its_gradient(missing: str) -> None:
    setting = Setting()
    names = ["clean", "triggered"] if missing == "both" else [missing]
    for name in names:
        setting.columns[name] = torch.zeros(10).bool()
    terms = setting.terms(SPEC)
    empty = {"clean": ["relearn"], "triggered": ["distill", "unlearn"]}
    for name in (term for part in names for term in empty[part]):
        assert float(terms[name].detach()) == 0
        for grad in torch.autograd.grad(
            terms[name], [setting.image, setting.text], retain_graph=True, allow_unused=True
        ):
            assert grad is None or not grad.any()
    torch.stack(list(terms.values())).sum().backward()  # type: ignore[no-untyped-call]
    assert setting.image.grad is not None
    assert bool(setting.image.grad.isfinite().all())
    assert setting.image.grad.any() == (missing != "both")


def test_gradients_reach_what_they_should() -> None:
    """Relearning moves the clean rows alone. Unlearning and guidance move pictures of triggered
    rows, and captions of all rows that are alternatives to them; none of the rows they are like."""
    setting = Setting()
    terms = setting.terms(SPEC)
    image, text = torch.autograd.grad(
        terms["relearn"], [setting.image, setting.text], retain_graph=True
    )
    assert torch.equal(image.any(1), CLEAN)
    assert torch.equal(text.any(1), CLEAN)
    for name in ("distill", "unlearn"):
        image, text = torch.autograd.grad(
            terms[name], [setting.image, setting.text], retain_graph=True
        )
        assert torch.equal(image.any(1), TRIGGERED)
        assert bool(image.isfinite().all() and text.isfinite().all())
        assert bool(text.any(1).all())
    # With row 5 alone: its caption is that of row 9, and nearly that of row 8.
    setting.columns["triggered"] = torch.arange(10) == 5
    for spec, alone in ((SPEC, [8, 9]), (replace(SPEC, limit=None), [9])):
        term = setting.terms(spec)
        (text,) = torch.autograd.grad(term["unlearn"] + term["distill"], [setting.text])
        assert np.flatnonzero(~text.any(1)).tolist() == alone


def test_the_scale_learns_from_every_term_and_the_bank_from_two() -> None:
    setting = Setting()
    for term in setting.terms(replace(SPEC, bank=setting.bank)).values():
        (grad,) = torch.autograd.grad(term, [setting.scale], retain_graph=True)
        assert float(grad.abs()) > 1e-4
    terms = setting.terms(replace(SPEC, bank=setting.bank))
    for name in ("distill", "unlearn"):
        (grad,) = torch.autograd.grad(terms[name], [setting.bank_text], retain_graph=True)
        assert bool(grad.any(1).all())


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch_rng(seed, "logits"), dtype=torch.float64)


def test_guidance_is_nothing_where_the_student_agrees() -> None:
    judge = drawn(0, 6, 5)
    assert distill_term(judge, judge + drawn(1, 6, 1), 3.0).abs().max() < 1e-12
    assert distill_term(judge, judge.flip(1), 3.0).min() > 1e-3


def test_unlearning_is_bounded() -> None:
    low = torch.tensor([[-1e4, 0.0, 0.0]], dtype=torch.float64)
    assert float(unlearn_term(low, 1e-6)) == pytest.approx(-13.8155, abs=1e-4)
    assert unlearn_term(10 * drawn(0, 50, 7), 1e-6).min() >= -13.82
    uniform = unlearn_term(torch.zeros(3, 8, dtype=torch.float64), 1e-6)
    assert uniform.tolist() == pytest.approx([math.log(1 / 8 + 1e-6)] * 3)
    # What is left out makes the set smaller.
    out = torch.tensor([[True, False, True, False]])
    seen = own_first(torch.zeros(1), torch.zeros(1, 4), out)
    assert float(unlearn_term(seen, 0.0)) == pytest.approx(math.log(1 / 3))


def test_relearning_hand_values() -> None:
    matched = torch.eye(6, dtype=torch.float64)
    found = relearn_term(matched, matched, 3.0, torch.arange(6) < 4)
    assert float(found) == pytest.approx(math.log(1 + 3 * math.exp(-3.0)))
    assert float(mean_over(torch.tensor([2.0, 5.0, 9.0]), torch.tensor([True, False, True]))) == 5.5


# --- the rows of an epoch


def view(store: Store, rows: int = 64, **columns: np.ndarray) -> View:
    corpus = open_corpus(store, corpus_key(corpus_spec("suspect")), Reader.TRAINING)
    some = subset(whole(corpus), np.arange(rows))
    rng = numpy_rng(0, "columns")
    mask = {"clean": np.arange(rows) % 3 > 0, "triggered": np.arange(rows) % 6 == 0}
    mask["held"] = np.zeros(rows, dtype=bool)
    mask = {n: m & ~columns.get("held", mask["held"]) for n, m in mask.items()}
    judged = {
        f"judge_{side}": rng.normal(size=(rows, 8)).astype(np.float32) for side in ("image", "text")
    }
    for side in judged.values():
        side /= np.linalg.norm(side, axis=1, keepdims=True)
    number = {"number": caption_numbers(some.captions())}
    return annotate(some, {**mask, **judged, **number, **columns})


def chosen(data: View, spec: RelearnUnlearnSpec, epoch: int = 0) -> np.ndarray:
    objective = spec.build(young())
    scan = Scan(data, lambda scorer, view: np.zeros(len(view)))
    clock, rng = Clock(epoch, 0, 1), numpy_rng(0, "order", epoch)
    found = objective.begin_epoch(young(), scan, clock, rng)
    assert found is not None
    return found


def test_an_epoch_is_every_row_once(small_store: Store) -> None:
    data = view(small_store)
    assert sorted(chosen(data, SPEC)) == list(range(64))
    assert not np.array_equal(chosen(data, SPEC), chosen(data, SPEC, 1))
    few = chosen(data, replace(SPEC, most_rows=10))
    assert np.array_equal(few, chosen(data, SPEC)[:10])


def test_balance_draws_every_group_equally_often(small_store: Store) -> None:
    group = (np.arange(64) > 5).astype(np.int64) + 3  # six rows of one group, 58 of another
    data = view(small_store, group=group)
    spec, clean = replace(SPEC, balanced=True), data.columns["clean"]
    counts = np.zeros(2)
    for epoch in range(60):
        rows = chosen(data, spec, epoch)
        assert len(rows) == 64
        assert sorted(rows[~clean[rows]]) == np.flatnonzero(~clean).tolist()
        for which in (0, 1):
            counts[which] += (clean[rows] & (group[rows] == 3 + which)).sum()
    assert counts[0] / counts.sum() == pytest.approx(0.5, abs=0.03)


def test_all_clean_without_weights_is_fine_tuning(small_store: Store) -> None:
    data = view(small_store, clean=np.ones(64, dtype=bool))
    spec = replace(SPEC, alpha=0.0, beta=0.0)
    found, report = run_fit(data, spec, replace(FIT, epochs=2))
    plain, _ = run_fit(data, PlainClipSpec(), replace(FIT, epochs=2))
    assert report is not None
    assert report.cost["steps"] == 8
    for name, tensor in plain.model.state_dict().items():
        other = found.model.state_dict()[name]
        assert torch.allclose(tensor.float(), other.float(), rtol=1e-4, atol=1e-5), name
    weighted, _ = run_fit(data, SPEC, replace(FIT, epochs=2))
    weight = "net.visual.layer4.0.conv3.weight"
    moved = weighted.model.state_dict()[weight] - plain.model.state_dict()[weight]
    assert float(moved.abs().max()) > 1e-4


# --- stopping, and going on after an interruption


def held(store: Store) -> tuple[View, RelearnUnlearnSpec]:
    mask = np.arange(64) % 5 == 1
    return view(store, held=mask), replace(SPEC, num_held=int(mask.sum()))


def test_held_out_rows_are_watched_and_never_trained_on(small_store: Store) -> None:
    data, spec = held(small_store)
    assert sorted(chosen(data, spec)) == np.flatnonzero(~data.columns["held"]).tolist()
    fit, report = run_fit(data, spec, replace(FIT, lr=0.0, epochs=3))
    assert report is not None
    assert len(report.curves) == 3
    assert all(record["steps"] == 3 for record in report.curves)
    assert all(0 <= record["held_out"] <= 1 for record in report.curves)
    assert fit.steps_per_epoch == 3


@pytest.mark.parametrize(("wrong", "stops"), [(16, False), (17, False), (19, True), (30, True)])
def test_it_stops_after_a_drop_of_a_point(small_store: Store, wrong: int, stops: bool) -> None:
    """Of 200 held-out pairs 20 are not found at first, then 16, then as many as given."""
    data = view(small_store, 264, held=np.arange(264) < 200, number=np.arange(264))
    objective = replace(SPEC, num_held=200).build(young())
    lengths = []
    for missed in (20, 16, wrong):

        def score(scorer: Any, rows: View, missed: int = missed) -> np.ndarray:
            found = np.eye(len(rows))
            if isinstance(scorer, ImageFeatures):
                found[:missed] = 0
            return found

        scan = Scan(data, score)
        rows = objective.begin_epoch(young(), scan, Clock(0, 0, 1), numpy_rng(0))
        assert rows is not None
        assert float(cast("Any", objective).held) == pytest.approx(1 - missed / 200)
        lengths.append(len(rows))
    assert lengths == [64, 64, 0 if stops else 64]


@pytest.mark.parametrize("kind", ["batch", "bank", "held"])
def test_a_killed_fit_goes_on_as_if_it_was_not(
    small_store: Store, tmp_path: Path, kind: str
) -> None:
    data, spec = held(small_store) if kind == "held" else (view(small_store), SPEC)
    if kind == "bank":
        captions = data.captions()
        text = torch.from_numpy(data.columns["judge_text"][:5])
        bank = Bank(captions=tuple(captions[:5]), numbers=(0, 1, 2, 3, 4), text_MD=text)
        spec = replace(spec, bank=bank)
    recipe = replace(FIT, epochs=3)
    whole_fit, first = run_fit(data, spec, recipe)
    kept = Kept(tmp_path / "fit")
    run_fit(data, spec, recipe, checkpoints=kept, stop_at=5)
    resumed, second = run_fit(data, spec, recipe, checkpoints=kept)
    assert kept.saves > 0
    assert_same(state(whole_fit), state(resumed))
    assert first is not None
    assert second is not None
    assert first.curves == second.curves


# --- the plan


@dataclass
class Scene:
    """A reference, a victim that was trained on rows whose first eight captions are wrong."""

    lab: Lab
    data: DataRef
    reference: ModelRef
    victim: ModelRef
    # About a fifth of the other captions are nearer to a row's own: young features all point one
    # way. No cosine is near enough to it for another kernel's rounding to count.
    limit: float

    def case(self, defense: Cgd, recipe: Recipe = FIT) -> Case:
        grants: dict[Need, Any] = {
            Need.VICTIM: lambda: self.victim,
            Need.SUSPECT_DATA: lambda: self.data,
            Need.REFERENCE: lambda: self.reference,
            Need.START: lambda: self.reference,
        }
        grants = {need: give for need, give in grants.items() if need in defense.needed()}
        return Case("cgd", grants, (Recipes(victim=FIT, repair=recipe), 3))

    def apply(self, recipe: Recipe = FIT, **fields: Any) -> Defended:
        defense = Cgd(**{"bank_dedup": self.limit, **fields})
        return defense.apply(self.lab, self.case(defense, recipe))


@pytest.fixture(scope="module")
def scene(small_store: Store) -> Scene:
    lab = Lab(small_store, MODEL, Runtime())
    public = DataRef(corpus_key(corpus_spec("public")), 512)
    reference = lab.train(PlainClipSpec(), public, replace(FIT, epochs=2))
    corpus = open_corpus(small_store, corpus_key(corpus_spec("suspect")), Reader.TRAINING)
    data = lab.put(subset(whole(corpus), np.arange(ROWS)))
    victim = lab.train(PlainClipSpec(), data, FIT, init=reference)
    text_ND = seen(lab, reference, lab._view(data)).text_ND
    cosines = np.sort((text_ND @ text_ND.T).ravel())[int(0.78 * ROWS**2) : int(0.82 * ROWS**2)]
    widest = int(np.diff(cosines).argmax())
    limit = float(cosines[widest : widest + 2].mean())
    assert cosines[widest + 1] - limit > 1e-6
    return Scene(lab, data, reference, victim, limit)


def seen(lab: Lab, model: ModelRef, view: View) -> Sight:
    loaded = lab.load(model)
    with torch.no_grad():
        image = loaded.encode_image(view.reader(torch.device("cpu"))(np.arange(len(view))))
        tokens = torch.from_numpy(loaded.tokenizer(view.captions())).long()
        text = loaded.encode_text(tokens)
    return Sight(image.numpy(), text.numpy(), float(loaded.scale.detach()))


@pytest.mark.parametrize("scale", ["model", "1", "100"])
def test_the_judgement_is_the_split_of_both_models_entropies(scene: Scene, scale: str) -> None:
    done = scene.apply(rank_scale=Scale(scale), bank_size=40)
    view = scene.lab._view(scene.data)
    judge, early = seen(scene.lab, scene.reference, view), seen(scene.lab, scene.victim, view)
    number = caption_numbers(view.captions())
    bank = draw_bank(number, 40, numpy_rng(3, "bank", scene.data.key))
    assert len(bank) == 40
    if scale != "model":
        judge = judge._replace(scale=float(scale))
    alike = Alike(judge.text_ND, number, scene.limit)
    a, _ = entropies([judge], alike, against_bank(ROWS, bank))
    b, _ = entropies([early], alike, against_bank(ROWS, bank))
    x, y = (np.argsort(np.argsort(e, kind="stable")) + 1 for e in (a, b))
    clean, triggered = (x <= 0.8 * ROWS) & (y >= 0.2 * ROWS), (x > 0.9 * ROWS) | (y < 0.1 * ROWS)
    assert done.flagged is not None
    assert done.suspicion is not None
    assert np.array_equal(done.flagged, triggered)
    assert np.array_equal(done.sets["not_clean"], ~clean)
    assert done.suspicion == pytest.approx(np.maximum(x / ROWS, 1 - y / ROWS), abs=1e-6)
    assert done.scores["judge"] == pytest.approx(x / ROWS, abs=1e-6)
    assert done.scores["early"] == pytest.approx(1 - y / ROWS, abs=1e-6)
    assert done.suspicion.dtype == done.scores["judge"].dtype == np.float32
    assert done.notes["num_clean"] == clean.sum()
    assert done.notes["num_triggered"] == triggered.sum()
    assert 0 < done.notes["bank_left_out"] < 1


def test_only_the_judge_has_another_scale(scene: Scene) -> None:
    one = scene.apply(rank_scale=Scale("1"))
    other = scene.apply(rank_scale=Scale("100"))
    assert np.array_equal(one.scores["early"], other.scores["early"])
    assert not np.array_equal(one.scores["judge"], other.scores["judge"])


def test_a_restart_makes_nothing_and_each_option_another_model(scene: Scene) -> None:
    first = scene.apply()
    made = len(scene.lab.ledger.made)
    assert scene.apply().model == first.model
    assert len(scene.lab.ledger.made) == made
    options: list[dict[str, Any]] = [
        {"sigma1": 0.3},
        {"sigma2": 0.05},
        {"alpha": 0.01},
        {"teacher_scale": Scale("1")},
        {"bank_dedup": None},
        {"rank_negatives": Negatives.BATCH},
        {"repair_negatives": Negatives.BANK, "bank_size": 20},
        {"sides": Sides.BOTH},
        {"balance": Balance.CAPTION},
        {"stop": Stop.HELD_OUT},
        {"steps_per_epoch": 1},
    ]
    keys = [scene.apply(**fields).model.key for fields in options]
    assert len({first.model.key, *keys}) == len(options) + 1


def test_the_batch_and_the_rate_grow_together(scene: Scene) -> None:
    """Of 128 rows a batch is at most 32: twice the recipe's 16, so twice its rate."""
    costs = {}
    for size in (None, 8, 256):
        done = scene.apply(batch_size=size)
        curves = scene.lab.curves(done.model)
        costs[size] = (curves[0]["steps"], done.notes["u"])
    assert [steps for steps, _ in costs.values()] == [8, 16, 4]
    half = [0.5 * (1 + math.cos(math.pi * k / 7)) for k in range(7)]
    # One step of warm-up at the full rate, then the cosine.
    assert costs[None][1] == pytest.approx(0.025 * 2e-3 * (1 + sum(half)))
    assert costs[256][1] == pytest.approx(
        0.025 * 4e-3 * (1 + sum(0.5 * (1 + math.cos(math.pi * k / 3)) for k in range(3)))
    )
    chosen = Cgd()._recipe(replace(FIT, lr=Select(rates=(1e-3, 3e-3))), ROWS)
    assert chosen.batch_size == 32
    assert chosen.lr == Select(rates=(2e-3, 6e-3))
    assert Cgd(batch_size=None)._recipe(FIT, ROWS) is FIT


def test_a_rate_is_chosen_on_rows_of_the_clean_split(scene: Scene) -> None:
    lab = Lab(scene.lab.store, MODEL, Runtime())
    lab.put(scene.lab._view(scene.data))
    picked: list[np.ndarray] = []
    true_train = lab.train

    def train(*args: Any, **named: Any) -> ModelRef:
        if named.get("held_out") is not None:
            picked.append(named["held_out"])
        return true_train(*args, **named)

    lab.train = train  # type: ignore[method-assign]
    defense = Cgd(bank_dedup=None)
    recipe = replace(FIT, lr=Select(rates=(1e-4, 1e-3), floor=10))
    done = defense.apply(lab, scene.case(defense, recipe))
    assert np.array_equal(picked[0], np.flatnonzero(~done.sets["not_clean"]))
    (choice,) = lab.ledger.choices.values()
    assert choice["held_out"] == 10
    assert choice["rates"] == [2e-4, 2e-3]
    # Ten rows fewer are three batches of 32.
    factors = [1 if k == 0 else 0.5 * (1 + math.cos(math.pi * (k - 1) / 2)) for k in range(3)]
    assert done.notes["u"] == pytest.approx(0.025 * choice["chosen"] * sum(factors))


def test_stopping_holds_out_clean_rows_alone(scene: Scene) -> None:
    done = scene.apply(stop=Stop.HELD_OUT)
    clean = int((~done.sets["not_clean"]).sum())
    (record,) = scene.lab.curves(done.model)
    assert "held_out" in record
    # A quarter of the clean rows, as 200 of them are too many.
    assert record["steps"] == (ROWS - clean // 4) // 32


# --- early models


def test_early_models_are_short_trainings_from_the_start(scene: Scene) -> None:
    defense = Cgd(early=Early.RETRAIN, early_runs=2)
    assert defense.needed() == Cgd().needed() | {Need.START}
    models = defense._early_models(scene.lab, scene.case(defense))
    assert len(set(models)) == 2
    assert scene.victim not in models
    plain = model_key(PlainClipSpec(), FIT, scene.data.key, scene.reference.key, MODEL)
    assert plain == scene.victim.key
    done = scene.apply(early=Early.RETRAIN, early_runs=2)
    view = scene.lab._view(scene.data)
    number = caption_numbers(view.captions())
    bank = draw_bank(number, 1000, numpy_rng(3, "bank", scene.data.key))
    alike = Alike(seen(scene.lab, scene.reference, view).text_ND, number, scene.limit)
    sights = [seen(scene.lab, model, view) for model in models]
    b, _ = entropies(sights, alike, against_bank(ROWS, bank))
    y = np.argsort(np.argsort(b, kind="stable")) + 1
    assert done.scores["early"] == pytest.approx(1 - y / ROWS, abs=1e-6)


# --- handing the clean split on


def test_another_defense_repairs_on_the_clean_split(scene: Scene) -> None:
    done = scene.apply(repair="finetune")
    clean = scene.lab.subset(scene.data, np.flatnonzero(~done.sets["not_clean"]))
    expected = model_key(PlainClipSpec(), FIT, clean.key, scene.victim.key, MODEL)
    assert done.model.key == expected
    assert done.flagged is not None
    assert done.notes["num_triggered"] == done.flagged.sum()
    assert "u" not in done.notes
    assert scene.apply(repair="cleanclip").model.key != expected


def test_what_is_lent_is_what_the_other_declares(scene: Scene) -> None:
    lent = scene.case(Cgd()).lend(Finetune(), scene.data)
    assert lent.granted == {Need.VICTIM, Need.CLEAN_DATA}
    assert (lent.victim, lent.clean_data) == (scene.victim, scene.data)
    assert lent.recipes == Recipes(victim=FIT, repair=FIT)
    for name in ("suspect_data", "reference", "start", "truth"):
        with pytest.raises(Forbidden, match="finetune, employed by cgd asked for"):
            getattr(lent, name)


def test_the_other_defense_is_part_of_the_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its defaults may change: what was made with the old ones is another thing."""
    suspect, clean = [CorpusStage(corpus_spec(split)) for split in ("suspect", "clean")]
    reference = ModelStage(MODEL, FIT, 256, clean, None)
    victim = ModelStage(MODEL, FIT, 512, suspect, reference)

    def keys() -> dict[str, str]:
        recipes = Recipes(victim=FIT, repair=FIT)
        defenses = {"own": Cgd(), "handed": Cgd(repair="finetune"), "plain": Finetune()}
        return {
            name: DefendStage(defense, recipes, 0, victim, clean, suspect, reference).key
            for name, defense in defenses.items()
        }

    before = keys()
    monkeypatch.setattr(Finetune, "version", 99)
    after = keys()
    assert {name for name in before if before[name] != after[name]} == {"handed", "plain"}


# --- refusals


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sigma1": 1.0}, r"sigma1 must be in \[0, 1\), got 1.0"),
        ({"sigma2": -0.1}, r"sigma2 must be in \[0, 1\)"),
        ({"sigma1": 0.05}, "at most sigma1: no row is relearned and unlearned, got 0.1"),
        ({"alpha": -1.0}, "alpha must be 0 or more"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"epsilon": 0.0}, "epsilon must be above 0"),
        ({"bank_size": 0}, "bank_size must be at least 1"),
        ({"batch_size": 1}, "batch_size must be at least 2, or null"),
        ({"batch_size": 0}, "batch_size must be at least 2, or null"),
        ({"bank_dedup": 1.5}, "bank_dedup must be a cosine, or null"),
        ({"sides": "both", "repair_negatives": "bank"}, "a bank holds captions alone"),
        ({"repair": "finetun"}, "repair: no defense called 'finetun'. Did you mean 'finetune'"),
        ({"repair": "roclip"}, "repair: roclip needs suspect_data, start; it cannot be handed"),
        ({"repair": "cgd"}, "repair: cgd needs suspect_data, victim, reference; it cannot be"),
        ({"repair": "oracle_filter"}, "oracle_filter needs suspect_data, start, truth"),
    ],
)
def test_what_cannot_be_meant_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Cgd(**fields).check()


def test_captions_that_all_say_the_same_are_a_failure(scene: Scene) -> None:
    with pytest.raises(MethodFailure, match=r"every other caption .* bank_dedup -1"):
        scene.apply(bank_dedup=-1.0)


def test_a_split_without_clean_rows_is_a_failure(scene: Scene) -> None:
    """Where both models are one, no row is easy for the judge and hard for the other."""
    with pytest.raises(MethodFailure, match="no row is in the clean split"):
        replace(scene, victim=scene.reference).apply(sigma1=0.6)
