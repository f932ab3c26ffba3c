"""Local outliers: the detectors against loops written from their equations, and what is dropped."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from defenses.base import Case, Defended, Defense, Need, Recipes, Truth
from defenses.controls import OracleFilter, RandomFilter
from defenses.local_outlier import LocalOutlier, Reference, Retrain
from tests.conftest import corpus_spec
from victims import outliers
from victims.batches import Scorer, score_rows
from victims.corpora import Reader, build_corpus, corpus_key, open_corpus, whole
from victims.draws import derive, numpy_rng, torch_rng
from victims.errors import Forbidden, MethodFailure, UsageError
from victims.lab import DataRef, Lab, ModelRef
from victims.measuring import separation
from victims.models import ModelSpec, fresh
from victims.outlier_scores import Query
from victims.outliers import (
    CAP,
    LOCAL,
    Detector,
    ImageEmbeddings,
    Indexing,
    Pool,
    TextEmbeddings,
    forest_scores,
    local_scores,
    pair_scores,
    reference_batches,
    surroundings,
)
from victims.recipe import Recipe, Runtime
from victims.selection import ImageFeatures, TextFeatures
from victims.store import Store
from victims.training import PlainClipSpec

ORDERED = sorted(LOCAL)
FIT = Recipe(epochs=1, batch_size=32, lr=2e-3, warmup_steps=1)
ROWS, R, K = 160, 48, 4


def normal(*shape: int, key: str = "x") -> Tensor:
    return torch.randn(*shape, generator=torch_rng(0, key), dtype=torch.float64)


def pool_of(*sides: Tensor) -> Pool:
    return Pool(torch.cat(sides), torch.arange(len(sides[0])).repeat(len(sides)))


def score(detector: Detector, features: Tensor, k: int, **more: Any) -> Tensor:
    """Of pictures against each other."""
    pool = pool_of(features)
    return local_scores(detector, pool, pool, k, **more)


# --- loops, from the equations

Distances = list[list[float]]


def distances(queries: Tensor, pool: Tensor) -> Distances:
    return [[math.dist(x, y) for y in pool.tolist()] for x in queries.tolist()]


def slow_lid(nearest: Sequence[float], last: float) -> float:
    if last == 0:
        return CAP
    total = sum(math.log(max(d / last, 1e-4)) for d in nearest)
    return CAP if total == 0 else min(CAP, -len(nearest) / total)


def slow_scores(
    detector: Detector, sides: Sequence[Tensor], query: int, k: int, released: bool = False
) -> list[float]:
    """Scores of one side of N pairs against all ``sides`` of all other pairs."""
    num_pairs, pool = len(sides[0]), torch.cat(list(sides))
    everything = distances(pool, pool)

    def ranked(place: int, leave_out: bool) -> list[tuple[float, int]]:
        """The pool by distance, each member with the number that it is looked up by."""
        left = [
            p for p in range(len(pool)) if not (leave_out and p % num_pairs == place % num_pairs)
        ]
        numbers = range(len(left)) if released else left
        return sorted((everything[place][p], n) for p, n in zip(left, numbers, strict=True))

    def summary(place: int, leave_out: bool) -> tuple[float, float, list[int]]:
        found = ranked(place, leave_out)
        last = found[k if released else k - 1][0]
        return last, slow_lid([d for d, _ in found[:k]], last), [n for _, n in found[:k]]

    scores = []
    for pair in range(num_pairs):
        kd, lid, neighbours = summary(query * num_pairs + pair, True)
        there = [summary(n, not released)[:2] for n in neighbours]
        found = {
            Detector.K_DIST: [kd],
            Detector.LID: [lid],
            Detector.SLOF: [kd / other for other, _ in there],
            Detector.DAO: [of * math.log(kd / other) for other, of in there],
        }[detector]
        scores.append(sum(found) / len(found))
    return scores


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("detector", ORDERED)
def test_the_detectors_are_their_equations(detector: Detector, released: bool) -> None:
    image, text = normal(14, 3), normal(14, 3, key="text") + 0.5
    indexing = Indexing.RELEASED if released else Indexing.CONSISTENT
    for query, sides in ((0, [image]), (0, [image, text]), (1, [image, text])):
        pool = pool_of(*sides)
        own = slice(query * 14, query * 14 + 14)
        found = local_scores(detector, Pool(pool[0][own], pool[1][own]), pool, 3, indexing)
        expected = slow_scores(detector, sides, query, 3, released)
        assert found.tolist() == pytest.approx(expected, rel=1e-12)


def test_points_on_a_line() -> None:
    points = torch.tensor([*range(10), 20.0])[:, None]
    assert score(Detector.K_DIST, points, 2).tolist() == [2, *[1] * 8, 2, 12]
    assert score(Detector.SLOF, points, 2).tolist() == [2, 0.75, *[1] * 6, 0.75, 2, 9]
    released = {"indexing": Indexing.RELEASED}
    assert score(Detector.K_DIST, points, 2, **released)[-1] == 13
    assert score(Detector.SLOF, points, 2, **released)[-1] == 9.75


@pytest.mark.parametrize(
    ("dimension", "consistent", "query", "neighbour"),
    [(2, 2.2, 2.1, 0.97), (8, 8.3, 7.8, 1.44), (32, 23, 21.6, 1.62)],
)
def test_the_dimension_of_a_cloud(
    dimension: int, consistent: float, query: float, neighbour: float
) -> None:
    """Too small in many dimensions; the released one of neighbours hardly depends on it."""
    pool = pool_of(normal(2048, dimension))
    found = [
        surroundings(pool, pool, 16).lid_Q,
        surroundings(pool, pool, 16, Indexing.RELEASED).lid_Q,
        surroundings(pool.unpaired(), pool, 16, Indexing.RELEASED).lid_Q,
    ]
    medians = [float(lid.median()) for lid in found]
    assert medians == pytest.approx([consistent, query, neighbour], rel=0.03)


# --- what a score does not depend on


@pytest.mark.parametrize("detector", ORDERED)
def test_scale_rotation_shift_and_order(detector: Detector) -> None:
    points = normal(60, 5)
    plain = score(detector, points, 6)
    scaled = plain * (40 if detector == Detector.K_DIST else 1)
    assert torch.allclose(score(detector, points * 40, 6), scaled)
    rotation = torch.linalg.qr(normal(5, 5, key="rotation")).Q
    assert torch.allclose(score(detector, points @ rotation, 6), plain)
    order = torch.randperm(60, generator=torch_rng(0, "order"))
    assert torch.allclose(score(detector, points[order], 6), plain[order])
    # Far from the origin a distance from products of matrices would be off by a tenth.
    assert torch.allclose(score(detector, points + 1e8, 6), plain, rtol=1e-5)


def test_the_ratio_without_dimension_is_below_the_logarithm_of_slof(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    points = normal(50, 4)
    monkeypatch.setattr(
        outliers, "local_dimension", lambda distance_QK, kd_Q: torch.ones_like(kd_Q)
    )
    dao, slof = [score(d, points, 5) for d in (Detector.DAO, Detector.SLOF)]
    assert (dao < slof.log()).all()
    pool = pool_of(points)
    kd, _, index = surroundings(pool, pool, 5)
    assert torch.allclose(dao, kd.log() - kd[index].log().mean(1))


@pytest.mark.parametrize("detector", ORDERED)
@pytest.mark.parametrize("indexing", Indexing)
def test_the_size_of_the_chunks(
    detector: Detector, indexing: Indexing, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = normal(40, 3)
    plain = score(detector, points, 4, indexing=indexing)
    monkeypatch.setattr(outliers, "CHUNK", 7 * 40)
    assert torch.equal(score(detector, points, 4, indexing=indexing), plain)


def test_its_own_caption_is_no_neighbour() -> None:
    image, text = normal(30, 3), normal(30, 3, key="text")
    moved = text.clone()
    moved[7] = image[7] + 1e-3
    before, after = [
        surroundings(pool_of(image), pool_of(image, side), 3) for side in (text, moved)
    ]
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old[7], new[7])
    others = torch.arange(30) != 7
    assert (before.kd_Q[others] > after.kd_Q[others]).any()
    slof = [
        local_scores(Detector.SLOF, pool_of(image), pool_of(image, side), 3)
        for side in (text, moved)
    ]
    assert (slof[0] != slof[1])[others].any()


# --- degenerate distances


@pytest.mark.parametrize("detector", ORDERED)
def test_duplicates_give_numbers(detector: Detector) -> None:
    points = normal(40, 3)
    points[1] = points[0]
    once = score(detector, points, 4)
    assert once.isfinite().all()
    assert (once < CAP).all()
    points[1:6] = points[0]
    found = score(detector, points, 4)
    assert found.isfinite().all()
    undefined = 0.0 if detector == Detector.K_DIST else CAP
    assert (found[:6] == undefined).all()
    assert float(found[6:].min()) < CAP


def test_equal_distances_have_no_dimension() -> None:
    corners = torch.eye(9)
    assert (score(Detector.LID, corners, 4) == CAP).all()
    assert torch.allclose(score(Detector.SLOF, corners, 4), torch.ones(9, dtype=torch.float64))


# --- poisons among each other


def toy(num_poisons: int) -> tuple[Tensor, npt.NDArray[np.bool_]]:
    """40 clean clusters and a loose one of poisons, in 64 dimensions."""
    num_clean = 1024 - num_poisons
    centres = normal(41, 64, key="centres")
    which = torch.arange(num_clean) % 40
    clean = centres[which] + 0.3 * normal(num_clean, 64, key="clean")
    poison = centres[40] + 0.6 * normal(num_poisons, 64, key="poison")
    return torch.cat([clean, poison]), np.arange(1024) >= num_clean


def auroc(detector: Detector, num_poisons: int) -> float:
    features, poisoned = toy(num_poisons)
    found = separation(score(detector, features, 16).float().numpy(), poisoned)
    return float(found["auroc"].as_dict()["value"])


@pytest.mark.parametrize("detector", [Detector.SLOF, Detector.DAO])
def test_more_poisons_than_neighbours_hide_each_other(detector: Detector) -> None:
    assert auroc(detector, 8) > 0.99
    assert auroc(detector, 40) < 0.9


def test_the_distance_itself_does_not_mind() -> None:
    assert min(auroc(Detector.K_DIST, num) for num in (8, 40)) > 0.99


# --- the other detectors, and the batches


def test_pairs_that_disagree_are_suspicious() -> None:
    image = normal(5, 4)
    text = image * 3
    text[2] = -text[2]
    assert pair_scores(image, text).tolist() == pytest.approx([-1, -1, 1, -1, -1])


def test_the_forest_isolates_the_outlier() -> None:
    points = normal(200, 6).float()
    points[11] += 8
    found = forest_scores(points, points, seed=2**62 + 1)
    assert int(found.argmax()) == 11
    assert torch.equal(found, forest_scores(points, points, seed=2**62 + 1))
    assert not torch.equal(found, forest_scores(points, points, seed=2))


@pytest.mark.parametrize(("num_rows", "size"), [(160, 48), (96, 48), (20, 48), (97, 96)])
def test_every_row_is_scored_once_in_a_full_batch(num_rows: int, size: int) -> None:
    order = numpy_rng(0, "order").permutation(num_rows)
    batches = list(reference_batches(order, size))
    assert np.array_equal(np.concatenate([rows[:num] for rows, num in batches]), order)
    for rows, num in batches:
        assert len(set(rows.tolist())) == len(rows) == min(size, num_rows)
        assert np.array_equal(rows[num:], order[: len(rows) - num])


# --- features


def test_captions_before_their_length_becomes_one() -> None:
    model = fresh(ModelSpec(), 0)
    tokens = torch.from_numpy(model.tokenizer(["a photo of a red circle", "a dog"])).long()
    with torch.no_grad():
        plain = model.embed_text(tokens)
        assert torch.equal(F.normalize(plain, dim=-1), model.encode_text(tokens))
    assert not torch.allclose(plain.norm(dim=-1), torch.ones(2))
    assert (model.meter.texts_forward, model.meter.texts_backward) == (4, 0)


# --- the defense


@dataclass
class Scene:
    """A victim with its data, and a defense on them."""

    store: Store
    data: DataRef
    clean: DataRef
    start: ModelRef
    victim: ModelRef
    poisoned: npt.NDArray[np.bool_]

    def lab(self) -> Lab:
        return Lab(self.store, ModelSpec(), Runtime())

    def case(self, defense: Defense, seed: int = 0) -> Case:
        grants: dict[Need, Callable[[], Any]] = {
            Need.SUSPECT_DATA: lambda: self.data,
            Need.CLEAN_DATA: lambda: self.clean,
            Need.VICTIM: lambda: self.victim,
            Need.START: lambda: self.start,
            Need.TRUTH: lambda: Truth(self.poisoned, self.data),
        }
        given = {need: give for need, give in grants.items() if need in defense.needed()}
        return Case(defense.name, given, (Recipes(victim=FIT, repair=FIT), seed))

    def apply(self, defense: Defense, seed: int = 0) -> Defended:
        return defense.apply(self.lab(), self.case(defense, seed))

    def suspicion(self, seed: int = 0, **fields: Any) -> npt.NDArray[np.float32]:
        found = self.apply(quick(retrain=Retrain.NONE, **fields), seed).suspicion
        assert found is not None
        return found

    def features(self, data: DataRef, unit: bool = False) -> list[Tensor]:
        """Of pictures and captions, as the model gives them or of length 1."""
        raw = (ImageEmbeddings(), TextEmbeddings())
        scorers: Sequence[Scorer] = (ImageFeatures(), TextFeatures()) if unit else raw
        model = self.lab().load(self.victim)
        view = whole(open_corpus(self.store, data.key, Reader.TRAINING))
        return [torch.from_numpy(score_rows(model, view, scorer)) for scorer in scorers]


def quick(**fields: Any) -> LocalOutlier:
    return LocalOutlier(**{"reference_rows": R, "k": K, **fields})


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    store = Store(tmp_path_factory.mktemp("outliers"))
    specs = [corpus_spec("suspect", ROWS), corpus_spec("clean", 64)]
    for spec in specs:
        build_corpus(store, spec)
    data, clean = [DataRef(corpus_key(spec), spec.num_rows) for spec in specs]
    lab = Lab(store, ModelSpec(), Runtime())
    start = lab.train(PlainClipSpec(), clean, replace(FIT, seed=9))
    victim = lab.train(PlainClipSpec(), data, FIT, init=start)
    return Scene(store, data, clean, start, victim, numpy_rng(0, "truth").random(ROWS) < 0.1)


def by_hand(
    detector: Detector, sides: Sequence[Tensor], k: int, seed: int = 0, turn: int = 0
) -> npt.NDArray[np.float64]:
    """Every row in its batch of the shuffle, the last of which begins again."""
    order, scores = numpy_rng(seed, "outliers", turn).permutation(ROWS), np.zeros(ROWS)
    for start in range(0, ROWS, R):
        rows = np.take(order, range(start, start + R), mode="wrap")
        fresh = min(R, ROWS - start)
        scores[rows[:fresh]] = slow_scores(detector, [s[rows] for s in sides], 0, k)[:fresh]
    return scores


@pytest.mark.parametrize("detector", ORDERED)
def test_scores_are_those_of_each_batch(scene: Scene, detector: Detector) -> None:
    expected = by_hand(detector, scene.features(scene.data)[:1], K)
    found = scene.suspicion(detector=detector, texts=False)
    assert found.dtype == np.float32
    assert found == pytest.approx(expected, rel=1e-5)


def test_captions_join_the_reference(scene: Scene) -> None:
    expected = by_hand(Detector.K_DIST, scene.features(scene.data), K)
    found = scene.suspicion(detector=Detector.K_DIST)
    assert found == pytest.approx(expected, rel=1e-5)
    image, text = scene.features(scene.data)
    asked = scene.suspicion(detector=Detector.K_DIST, query=Query.TEXT)
    assert asked == pytest.approx(by_hand(Detector.K_DIST, [text, image], K), rel=1e-5)
    assert not np.array_equal(asked, found)


def test_features_of_length_one(scene: Scene) -> None:
    expected = by_hand(Detector.SLOF, scene.features(scene.data, unit=True)[:1], K)
    found = scene.suspicion(detector=Detector.SLOF, texts=False, normalize=True)
    assert found == pytest.approx(expected, rel=1e-4)


def test_rounds_are_averaged_over_shuffles(scene: Scene) -> None:
    images = scene.features(scene.data)[:1]
    turns = [by_hand(Detector.SLOF, images, K, seed=3, turn=turn) for turn in range(2)]
    fields: dict[str, Any] = {"detector": Detector.SLOF, "texts": False}
    assert scene.suspicion(3, rounds=2, **fields) == pytest.approx(np.mean(turns, 0), rel=1e-5)
    assert scene.suspicion(3, **fields) == pytest.approx(turns[0], rel=1e-5)
    assert not np.allclose(turns[0], turns[1], rtol=1e-3)


@pytest.mark.parametrize("detector", [Detector.K_DIST, Detector.SLOF])
def test_a_clean_reference_is_drawn_once_and_leaves_nothing_out(
    scene: Scene, detector: Detector
) -> None:
    (image, _), (clean, _) = scene.features(scene.data), scene.features(scene.clean)
    pool = clean[numpy_rng(0, "reference", 0).permutation(64)[:R]]
    sizes = [sorted(row)[K - 1] for row in distances(image, pool)]
    expected = sizes
    if detector == Detector.SLOF:
        within = [sorted(row)[K] for row in distances(pool, pool)]
        near = [np.argsort(row, kind="stable")[:K] for row in distances(image, pool)]
        ratios = [[size / within[y] for y in ys] for size, ys in zip(sizes, near, strict=True)]
        expected = [float(np.mean(row)) for row in ratios]
    found = scene.suspicion(detector=detector, texts=False, reference=Reference.CLEAN)
    assert found == pytest.approx(expected, rel=1e-5)


def test_pairs_and_forests_are_scored(scene: Scene) -> None:
    image, text = scene.features(scene.data, unit=True)
    found = scene.suspicion(detector=Detector.CLIP_SCORE)
    assert found == pytest.approx(-(image * text).sum(1).numpy(), abs=1e-5)
    (image, text), clean = scene.features(scene.data), scene.features(scene.clean)
    order = numpy_rng(0, "outliers", 0).permutation(ROWS)
    drawn = numpy_rng(0, "reference", 0).permutation(64)
    forest = {"detector": Detector.ISOLATION_FOREST, "trees": 5, "reference_rows": 2048}
    cases: list[tuple[dict[str, Any], list[Tensor]]] = [
        (forest, [image[order], text[order]]),
        ({**forest, "texts": False}, [image[order]]),
        ({**forest, "reference": Reference.CLEAN}, [side[drawn] for side in clean]),
    ]
    for fields, pool in cases:
        expected = forest_scores(image, torch.cat(pool), derive(0, "forest", 0, 0), trees=5)
        assert np.array_equal(scene.suspicion(**fields), expected.float().numpy())


def test_the_neighbours_by_default() -> None:
    assert {d: LocalOutlier(detector=d).neighbours for d in ORDERED} == {
        "dao": 16,
        "slof": 16,
        "k_dist": 16,
        "lid": 64,
    }
    assert LocalOutlier(detector=Detector.LID, k=5).neighbours == 5


def test_the_same_number_spelled_out_is_the_same_scores(scene: Scene) -> None:
    lab = scene.lab()
    made = []
    for k in (None, 16, 17):
        defense = quick(k=k, retrain=Retrain.NONE)
        defense.apply(lab, scene.case(defense))
        made.append(len(lab.ledger.made))
    assert made == [1, 1, 2]


# --- filtering


def given(monkeypatch: pytest.MonkeyPatch, scores: npt.NDArray[Any]) -> None:
    """Let the lab find these scores."""

    def tensor(*asked: object) -> Mapping[str, Tensor]:
        return {"score": torch.from_numpy(scores.astype(np.float32))}

    monkeypatch.setattr(Lab, "tensor", tensor)


def test_dropping_nothing_is_the_victim_itself(scene: Scene) -> None:
    lab, defense = scene.lab(), quick(drop=0)
    done = defense.apply(lab, scene.case(defense))
    assert done.model == scene.victim
    assert [key.split("-")[0] for key in lab.ledger.made if key.startswith("model")] == []
    assert done.flagged is not None
    assert not done.flagged.any()


def test_the_highest_scores_are_dropped(scene: Scene) -> None:
    done = scene.apply(quick(texts=False, drop=0.25))
    assert done.flagged is not None
    assert done.suspicion is not None
    assert done.flagged.sum() == 40
    assert done.suspicion[done.flagged].min() > done.suspicion[~done.flagged].max()
    assert done.model not in (scene.victim, scene.start)
    lab = scene.lab()
    kept = lab.subset(scene.data, np.flatnonzero(~done.flagged))
    assert done.model == lab.train(PlainClipSpec(), kept, FIT, init=scene.start)


def test_equal_scores_are_dropped_in_row_order(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    given(monkeypatch, np.where(np.arange(ROWS) == 50, 2, 1))
    done = scene.apply(quick(drop=0.029, retrain=Retrain.NONE))
    assert done.flagged is not None
    assert np.flatnonzero(done.flagged).tolist() == [0, 1, 2, 50]


def test_the_truth_as_score_is_the_oracle(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, scene.poisoned)
    done = scene.apply(quick(drop=float(scene.poisoned.mean())))
    assert np.array_equal(np.asarray(done.flagged), scene.poisoned)
    assert done.model == scene.apply(OracleFilter()).model


def test_random_scores_are_the_random_filter(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    control = scene.apply(RandomFilter(fraction=0.1))
    assert control.flagged is not None
    given(monkeypatch, numpy_rng(0, "scores").random(ROWS) + control.flagged)
    assert scene.apply(quick(drop=0.1)).model == control.model


def test_detecting_alone_trains_nothing(scene: Scene) -> None:
    lab, defense = scene.lab(), quick(retrain=Retrain.NONE, detector=Detector.K_DIST, rounds=3)
    done = defense.apply(lab, scene.case(defense))
    assert done.model == scene.victim
    assert np.asarray(done.flagged).sum() == 16
    assert [key.split("-")[0] for key in lab.ledger.made] == ["tensor"]


# --- what it says, needs and refuses


def test_notes_tell_the_rate_that_the_setting_bears(scene: Scene) -> None:
    def notes(**fields: Any) -> Mapping[str, float]:
        return scene.apply(quick(retrain=Retrain.NONE, texts=False, **fields)).notes

    common = {"k": 4.0, "dropped": 16.0, "capped": 0.0}
    assert notes() == {**common, "reference_rows": 48.0, "largest_rate": 4 / 48}
    assert notes(reference_rows=2048)["largest_rate"] == 4 / ROWS
    clean = {"reference": Reference.CLEAN, "reference_rows": 2048}
    assert notes(**clean) == {**common, "reference_rows": 64.0}
    assert notes(detector=Detector.CLIP_SCORE) == {"dropped": 16.0, "capped": 0.0}


def test_a_rate_that_the_setting_does_not_bear_is_warned_of() -> None:
    defense = LocalOutlier(reference_rows=512, k=16)
    assert defense.caution(0.01, 5000) == ""
    assert defense.caution(0.05, 5000).startswith("0.05 of 512 reference rows are 25.6 expected")
    assert "R < 320" in defense.caution(0.05, 5000)
    assert defense.caution(0.05, 300) == "", "no more reference rows than there are pairs"
    for silent in (
        LocalOutlier(reference=Reference.CLEAN),
        LocalOutlier(detector=Detector.CLIP_SCORE),
    ):
        assert silent.caution(0.5, 5000) == ""


def test_needs_follow_the_fields(scene: Scene) -> None:
    seen = {Need.VICTIM, Need.SUSPECT_DATA}
    assert LocalOutlier().needed() == LocalOutlier.needs == seen | {Need.START}
    assert LocalOutlier(retrain=Retrain.NONE).needed() == seen
    clean = LocalOutlier(reference=Reference.CLEAN, retrain=Retrain.NONE)
    assert clean.needed() == seen | {Need.CLEAN_DATA}
    for defense in (LocalOutlier(), clean):
        with pytest.raises(Forbidden):
            _ = scene.case(defense).truth


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"drop": 1.0}, r"drop must be in \[0, 1\), got 1"),
        ({"drop": -0.1}, "drop must be in"),
        ({"rounds": 0}, "rounds must be at least 1, got 0"),
        ({"trees": 0}, "trees must be at least 1"),
        ({"k": 1}, r"k must lie in 2\.\.2046"),
        ({"reference_rows": 17}, r"k must lie in 2\.\.15, two below reference_rows, got 16"),
        ({"detector": Detector.LID, "reference_rows": 65}, "got 64"),
        ({"query": Query.TEXT, "texts": False}, "texts: true or query: image"),
        ({"reference": Reference.CLEAN, "detector": Detector.CLIP_SCORE}, "has no reference"),
        ({"reference": Reference.CLEAN, "indexing": Indexing.RELEASED}, "indexing: consistent"),
    ],
)
def test_what_cannot_be_meant_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        LocalOutlier(**fields).check()


def test_too_few_rows_for_the_neighbours(scene: Scene) -> None:
    with pytest.raises(MethodFailure, match=r"64 neighbours among 64 reference rows.* at most 62"):
        scene.apply(LocalOutlier(detector=Detector.LID, reference=Reference.CLEAN))
