"""SafeCLIP against references written from its equations: losses, mixture, split and phases."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from defenses.base import (
    Case,
    Defended,
    Fidelity,
    Need,
    Recipes,
    Regime,
    fidelity_in,
    resolved_needs,
)
from defenses.safeclip import SafeClip
from tests.conftest import corpus_spec
from tests.test_losses import features, slow
from victims.batches import Batch, score_rows
from victims.corpora import Reader, View, corpus_key, open_corpus, subset, whole, with_text
from victims.draws import Draws, torch_rng
from victims.errors import MethodFailure, UsageError
from victims.keys import Key
from victims.lab import DataRef, Lab, ModelRef
from victims.memory import Memory
from victims.mixture import SafeRule, SplitRule, disorder, two_gaussians
from victims.models import Clip, ModelSpec, fresh
from victims.recipe import Clock, OptimizerState, Recipe, Runtime, Schedule, Select, lr_factor
from victims.rewrite import EdaMode, eda_text
from victims.safe_phases import Counting, PairCosine, SafePhase, SafePhaseSpec, ScoreView, Split
from victims.store import Store
from victims.training import Fit, FitReport, Objective

MODEL, WIDTH, ROWS = ModelSpec(), 64, 68
RULE = SplitRule(threshold=0.5, increment=0.1, cap=0.85, safe_rule=SafeRule.POSTERIOR)
SPLIT = Split(
    rule=RULE,
    scorer=PairCosine(),
    batch_size=8,
    train_risky=True,
    schedule=Counting.FIXED,
    epochs=3,
    epochs_before=2,
)
UNIMODAL = SafePhaseSpec(crossed=False, bank_size=16, crop_scale=(0.5, 1.0))
CROSSED = SafePhaseSpec(crossed=True, bank_size=None, crop_scale=(0.5, 1.0))
THIRD = replace(UNIMODAL, split=SPLIT)
RECIPE = Recipe(epochs=3, batch_size=8, lr=1e-3, warmup_steps=4, seed=4)
CLOCK = Clock(0, 0, 8)


def view(store: Store, rows: int = ROWS) -> View:
    corpus = open_corpus(store, corpus_key(corpus_spec("suspect")), Reader.TRAINING)
    texts = {n: eda_text(EdaMode.STATIC, "lexicon", s) for s, n in enumerate(("eda", "eda_again"))}
    return with_text(subset(whole(corpus), np.arange(rows)), texts)


# --- the mixture and the split


def mixed(num_rows: int, *parts: tuple[float, float, float], seed: int = 0) -> tuple[Any, Any]:
    """Values drawn from (share, mean, deviation), and the part of each row."""
    rng = np.random.default_rng(seed)
    part_N = np.repeat(np.arange(len(parts)), [round(share * num_rows) for share, _, _ in parts])
    means, widths = (np.array([part[i] for part in parts])[part_N] for i in (1, 2))
    return means + widths * rng.standard_normal(num_rows), part_N


EXAMPLE = ((0.1, 0.15, 0.02), (0.9, 0.30, 0.03))


def slow_posterior(values: list[float]) -> list[float]:
    """Expectation and maximisation by their formulas, until nothing moves."""
    mean, var, weight = [min(values), max(values)], [1e-3, 1e-3], [0.5, 0.5]
    upper = [0.0] * len(values)
    for _ in range(40):
        for i, x in enumerate(values):
            density = [
                w * math.exp(-((x - m) ** 2) / (2 * v)) / math.sqrt(v)
                for w, m, v in zip(weight, mean, var, strict=True)
            ]
            upper[i] = density[1] / (density[0] + density[1])
        for k in (0, 1):
            belongs = [u if k else 1 - u for u in upper]
            total = sum(belongs)
            weight[k] = total / len(values)
            mean[k] = sum(b * x for b, x in zip(belongs, values, strict=True)) / total
            square = sum(b * (x - mean[k]) ** 2 for b, x in zip(belongs, values, strict=True))
            var[k] = square / total + 1e-6
    return upper


def test_the_posterior_is_that_of_two_gaussians() -> None:
    values_N, _ = mixed(300, *EXAMPLE)
    found_N = two_gaussians(values_N).posterior_N
    # scikit-learn stops once the likelihood hardly moves, the reference goes on.
    apart_N = np.abs(found_N - slow_posterior(values_N.tolist()))
    assert apart_N.max() < 0.05
    assert apart_N.mean() < 1e-3
    # Whichever component the fit names first.
    assert np.corrcoef(values_N, found_N)[0, 1] > 0.7
    assert np.abs(two_gaussians(-values_N).posterior_N - (1 - found_N)).max() < 0.02


def test_the_documented_example() -> None:
    """The 0.9 crossing near 0.212, and under half a percent of the lower part above it."""
    values_N, part_N = mixed(20_000, *EXAMPLE)
    rule = replace(RULE, threshold=0.9)
    safe_N = rule.split(values_N, None, 0)
    assert values_N[safe_N].min() == pytest.approx(0.212, abs=0.003)
    assert safe_N[part_N == 0].mean() < 0.005
    assert safe_N[part_N == 1].mean() > 0.99
    sets = [replace(RULE, threshold=t).split(values_N, None, 0) for t in (0.99, 0.9, 0.7, 0.5)]
    assert all((big >= small).all() for small, big in pairwise(sets))
    assert sets[0].sum() < sets[-1].sum()


def test_a_posterior_that_turns_round() -> None:
    """A wide component takes both tails; the other rule holds on to the order of the values."""
    wide_low_N, _ = mixed(6000, (0.6, 0.1, 0.2), (0.4, 0.35, 0.02))
    wide_high_N, _ = mixed(6000, (0.4, 0.1, 0.02), (0.6, 0.35, 0.2))
    for values_N, end in ((wide_low_N, values_max), (wide_high_N, values_min)):
        posterior, crossing = (
            replace(RULE, safe_rule=rule).split(values_N, None, 0) for rule in SafeRule
        )
        assert disorder(values_N, two_gaussians(values_N).posterior_N) > 0.1
        row = end(values_N)
        # Released behaviour: the most similar pair is risky, or the least similar one safe.
        assert bool(posterior[row]) is (end is values_min)
        assert bool(crossing[row]) is (end is values_max)
        assert values_N[crossing].min() > values_N[~crossing].max()
    later = replace(RULE, safe_rule=SafeRule.ABOVE_CROSSING).split(wide_low_N, 60, 1)
    assert np.flatnonzero(later).tolist() == sorted(np.argsort(-wide_low_N)[:660].tolist())


def values_max(values_N: Any) -> int:
    return int(values_N.argmax())


def values_min(values_N: Any) -> int:
    return int(values_N.argmin())


def test_disorder_is_the_share_of_rows_overtaken_from_below() -> None:
    values_N = np.array([3.0, 1.0, 2.0, 4.0])
    assert disorder(values_N, np.array([0.8, 0.1, 0.8, 0.9])) == 0
    assert disorder(values_N, np.array([0.3, 0.9, 0.4, 1.0])) == 0.5


@pytest.mark.parametrize(
    ("fields", "first", "later", "rows", "size"),
    [
        ({"increment": 0.01}, 1500, 5, 10_000, 2000),
        ({"increment": 0.01}, 0, 29, 100, 29),  # in floats 28
        ({"increment": 0.01}, 33, 2, 257, 38),
        ({}, 60, 100, 100, 85),
        ({}, 95, 1, 100, 85),
        ({"increment": 0.0, "cap": 1.0}, 100, 7, 100, 100),
    ],
)
def test_the_safe_set_grows_by_exact_shares_up_to_the_cap(
    fields: dict[str, float], first: int, later: int, rows: int, size: int
) -> None:
    rule = replace(RULE, **cast("Any", fields))
    assert rule.size(first, later, rows) == size
    values_N, _ = mixed(rows, (0.3, 0.1, 0.02), (0.7, 0.3, 0.02))
    assert rule.split(values_N, first, later).sum() == size


@settings(max_examples=25)
@given(st.integers(0, 2**31), st.integers(0, 40), st.integers(1, 5))
def test_later_sets_are_the_largest_posteriors_ties_by_value(
    seed: int, first: int, later: int
) -> None:
    values_N, _ = mixed(50, (0.3, 0.1, 0.01), (0.7, 0.9, 0.01), seed=seed)
    posterior_N = two_gaussians(values_N).posterior_N
    order = sorted(range(50), key=lambda i: (-posterior_N[i], -values_N[i], i))
    safe_N = RULE.split(values_N, first, later)
    assert np.flatnonzero(safe_N).tolist() == sorted(order[: RULE.size(first, later, 50)])


def test_equal_or_broken_similarities() -> None:
    assert RULE.split(np.full(20, 0.25), 5, 1).sum() == 7
    with pytest.raises(MethodFailure, match="not finite"):
        RULE.split(np.array([0.1, math.nan, 0.2]), None, 0)


# --- one step, on given features


@dataclass
class Stub:
    """A model that answers with given features."""

    image: Tensor
    text: Tensor
    scale: Tensor

    def encode_image(self, image_BCHW: Tensor) -> Tensor:
        return self.image

    def encode_text(self, tokens_BT: Tensor) -> Tensor:
        return self.text


def step(objective: Objective, images: list[Tensor], texts: list[Tensor]) -> dict[str, Tensor]:
    """One step on the features of V1, V2 and U1, U2, or of one view of each side."""
    rows = len(images[0])
    tokens = torch.ones(rows, 4, dtype=torch.long)
    batch = Batch(
        rows=torch.arange(rows),
        image=torch.zeros(rows, 3, 32, 32, dtype=torch.uint8),
        tokens=tokens,
        texts={"eda": tokens, "eda_again": tokens},
        views={name: torch.zeros(rows, 3, 32, 32) for name in ("one", "two")},
    )
    stub = Stub(torch.cat(images), torch.cat(texts), torch.tensor(14.0, dtype=torch.float64))
    found: dict[str, Tensor] = objective(cast("Clip", stub), batch, CLOCK)
    return found


def slow_nearest(query: Tensor, pool: Tensor) -> Tensor:
    """Row by row, the stored vector with the largest cosine."""
    chosen = []
    for q in query.tolist():
        dots = [sum(x * y for x, y in zip(q, p, strict=True)) for p in pool.tolist()]
        chosen.append(pool[max(range(len(pool)), key=dots.__getitem__)])
    return torch.stack(chosen)


def views(rows: int = 6) -> list[Tensor]:
    """V1, V2, U1, U2."""
    return [features(seed, rows).requires_grad_() for seed in range(4)]


def phase(spec: SafePhaseSpec, width: int = 5) -> SafePhase:
    return SafePhase(spec, width).double()


def slow_unimodal(v2: Tensor, near_v1: Tensor, u2: Tensor, near_u1: Tensor) -> float:
    images = slow("nce", v2.detach(), near_v1.detach(), 14.0)
    return (images + slow("nce", u2.detach(), near_u1.detach(), 14.0)) / 2


def test_a_unimodal_step_is_its_equation() -> None:
    """The key is the neighbour of view 1, found before view 1 is written; the query is view 2."""
    v1, v2, u1, u2 = views()
    objective, old = phase(replace(UNIMODAL, bank_size=17)), [features(8, 11), features(9, 11)]
    objective.images.push(old[0])
    objective.texts.push(old[1])
    terms = step(objective, [v1, v2], [u1, u2])
    assert set(terms) == {"unimodal"}
    near = [slow_nearest(view.detach(), bank) for view, bank in zip((v1, u1), old, strict=True)]
    expected = slow_unimodal(v2, near[0], u2, near[1])
    assert float(terms["unimodal"].detach()) == pytest.approx(expected, rel=1e-9)
    terms["unimodal"].backward()  # type: ignore[no-untyped-call]
    pulls = [float(cast("Tensor", view.grad).abs().max()) for view in (v1, u1, v2, u2)]
    assert pulls[:2] == [0, 0]
    assert min(pulls[2:]) > 1e-3
    assert torch.equal(objective.images.rows_PD[11:], v1)
    assert torch.equal(objective.texts.rows_PD[11:], u1)
    # What was written is found now.
    again = step(objective, [v1, v2], [u1, u2])["unimodal"]
    assert float(again.detach()) == pytest.approx(slow_unimodal(v2, v1, u2, u1), rel=1e-9)


def test_an_empty_bank_answers_with_the_view_itself() -> None:
    v1, v2, u1, u2 = views()
    terms = step(phase(UNIMODAL), [v1, v2], [u1, u2])
    expected = slow_unimodal(v2, v1, u2, u1)
    assert float(terms["unimodal"].detach()) == pytest.approx(expected, rel=1e-9)
    terms["unimodal"].backward()  # type: ignore[no-untyped-call]
    assert not cast("Tensor", v1.grad).any()


def test_without_banks_the_views_are_each_others_keys() -> None:
    v1, v2, u1, u2 = views()
    objective = phase(replace(UNIMODAL, bank_size=None))
    assert not objective.state_dict()
    for _ in range(2):
        terms = step(objective, [v1, v2], [u1, u2])
        expected = slow_unimodal(v2, v1, u2, u1)
        assert float(terms["unimodal"].detach()) == pytest.approx(expected, rel=1e-9)
    terms["unimodal"].backward()  # type: ignore[no-untyped-call]
    assert float(cast("Tensor", v1.grad).abs().max()) > 1e-3


def test_a_crossed_step_is_its_equation() -> None:
    v1, v2, u1, u2 = (view.detach() for view in views())
    terms = step(phase(CROSSED), [v1, v2], [u1, u2])
    assert set(terms) == {"cross"}
    expected = (slow("nce", v1, u2, 14.0) + slow("nce", u1, v2, 14.0)) / 2
    assert float(terms["cross"]) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("augmented", [True, False])
def test_crossing_equal_views_is_the_clip_loss(augmented: bool) -> None:
    """As two equal views, and as the one plain view of a run without augmentation."""
    v1, u1 = features(0, 6), features(1, 6)
    images, texts = ([v1, v1], [u1, u1]) if augmented else ([v1], [u1])
    spec = CROSSED if augmented else replace(CROSSED, crop_scale=None)
    found = float(step(phase(spec), images, texts)["cross"])
    assert found == pytest.approx(slow("clip", v1, u1, 14.0), rel=1e-9)


# --- whole fits of phase C


class Watched(SafePhase):
    """A phase that notes each step's rows and loss, and each split."""

    def __init__(self, spec: SafePhaseSpec) -> None:
        super().__init__(spec, WIDTH)
        self.steps: list[tuple[int, str, list[int]]] = []

    def forward(self, model: Clip, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        terms = super().forward(model, batch, clock)
        self.steps.append((clock.epoch, next(iter(terms)), batch.rows.tolist()))
        return terms


class LoggedFit(Fit):
    """A fit that keeps the learning rate of every step."""

    def _train_step(self, module: torch.nn.Module, index: int) -> None:
        super()._train_step(module, index)
        self.rates = [*getattr(self, "rates", []), self.optimizer.param_groups[0]["lr"]]


def fitted(
    data: View, objective: Objective, recipe: Recipe = RECIPE, checkpoints: Any = None
) -> tuple[dict[str, Tensor], FitReport, list[float]]:
    model, runtime = fresh(MODEL, 0), Runtime(checkpoint_seconds=-1.0)
    fit = LoggedFit(model, data, objective, recipe, runtime=runtime, checkpoints=checkpoints)
    report = fit()
    return dict(model.state_dict()), report, fit.rates


def differing(first: dict[str, Tensor], second: dict[str, Tensor]) -> set[str]:
    return {name for name, tensor in first.items() if not torch.equal(tensor, second[name])}


@pytest.fixture(scope="module")
def third(small_store: Store) -> tuple[Watched, FitReport, list[float], dict[str, Tensor]]:
    objective = Watched(THIRD)
    weights, report, rates = fitted(view(small_store), objective)
    return objective, report, rates, weights


def test_risky_rows_come_first_and_never_meet_the_crossed_loss(third: Any) -> None:
    objective, report, _, _ = third
    first = round(report.curves[0]["safe_rows"])
    sizes = [first, *(RULE.size(first, e, ROWS) for e in (1, 2))]
    assert 8 < first < ROWS - 16
    for epoch, size in enumerate(sizes):
        steps = [(kind, rows) for at, kind, rows in objective.steps if at == epoch]
        kinds = [kind for kind, _ in steps]
        assert kinds == ["unimodal"] * ((ROWS - size) // 8) + ["cross"] * (size // 8)
        seen = [row for _, rows in steps for row in rows]
        assert len(set(seen)) == len(seen) == 8 * len(steps)
        assert {len(rows) for _, rows in steps} == {8}
        assert report.curves[epoch]["safe_rows"] == pytest.approx(size)


def test_the_first_split_is_that_of_the_start_weights(small_store: Store, third: Any) -> None:
    data = view(small_store)
    c_N = score_rows(fresh(MODEL, 0), data, PairCosine())
    safe_N = RULE.split(c_N, None, 0)
    for epoch, kind, rows in third[0].steps:
        if epoch == 0:
            assert safe_N[rows].all() == (kind == "cross")
            assert safe_N[rows].any() == (kind == "cross")
    assert third[1].curves[0]["safe_rows"] == safe_N.sum()


def test_the_schedule_runs_on_over_risky_and_safe_steps(third: Any) -> None:
    _, _, rates, _ = third
    spe = ROWS // 8
    assert rates == [1e-3 * lr_factor(RECIPE, step, spe) for step in range(len(rates))]
    assert 3 * spe - 3 <= len(rates) <= 3 * spe
    assert rates[-1] < 1e-4


def test_without_the_risky_pass_safe_steps_keep_their_learning_rate(
    small_store: Store, third: Any
) -> None:
    """So that leaving the pass out changes one thing."""
    spec = replace(CROSSED, split=replace(SPLIT, train_risky=False))
    objective = Watched(spec)
    _, report, rates = fitted(view(small_store), objective)
    assert {kind for _, kind, _ in objective.steps} == {"cross"}
    first = round(report.curves[0]["safe_rows"])
    assert first == round(third[1].curves[0]["safe_rows"])
    assert len(objective.steps) == sum(
        size // 8 for size in [first, *(RULE.size(first, e, ROWS) for e in (1, 2))]
    )
    skipped = (ROWS - first) // 8
    assert rates[: first // 8] == third[2][skipped : skipped + first // 8]
    assert rates[-1] < 1e-4


def test_the_released_counters(small_store: Store) -> None:
    """Each pass: the global epoch times its mean batches, on a cosine for phase C's epochs."""
    spec = replace(THIRD, split=replace(SPLIT, schedule=Counting.RELEASED))
    objective = Watched(spec)
    _, report, rates = fitted(view(small_store), objective)
    first = round(report.curves[0]["safe_rows"])
    sizes = [first, *(RULE.size(first, e, ROWS) for e in (1, 2))]
    expected = []
    for epoch, size in enumerate(sizes):
        # Phase C is epochs 3 to 5 of the run.
        passes = [[ROWS - one for one in sizes], sizes]
        for rows, all_rows in zip((ROWS - size, size), passes, strict=True):
            total = sum(one // 8 for one in all_rows)
            for index in range(rows // 8):
                step = (epoch + 3) * total // 3 + index
                if step < 4:
                    expected.append(1e-3 * (step + 1) / 4)
                else:
                    # The loop counts whole epochs of steps.
                    along = (step - 4) / (3 * (total // 3) - 4)
                    expected.append(1e-3 * 0.5 * (1 + math.cos(math.pi * along)))
    assert rates == pytest.approx(expected, rel=1e-12)
    # Past its minimum the cosine rises again.
    assert any(later > 1.5 * rate for rate, later in pairwise(rates))


def test_the_released_counters_at_full_scale() -> None:
    """The learning rates that its authors' code has in the safe pass of a million pairs."""
    rule = SplitRule(threshold=0.9, increment=0.01, cap=0.85, safe_rule=SafeRule.POSTERIOR)
    split = replace(
        SPLIT, rule=rule, batch_size=512, schedule=Counting.RELEASED, epochs=26, epochs_before=6
    )
    objective = SafePhase(replace(CROSSED, split=split), WIDTH)
    sizes = [rule.size(150_000, later, 1_000_000) for later in range(26)]
    objective.planned_2[1] = sum(size // 512 for size in sizes)
    recipe = replace(RECIPE, epochs=26, lr=5e-4, warmup_steps=10_000)
    found = []
    for epoch in (7, 15, 20, 25, 30, 32):
        clock = objective.pace(Clock(epoch - 7, 0, 1))
        found.append(5e-4 * lr_factor(recipe, clock.step, clock.total_steps // 26))
    assert found == pytest.approx([1.9e-4, 4.0e-4, 4.6e-4, 2e-5, 2.8e-4, 4.6e-4], rel=0.15)


def test_with_everything_safe_it_is_crossed_training(small_store: Store) -> None:
    data, rule = view(small_store), replace(RULE, threshold=0.0, increment=0.0, cap=1.0)
    everything = replace(THIRD, split=replace(SPLIT, rule=rule))
    recipe = replace(RECIPE, epochs=2)
    found, report, rates = fitted(data, SafePhase(everything, WIDTH), recipe)
    expected, _, plain_rates = fitted(data, SafePhase(CROSSED, WIDTH), recipe)
    assert not differing(expected, found)
    assert rates == plain_rates
    assert [record["safe_rows"] for record in report.curves] == [ROWS, ROWS]


def test_nothing_to_train_on_is_a_failure_and_no_early_end(small_store: Store) -> None:
    split = replace(SPLIT, rule=replace(RULE, threshold=1.0), train_risky=False, batch_size=64)
    with pytest.raises(MethodFailure, match=r"leaves no batch of 64. Lower `threshold`"):
        fitted(view(small_store), SafePhase(replace(CROSSED, split=split), WIDTH))


@pytest.mark.parametrize(("augmented", "per_pair"), [(True, 2), (False, 1)])
def test_a_step_pays_for_the_views_it_needs(
    small_store: Store, augmented: bool, per_pair: int
) -> None:
    spec = UNIMODAL if augmented else replace(UNIMODAL, crop_scale=None)
    recipe = replace(RECIPE, epochs=1)
    _, report, _ = fitted(view(small_store, 16), SafePhase(spec, WIDTH), recipe)
    assert report.cost["images_backward"] == report.cost["texts_backward"] == 16 * per_pair


class Killed(Exception):
    pass


@dataclass
class Saved:
    """Mid-fit checkpoints after every step; dies after the save of step ``die_after``."""

    path: Path
    die_after: int | None
    count: int = 0

    def load(self) -> Path | None:
        return self.path if self.path.exists() else None

    def save(self, write: Callable[[Path], None]) -> None:
        write(self.path)
        self.count += 1
        if self.count == self.die_after:
            raise Killed


def test_a_killed_fit_goes_on_bit_for_bit(small_store: Store, tmp_path: Path, third: Any) -> None:
    """Killed within both passes of the second epoch, and at the start of the third."""
    data, spec = view(small_store), THIRD
    undisturbed, report, rates, weights = third
    num = [int(record["steps"]) for record in report.curves]
    place = tmp_path / "fit.safetensors"
    for die_after in (num[0] + 2, num[1] - 3, 1):
        with pytest.raises(Killed):
            fitted(data, SafePhase(spec, WIDTH), checkpoints=Saved(place, die_after))
    resumed = SafePhase(spec, WIDTH)
    found, again, late_rates = fitted(data, resumed, checkpoints=Saved(place, None))
    assert not differing(weights, found)
    assert not differing(undisturbed.state_dict(), resumed.state_dict())
    assert again.curves == report.curves
    assert late_rates == rates[num[0] + num[1] :]


# --- the scan


def test_a_clean_scan_is_the_cosine_of_the_plain_pair(small_store: Store) -> None:
    data, model = view(small_store, 20), fresh(MODEL, 3).eval()
    found = score_rows(model, data, PairCosine())
    with torch.no_grad():
        image = model.encode_image(data.reader(torch.device("cpu"))(np.arange(20)))
        text = model.encode_text(torch.from_numpy(model.tokenizer(data.captions())).long())
    assert found == pytest.approx(F.cosine_similarity(image, text).numpy(), abs=1e-6)


def test_an_augmented_scan_draws_by_seed_epoch_and_row(small_store: Store) -> None:
    data, model = view(small_store, 300), fresh(MODEL, 3).eval()
    drawn = PairCosine(crop_scale=(0.08, 1.0), seed=5)
    found = [score_rows(model, data, drawn.at(epoch)) for epoch in (0, 0, 1)]
    assert np.array_equal(found[0], found[1])
    # Two batches of 256: each row draws for itself, and anew in another epoch.
    for other in (found[2], score_rows(model, data, PairCosine())):
        assert (found[0] != other).mean() > 0.98
    assert PairCosine().at(3) == PairCosine()


def test_the_two_views_of_a_step_differ_and_take_the_crop(small_store: Store) -> None:
    images = view(small_store, 8).reader(torch.device("cpu"))(np.arange(8))
    batch = Batch(torch.arange(8), images, torch.zeros(8, 2, dtype=torch.long))
    found = [
        phase(replace(CROSSED, crop_scale=crop)).views(batch, Draws(torch_rng(0), 8, 0, 8))
        for crop in ((0.08, 1.0), (0.9, 1.0))
    ]
    assert set(found[0]) == {"one", "two"}
    assert not torch.equal(found[0]["one"], found[0]["two"])
    assert not torch.equal(found[0]["one"], found[1]["one"])
    plain = phase(replace(CROSSED, crop_scale=None))
    assert plain.views(batch, Draws(torch_rng(0), 8, 0, 8)) == {}


# --- the method


class PlanLab:
    """A lab that writes down the fits it is asked for and scores with noise."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.texts: list[Any] = []

    def with_text(self, data: DataRef, **texts: Any) -> DataRef:
        self.texts.append(texts)
        return data

    def train(self, spec: Any, data: DataRef, recipe: Recipe, **others: Any) -> ModelRef:
        self.asked.append((spec, recipe, others))
        return ModelRef(corpus_key(corpus_spec("suspect", len(self.asked) + 7)))

    def score(self, scorer: Any, data: DataRef, model: ModelRef) -> Any:
        return mixed(len(data), (0.5, 0.1, 0.02), (0.5, 0.3, 0.02))[0].astype(np.float32)


START = ModelRef(corpus_key(corpus_spec("clean")))
VICTIM = replace(RECIPE, epochs=32, batch_size=64)


def case_of(recipe: Recipe, start: ModelRef | None, data: DataRef) -> Case:
    grants = {Need.SUSPECT_DATA: lambda: data, Need.START: lambda: start}
    return Case("safeclip", grants, (Recipes(victim=recipe, repair=replace(recipe, epochs=9)), 0))


def planned(
    defense: SafeClip, recipe: Recipe = VICTIM, start: ModelRef | None = None, rows: int = 10_000
) -> tuple[PlanLab, Defended]:
    lab = PlanLab()
    data = DataRef(corpus_key(corpus_spec("suspect")), rows)
    return lab, defense.apply(cast("Lab", lab), case_of(recipe, start, data))


def test_three_phases_from_random_weights() -> None:
    lab, done = planned(SafeClip())
    (a, first, to_a), (b, careful, to_b), (c, last, to_c) = lab.asked
    assert a == SafePhaseSpec(crossed=False, bank_size=200, crop_scale=(0.08, 1.0))
    assert b == SafePhaseSpec(crossed=True, bank_size=None, crop_scale=(0.08, 1.0))
    assert replace(c, split=None) == a
    assert c.split == Split(
        rule=SplitRule(threshold=0.9, increment=0.01, cap=0.85, safe_rule=SafeRule.POSTERIOR),
        scorer=PairCosine(),
        batch_size=64,
        train_risky=True,
        schedule=Counting.FIXED,
        epochs=26,
        epochs_before=6,
    )
    assert first == replace(VICTIM, epochs=5)
    assert (careful.epochs, last.epochs) == (1, 26)
    assert (careful.schedule, careful.warmup_steps) == (Schedule.CONSTANT, 0)
    assert careful.lr == pytest.approx(1e-5)
    assert last == replace(VICTIM, epochs=26, optimizer_state=OptimizerState.CARRY, seed=last.seed)
    assert careful.optimizer_state == OptimizerState.CARRY
    assert len({first.seed, careful.seed, last.seed}) == 3
    assert (to_a["init"], to_a["keep_optimizer"], to_b["keep_optimizer"]) == (None, True, True)
    assert not to_c["keep_optimizer"]
    assert len({to_b["init"], to_c["init"], done.model, None}) == 4
    assert done.notes["first_safe_share"] == 0.5
    assert done.notes["last_safe_share"] == 0.75
    # One draw of both captions for all phases, and two different draws.
    assert lab.texts[0] == lab.texts[1] == lab.texts[2]
    assert lab.texts[0]["eda"] == eda_text(EdaMode.STATIC, "lexicon", VICTIM.seed)
    assert lab.texts[0]["eda_again"] != lab.texts[0]["eda"]


@pytest.mark.parametrize(
    ("fields", "epochs", "start", "lengths"),
    [
        ({}, 8, START, (1, 1, 6)),
        ({}, 8, None, (5, 1, 2)),
        ({}, 4, None, (2, 1, 1)),
        ({}, 2, START, (0, 1, 1)),
        ({}, 1, START, (0, 0, 1)),
        ({"unimodal_epochs": 10}, 32, None, (10, 1, 21)),
        ({"filter_epochs": 0}, 32, None, (5, 0, 27)),
        ({"filter_epochs": 2, "unimodal_epochs": 0}, 3, START, (0, 2, 1)),
        ({"unimodal_epochs": 1}, 2, START, (1, 0, 1)),
    ],
)
def test_the_phases_lengths(
    fields: dict[str, Any], epochs: int, start: ModelRef | None, lengths: tuple[int, int, int]
) -> None:
    lab, done = planned(SafeClip(**fields), replace(VICTIM, epochs=epochs), start)
    assert [recipe.epochs for _, recipe, _ in lab.asked] == [n for n in lengths if n]
    assert lab.asked[-1][0].split.epochs_before == lengths[0] + lengths[1]
    # The first fit is the victim's own start: its seed makes the random weights.
    assert lab.asked[0][1].seed == VICTIM.seed
    assert lab.asked[0][2]["init"] == start
    assert lab.asked[0][1].optimizer_state == OptimizerState.FRESH
    assert done.flagged is not None


def test_a_split_of_random_weights_judges_nothing() -> None:
    _, done = planned(SafeClip(unimodal_epochs=0, filter_epochs=0))
    assert done.flagged is None
    assert done.suspicion is None


def test_options_reach_the_plan() -> None:
    def third_of(**fields: Any) -> SafePhaseSpec:
        found: SafePhaseSpec = planned(SafeClip(**fields))[0].asked[-1][0]
        return found

    assert third_of(bank_size=300).bank_size == 300
    assert third_of(banks=False).bank_size is None
    assert third_of(train_risky=False).bank_size is None
    assert planned(SafeClip(), rows=300)[0].asked[0][0].bank_size == 64
    split = third_of(score_view=ScoreView.AUGMENTED).split
    assert split is not None
    assert split.scorer == PairCosine(crop_scale=(0.08, 1.0), seed=VICTIM.seed)
    lab, _ = planned(SafeClip(augment=False, score_view=ScoreView.AUGMENTED))
    assert lab.texts == []
    assert {spec.crop_scale for spec, _, _ in lab.asked} == {None}
    assert lab.asked[-1][0].split.scorer == PairCosine()
    assert planned(SafeClip(filter_lr=3e-6))[0].asked[1][1].lr == 3e-6
    lab, _ = planned(SafeClip(eda=EdaMode.PER_EPOCH))
    assert len({texts["eda"] for texts in lab.texts}) == 3


@pytest.mark.parametrize(
    "fields",
    [
        {"threshold": 1.5},
        {"increment": -0.1},
        {"cap": 2.0},
        {"unimodal_epochs": -1},
        {"filter_epochs": -2},
        {"bank_size": 0},
        {"filter_lr": 0.0},
        {"crop_scale": (0.0, 1.0)},
    ],
)
def test_plans_that_cannot_be_meant_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(fields))):
        SafeClip(**fields).check()


def test_recipes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UsageError, match="leave none of the recipe's 6"):
        planned(SafeClip(unimodal_epochs=6), replace(VICTIM, epochs=6), START)
    with pytest.raises(UsageError, match="lr: select"):
        planned(SafeClip(), replace(VICTIM, lr=Select()))


def test_the_whole_run_carries_moments_and_judges_every_row(
    small_store: Store, tmp_path: Path
) -> None:
    from victims.corpora import build_corpus

    store = Store(tmp_path / "store")
    build_corpus(store, corpus_spec("suspect", ROWS))
    data = DataRef(corpus_key(corpus_spec("suspect", ROWS)), ROWS)
    lab = Lab(store, MODEL, Runtime())
    recipe = replace(RECIPE, epochs=4)
    done = SafeClip(threshold=0.5, unimodal_epochs=1).apply(lab, case_of(recipe, None, data))
    models = [Key(key) for key in lab.ledger.made if key.startswith("model-")]
    assert len(models) == 3
    assert models[2] == done.model.key
    from safetensors.torch import load_file

    stored = [load_file(store.need(key).path("optimizer.safetensors")) for key in models[:2]]
    # Eight steps of phase A, and as many of phase B on top of them.
    assert {float(t) for n, t in stored[0].items() if n.endswith(".step")} == {8.0}
    assert {float(t) for n, t in stored[1].items() if n.endswith(".step")} == {16.0}
    rates = [record["lr"] for record in lab.curves(ModelRef(models[1]))]
    assert rates == [pytest.approx(1e-5)]
    # What the scan inside the fit saw is what the judgement is made from.
    curves = lab.curves(done.model)
    assert curves[0]["safe_rows"] == round(done.notes["first_safe_share"] * ROWS)
    assert curves[1]["safe_rows"] == round(done.notes["last_safe_share"] * ROWS)
    assert done.flagged is not None
    assert done.suspicion is not None
    first_N = ~done.sets["first_split"]
    c_N = -done.suspicion
    assert np.array_equal(first_N, two_gaussians(c_N).posterior_N >= 0.5)
    assert np.array_equal(-done.scores["posterior"] >= 0.5, first_N)
    late_N = -done.scores["finished"]
    size = RULE.size(int(first_N.sum()), 1, ROWS)
    assert size != (~done.flagged).sum(), "the default increment is a tenth of RULE's"
    expected = replace(RULE, increment=0.01).split(late_N, int(first_N.sum()), 1)
    assert np.array_equal(~done.flagged, expected)


def test_it_claims_to_be_exact_from_scratch_alone() -> None:
    assert fidelity_in(SafeClip(), Regime.S) is Fidelity.EXACT
    assert fidelity_in(SafeClip(), Regime.F) is Fidelity.ADAPTED
    assert resolved_needs(SafeClip(), Regime.S) == ["suspect_data"]
    assert resolved_needs(SafeClip(), Regime.F) == ["suspect_data", "reference"]


def test_a_bank_shows_the_nearest_of_what_it_holds() -> None:
    bank = Memory(9, 5).double()
    bank.push(features(1, 4))
    query = features(2, 6)
    assert torch.equal(bank.nearest(query), slow_nearest(query, features(1, 4)))
