"""CGD on classifiers: entropies, balance and terms against slow references, its limiting case."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from defenses.anp import Anp
from defenses.base import Case, Defended, Need, Recipes
from defenses.cgd_classifier import Balance, CgdClassifier
from tests.conftest import corpus_spec
from victims.batches import Batch
from victims.class_relearning import ClassRelearningSpec, balanced_copies, unlearn_labels
from victims.classifiers import ClassifierSpec
from victims.corpora import Reader, build_corpus, open_corpus, whole
from victims.draws import numpy_rng, torch_rng
from victims.entropy_split import Scale, Stop, entropies, split
from victims.errors import MethodFailure, UsageError
from victims.lab import DataRef, Lab, ModelRef
from victims.labelled import LabelledWorld
from victims.models import ModelSpec, fresh
from victims.recipe import Augment, ClassifierRecipe, Clock, Recipe, Runtime, Schedule
from victims.relearning import distill_term
from victims.store import Store
from victims.training import PlainClipSpec
from victims.world import CLASSES

SPEC, ROWS = ClassifierSpec(classes=CLASSES), 256
FIT = ClassifierRecipe(epochs=2, batch_size=32, lr=0.02, seed=4)
QUICK = CgdClassifier(
    batch_size=32, epochs=2, early_epochs=1, early_runs=2, early_batch_size=64, balance=Balance.NONE
)
TERMS = ClassRelearningSpec(
    alpha=0.5,
    beta=0.25,
    temperature=3.0,
    epsilon=1e-6,
    teacher_scale=20.0,
    augment=Augment.NONE,
    num_listed=8,
    most_rows=8,
    num_held=0,
)


def logits_of(seed: int, rows: int, classes: int) -> np.ndarray:
    return numpy_rng(0, "logits", seed).normal(size=(rows, classes)) * 3


# --- how hard a label is


@pytest.mark.parametrize("scale", [Scale.ONE, Scale.HUNDRED, Scale.MODEL])
def test_an_entropy_is_that_of_the_label_among_all_classes(scale: Scale) -> None:
    z, labels = logits_of(0, 6, 4) / 30, np.array([0, 3, 1, 2, 2, 0])
    factor = scale.value_of(14.0)
    assert factor == {"1": 1.0, "100": 100.0, "model": 14.0}[scale.value]
    found = entropies(z * factor, labels)
    for row, label in enumerate(labels):
        total = sum(math.exp(factor * value) for value in z[row])
        assert found[row] == pytest.approx(-math.log(math.exp(factor * z[row, label]) / total))


def test_a_sure_model_has_finite_entropies() -> None:
    assert entropies(np.array([[1e4, 0.0], [1e4, 0.0]]), np.array([0, 1])).tolist() == [0.0, 1e4]


def test_classes_may_go_by_other_numbers() -> None:
    judge, early = logits_of(1, 60, 5), logits_of(2, 60, 5)
    labels = numpy_rng(0, "labels").integers(0, 5, 60)
    own = split(entropies(judge, labels), entropies(early, labels), 0.2, 0.1)
    order = np.array([3, 0, 4, 1, 2])
    renamed = np.argsort(order)[labels]
    other = split(
        entropies(judge[:, order], renamed), entropies(early[:, order], renamed), 0.2, 0.1
    )
    assert np.array_equal(own.clean_N, other.clean_N)
    assert np.array_equal(own.triggered_N, other.triggered_N)


# --- balance


@given(
    st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=6, max_size=60),
    st.integers(0, 99),
)
def test_every_class_is_drawn_up_to_the_largest(rows: list[tuple[int, bool]], seed: int) -> None:
    labels = np.array([0, 1, 2, *(label for label, _ in rows)])
    clean = np.array([True] * 3 + [is_clean for _, is_clean in rows])
    copies = balanced_copies(labels, clean, 3, numpy_rng(seed))
    assert (copies[clean] >= 1).all()
    assert (copies[~clean] == 0).all()
    largest = max(np.bincount(labels[clean]))
    assert [int(copies[labels == label].sum()) for label in range(3)] == [largest] * 3


def test_an_empty_class_cannot_be_balanced() -> None:
    with pytest.raises(MethodFailure, match=r"no row of 1 of 3 classes \(the first: class 1\)"):
        balanced_copies(np.array([0, 2, 1]), np.array([True, True, False]), 3, numpy_rng(0))


# --- the terms


def batch_of(
    clean: list[bool], triggered: list[bool]
) -> tuple[Batch, np.ndarray, np.ndarray, np.ndarray]:
    """Eight rows under a classifier: the batch, its logits, the judge's cosines, the labels."""
    model = fresh(SPEC, 1)
    image = torch.randint(0, 256, (8, 3, 32, 32), generator=torch_rng(3)).byte()
    labels = numpy_rng(1, "y").integers(0, 20, 8)
    judge = torch.from_numpy(logits_of(5, 8, 20).astype(np.float32) / 30)
    columns = {
        "clean": torch.tensor(clean),
        "triggered": torch.tensor(triggered),
        "judge": judge,
    }
    tokens = torch.from_numpy(labels[:, None] + 1)
    batch = Batch(torch.arange(8), image, tokens, columns=columns, views={"image": image})
    # In training mode: the statistics are those of all eight rows.
    logits = model.train().embed_image(image).detach().double().numpy()
    return batch, logits, judge.double().numpy(), labels


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max())
    found: np.ndarray = e / e.sum()
    return found


@pytest.mark.parametrize(
    ("clean", "triggered"),
    [
        ([True, True, False, False, True, False, False, True], [False, False, True, True] * 2),
        ([False] * 8, [False] * 8),
    ],
)
def test_each_term_is_a_mean_over_its_own_rows(clean: list[bool], triggered: list[bool]) -> None:
    triggered = [t and not c for t, c in zip(triggered, clean, strict=True)]
    batch, logits, judge, labels = batch_of(clean, triggered)
    relearn, distill, unlearn = [], [], []
    for row, label in enumerate(labels):
        p = softmax(logits[row])[label]
        if clean[row]:
            relearn.append(-math.log(p))
        if triggered[row]:
            unlearn.append(math.log(p + 1e-6))
            q, r = softmax(20.0 * judge[row] / 3.0), softmax(logits[row] / 3.0)
            distill.append(9.0 * sum(a * math.log(a / b) for a, b in zip(q, r, strict=True)))
    model = fresh(SPEC, 1).train()
    terms = TERMS.build(model)(model, batch, Clock(0, 0, 1))
    found = {name: float(term.detach()) for name, term in terms.items()}
    assert found["relearn"] == pytest.approx(np.mean(relearn or [0]), rel=1e-4)
    assert found["distill"] == pytest.approx(0.5 * np.mean(distill or [0]), rel=1e-4)
    assert found["unlearn"] == pytest.approx(0.25 * np.mean(unlearn or [0]), rel=1e-4)
    torch.stack(list(terms.values())).sum().backward()  # type: ignore[no-untyped-call]
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


def test_a_student_that_agrees_with_its_judge_is_taught_nothing() -> None:
    judge = torch.from_numpy(logits_of(6, 4, 7))
    taught = distill_term(judge, judge + 5.0, 3.0)
    torch.testing.assert_close(taught, torch.zeros_like(taught))


def test_unlearning_has_a_floor() -> None:
    certain = torch.tensor([[0.0, 90.0]], dtype=torch.float64)
    assert float(unlearn_labels(certain, torch.tensor([0]), 1e-6)) == pytest.approx(-13.8155, 1e-4)
    uniform = torch.zeros(1, 20, dtype=torch.float64)
    wanted = math.log(1 / 20 + 1e-6)
    assert float(unlearn_labels(uniform, torch.tensor([3]), 1e-6)) == pytest.approx(wanted)


# --- the plan


class Scene:
    """A small labelled set, a judge and a victim in a store."""

    def __init__(self, folder: Path) -> None:
        store = Store(folder)
        pairs = build_corpus(store, corpus_spec("public", 128)).key
        key = build_corpus(store, LabelledWorld(of=corpus_spec("suspect", ROWS))).key
        self.data = DataRef(key, ROWS)
        self.lab = Lab(store, SPEC, Runtime())
        clip = Lab(store, ModelSpec(), Runtime())
        how = Recipe(epochs=1, batch_size=32, lr=2e-3, warmup_steps=1)
        self.judges = [
            clip.train(PlainClipSpec(), DataRef(pairs, 128), replace(how, seed=seed))
            for seed in (1, 2)
        ]
        self.victim = self.lab.train(self.lab.plain(FIT), self.data, FIT)

    def apply(self, defense: CgdClassifier, judge: ModelRef | None = None) -> Defended:
        grants: dict[Need, Any] = {
            Need.VICTIM: lambda: self.victim,
            Need.SUSPECT_DATA: lambda: self.data,
            Need.REFERENCE: lambda: judge or self.judges[0],
        }
        return defense.apply(self.lab, Case("cgd", grants, (Recipes(victim=FIT, repair=FIT), 4)))


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return Scene(tmp_path_factory.mktemp("store"))


def test_without_its_terms_and_its_split_it_is_plain_fine_tuning(scene: Scene) -> None:
    limit = replace(QUICK, alpha=0.0, beta=0.0, sigma1=0.0, sigma2=0.0)
    recipe = ClassifierRecipe(
        epochs=2,
        batch_size=32,
        lr=limit.lr,
        momentum=0.0,
        schedule=Schedule.CONSTANT,
        seed=4,
    )
    tuned = scene.lab.train(scene.lab.plain(recipe), scene.data, recipe, init=scene.victim)
    ours = scene.lab.load(scene.apply(limit).model).state_dict()
    theirs = scene.lab.load(tuned).state_dict()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=1e-5)


def test_it_judges_by_ranks_under_both_models(scene: Scene) -> None:
    done = scene.apply(QUICK)
    view = whole(open_corpus(scene.lab.store, scene.data.key, Reader.TRAINING))
    clip = scene.lab.load(scene.judges[0])
    with torch.no_grad():
        prompts = torch.from_numpy(clip.tokenizer([f"a photo of a {n}" for n in CLASSES])).long()
        pictures = clip.encode_image(torch.from_numpy(view.corpus.images_NCHW[:].copy()))
        cosines = (pictures @ clip.encode_text(prompts).T).double().numpy()
    hardness = entropies(cosines, view.corpus.labels)
    ranks = (hardness[:, None] >= hardness).sum(1) / ROWS
    assert np.abs(done.scores["judge"] - ranks).max() < 3 / ROWS
    assert done.flagged is not None
    easy = 1 - done.scores["early"] < 0.1 - 1e-6
    assert np.array_equal(done.flagged, (done.scores["judge"] > 0.9 + 1e-6) | easy)
    assert done.notes["num_triggered"] == done.flagged.sum()
    assert done.notes["num_clean"] == (~done.sets["not_clean"]).sum()
    # 256 rows, two epochs of (rows outside the clean split + the clean split) / 32 steps.
    assert done.notes["u"] == pytest.approx(0.025 * 0.01 * 2 * (ROWS // 32))


def test_another_judge_changes_what_the_judge_says_and_nothing_else(scene: Scene) -> None:
    scene.apply(QUICK)
    scene.lab.ledger.made.clear()
    first, second = scene.apply(QUICK), scene.apply(QUICK, scene.judges[1])
    kinds = sorted(key.split("-")[0] for key in scene.lab.ledger.made)
    # Its features of the pictures and the repair; both early models and what they say are there.
    assert kinds == ["model", "score"]
    assert np.array_equal(first.scores["early"], second.scores["early"])
    assert not np.array_equal(first.scores["judge"], second.scores["judge"])


def test_a_listed_row_is_shown_as_often_as_balance_says(scene: Scene) -> None:
    found = scene.apply(replace(QUICK, sigma1=0.01, sigma2=0.01, balance=Balance.RESAMPLE))
    labels = scene.lab.labels(scene.data)
    kept = ~found.sets["not_clean"]
    listed = np.bincount(labels[kept], minlength=20).max() * 20 + int((~kept).sum())
    (first, *_) = scene.lab.curves(found.model)
    assert first["steps"] == listed // 32


def test_it_ends_when_held_out_labels_are_forgotten(scene: Scene) -> None:
    # Steps that large teach nothing but how to forget.
    wild = replace(QUICK, lr=0.5, beta=4.0, epochs=6, stop=Stop.HELD_OUT)
    assert scene.apply(wild).notes["epochs"] < 6
    calm = replace(QUICK, lr=1e-6, epochs=3, stop=Stop.HELD_OUT)
    done = scene.apply(calm)
    assert done.notes["epochs"] == 3
    assert {"held_out"} <= set(scene.lab.curves(done.model)[0])


def test_the_clean_split_can_be_handed_to_another_defense(scene: Scene) -> None:
    done = scene.apply(replace(QUICK, repair="finetune"))
    kept = np.flatnonzero(~done.sets["not_clean"])
    clean = scene.lab.subset(scene.data, kept)
    assert done.model == scene.lab.train(scene.lab.plain(FIT), clean, FIT, init=scene.victim)
    assert "u" not in done.notes


def test_it_is_handed_to_a_variant_of_another_defense() -> None:
    (small,) = replace(CgdClassifier(), repair="anp:small").employs()
    assert small == Anp(**Anp.variants["small"])
    (default,) = replace(CgdClassifier(), repair="anp").employs()
    assert default == Anp() != small


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sigma1": 1.0}, r"sigma1 must be in \[0, 1\)"),
        ({"sigma1": 0.05}, "at most sigma1: no row is relearned and unlearned"),
        ({"prompt": "a photo"}, "prompt must be a text with one {} for the class"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\)"),
        ({"early_runs": 0}, "early_runs must be at least 1"),
        ({"lr": 0.0}, "lr must be above 0"),
        ({"repair": "finetun"}, "repair: no defense called 'finetun'. Did you mean 'finetune'"),
        ({"repair": "cleanclip"}, "repair: cleanclip is defined on track multimodal"),
        ({"repair": "anp:smal"}, "no variant of anp called 'smal'. Did you mean 'small'"),
        ({"repair": "finetune:small"}, "no variant of finetune called 'small'. Known: it has none"),
    ],
)
def test_what_cannot_be_meant_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        replace(CgdClassifier(), **fields).check()
