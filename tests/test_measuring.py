"""Measuring: hand values, stubs whose right answer is known, and no way to flatter an attack."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.conftest import corpus_spec
from victims.corpora import Corpus, Reader, corpus_key, open_corpus
from victims.errors import MethodFailure, UsageError
from victims.keys import Key
from victims.measuring import (
    Outcomes,
    Share,
    changed_share,
    check_classes,
    detection,
    metrics,
    outcomes,
    ranks,
    resolve_target,
    separation,
    templates_digest,
    text_head,
    wilson,
)
from victims.models import ModelSpec, WordTokenizer, fresh
from victims.store import Store
from victims.words import world_vocabulary
from victims.world import CLASSES, TEMPLATES

CPU = torch.device("cpu")
NUM_CLASSES, TARGET = 5, 2


# --- intervals


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        (0, 16, 0.0, 0.1936),
        (2, 16, 0.0350, 0.3602),
        (15, 16, 0.7167, 0.9889),
        (25, 50, 0.3664, 0.6336),
        (45000, 49950, 0.8982, 0.9035),
        (0, 49950, 0.0, 0.00008),
        (16, 16, 1 - 0.1936, 1.0),
    ],
)
def test_wilson_by_hand(successes: int, n: int, low: float, high: float) -> None:
    assert wilson(successes, n) == pytest.approx((low, high), abs=6e-5)
    shown = Share(successes, n).as_dict()
    assert shown["value"] == pytest.approx(successes / n)
    assert (shown["successes"], shown["n"]) == (successes, n)
    assert (shown["low"], shown["high"]) == wilson(successes, n)


# --- ranks


def test_ranks_count_from_zero_and_ties_go_to_the_lower_index() -> None:
    score_BK = torch.tensor([[0.1, 0.9, 0.5], [0.5, 0.5, 0.5], [0.3, 0.7, 0.7], [3.0, 2.0, 1.0]])
    expected = [[2, 0, 1], [0, 1, 2], [2, 0, 1], [0, 1, 2]]
    for index in range(3):
        found = ranks(score_BK, torch.full((4,), index))
        assert found.tolist() == [row[index] for row in expected]


def test_ranks_are_a_stable_sort() -> None:
    generator = torch.Generator().manual_seed(0)
    score_BK = torch.randint(0, 4, (50, 7), generator=generator).float()
    order_BK = score_BK.argsort(dim=1, descending=True, stable=True)
    class_B = torch.randint(0, 7, (50,), generator=generator)
    slow = [row.tolist().index(int(c)) for row, c in zip(order_BK, class_B, strict=True)]
    assert ranks(score_BK, class_B).tolist() == slow
    assert torch.equal(ranks(score_BK, score_BK.argmax(1)) == 0, torch.ones(50, dtype=torch.bool))


# --- stubs: pictures carry their label in the first byte, a stamp sets the last byte


def made_corpus(labels: Sequence[int]) -> Corpus:
    label_N = np.array(labels, dtype=np.int64)
    images_NCHW = np.zeros((len(labels), 3, 4, 4), dtype=np.uint8)
    images_NCHW[:, 0, 0, 0] = label_N
    names = tuple(f"class {index}" for index in range(NUM_CLASSES))
    return Corpus(Key("corpus-" + "0" * 16), "d", "report", images_NCHW, [], label_N, names, ())


LABELS = [0, 1, 2, 3, 4, 2, 2, 0, 1, 3, 4, 0]
CORPUS = made_corpus(LABELS)
OTHERS = sum(label != TARGET for label in LABELS)


class Mark:
    def stamp(self, image_BCHW: Tensor) -> Tensor:
        marked = image_BCHW.clone()
        marked[:, -1, -1, -1] = 255
        return marked


class Untouched:
    """A stamp of no strength."""

    def stamp(self, image_BCHW: Tensor) -> Tensor:
        return image_BCHW.clone()


@dataclass
class Answers:
    """A model that answers the truth, or the target, on marked and on unmarked pictures."""

    marked_target: bool
    clean_target: bool = False
    calls: int = 0

    def encode_image(self, image_BCHW: Tensor) -> Tensor:
        self.calls += 1
        label_B = image_BCHW[:, 0, 0, 0].long()
        marked_B = image_BCHW[:, -1, -1, -1] == 255
        to_target_B = torch.where(
            marked_B, torch.tensor(self.marked_target), torch.tensor(self.clean_target)
        )
        answer_B = torch.where(to_target_B, torch.tensor(TARGET), label_B)
        return F.one_hot(answer_B, NUM_CLASSES).float()

    def encode_text(self, tokens_BT: Tensor) -> Tensor:
        raise AssertionError("not asked")


HEADS = (torch.eye(NUM_CLASSES), torch.eye(NUM_CLASSES))


def measured(encoder: Any, trigger: Any = None, ks: Sequence[int] = (1, 3)) -> dict[str, Share]:
    seen = outcomes(encoder, HEADS, CORPUS, trigger or Mark(), TARGET, CPU, batch_size=5)
    return metrics(seen, TARGET, NUM_CLASSES, ks)


def test_a_model_that_always_answers_the_target_has_all_of_it() -> None:
    """T01, T02: numerator and denominator leave out the target class, so the share is exactly 1."""
    found = measured(Answers(marked_target=True))
    assert found["asr_top1"] == Share(OTHERS, OTHERS)
    assert found["asr_top1"].value == 1.0
    assert found["clean_top1"] == Share(12, 12)
    assert found["target_rate_top1"] == Share(0, OTHERS)
    assert found["r_acc"] == Share(0, OTHERS)
    assert found["asr_all_top1"] == Share(12, 12)


def test_a_model_that_answers_the_truth_has_none_of_it() -> None:
    """T01: accuracy on triggered pictures is no success of the attack."""
    found = measured(Answers(marked_target=False))
    assert found["asr_top1"] == Share(0, OTHERS)
    assert found["r_acc"] == Share(OTHERS, OTHERS)
    # With the target's own pictures in both parts, as published tables count, it is not 0.
    assert found["asr_all_top1"] == Share(12 - OTHERS, 12)


def test_a_model_that_calls_everything_the_target_is_seen_through() -> None:
    found = measured(Answers(marked_target=True, clean_target=True))
    assert found["asr_top1"].value == 1.0
    assert found["target_rate_top1"] == Share(OTHERS, OTHERS)
    assert found["clean_top1"] == Share(12 - OTHERS, 12)


def test_a_stamp_of_no_strength_changes_nothing() -> None:
    """T12: clean and triggered pictures take the same way through the network."""
    seen = outcomes(Answers(True), HEADS, CORPUS, Untouched(), TARGET, CPU)
    assert np.array_equal(seen.clean_prediction, seen.triggered_prediction)
    assert np.array_equal(seen.clean_target_rank, seen.triggered_target_rank)
    found = measured(Answers(True), Untouched())
    assert found["asr_top1"] == found["target_rate_top1"]
    assert changed_share(CORPUS, Untouched()) == 0.0
    assert changed_share(CORPUS, Mark()) == 1.0


def test_the_denominator_of_imagenet_is_49950() -> None:
    """T02: 50 pictures of each of 1,000 classes, the target's left out."""
    label = np.repeat(np.arange(1000), 50).astype(np.int32)
    zero, one = np.zeros_like(label), np.ones_like(label)
    seen = Outcomes(zero, label, zero, zero, one, one, np.where(label == 7, 1, 0))
    found = metrics(seen, 7, 1000, (1,))
    assert found["asr_top1"] == Share(49950, 49950)
    assert found["asr_all_top1"] == Share(49950, 50000)
    assert found["clean_top1"].n == 50000


def test_every_k_counts_by_rank_and_meaningless_ones_are_left_out() -> None:
    label = np.array([0, 1, 2, 3], dtype=np.int32)
    rank = np.array([0, 2, 1, 3], dtype=np.int32)
    seen = Outcomes(label, label, label, label, rank, rank, rank)
    found = metrics(seen, 2, 5, (1, 3, 5, 10))
    assert found["clean_top1"] == Share(1, 4)
    assert found["clean_top3"] == Share(3, 4)
    assert found["asr_top1"] == Share(1, 3)
    assert found["asr_top3"] == Share(2, 3)
    assert {name for name in found if name.endswith(("top5", "top10"))} == set()


def test_nothing_but_the_target_class_is_an_error() -> None:
    two = np.full(3, 2, dtype=np.int32)
    with pytest.raises(UsageError, match="nothing but the target class"):
        metrics(Outcomes(two, two, two, two, two, two, two), 2, 5, (1,))


def test_outcomes_are_kept_per_picture_in_order() -> None:
    encoder = Answers(marked_target=True)
    seen = outcomes(encoder, HEADS, CORPUS, Mark(), TARGET, CPU, batch_size=5)
    assert encoder.calls == 6, "each batch goes through once clean and once triggered"
    columns = seen.columns()
    assert all(column.dtype == np.int32 for column in columns.values())
    assert columns["image"].tolist() == list(range(12))
    assert columns["label"].tolist() == LABELS
    assert columns["clean_prediction"].tolist() == LABELS
    assert columns["triggered_prediction"].tolist() == [TARGET] * 12
    assert columns["clean_true_rank"].tolist() == [0] * 12
    for size in (1, 12, 100):
        again = outcomes(Answers(True), HEADS, CORPUS, Mark(), TARGET, CPU, batch_size=size)
        assert all(np.array_equal(columns[name], again.columns()[name]) for name in columns)


class Diverged:
    """A model whose weights are no numbers any more."""

    def __init__(self, only_marked: bool) -> None:
        self.only_marked = only_marked

    def encode_image(self, image_BCHW: Tensor) -> Tensor:
        marked = bool((image_BCHW[:, -1, -1, -1] == 255).all())
        value = math.nan if marked or not self.only_marked else 1.0
        return torch.full((len(image_BCHW), NUM_CLASSES), value)


@pytest.mark.parametrize("only_marked", [False, True])
def test_a_diverged_model_is_an_outcome_and_no_perfect_score(only_marked: bool) -> None:
    """No class is above a NaN, so every rank would be 0: accuracy and success of 100 %."""
    with pytest.raises(MethodFailure, match="not finite: its weights have diverged"):
        measured(Diverged(only_marked))


# --- the target


NAMES = ["ski", "ski mask", "alpine ski", "mushroom", "skirt", "Ski", "hot dog"]


def test_a_target_is_an_index_or_an_exact_name() -> None:
    """T08: a search for part of a name finds several classes, or another one."""
    assert resolve_target("ski", NAMES) == 0
    assert resolve_target("Ski", NAMES) == 5
    assert resolve_target("hot dog", NAMES) == 6
    assert resolve_target(0, NAMES) == 0
    assert resolve_target(6, NAMES) == 6
    for wrong, says in {
        "mush": r"no class called 'mush'.*exact name or an index in 0\.\.6",
        "musroom": r"Did you mean 'mushroom'\?",
        "hot": "no class called 'hot'",
        "": "no class called ''",
    }.items():
        with pytest.raises(UsageError, match=says):
            resolve_target(wrong, NAMES)
    for index in (-1, 7):
        with pytest.raises(UsageError, match=rf"class {index} is outside 0\.\.6"):
            resolve_target(index, NAMES)
    with pytest.raises(UsageError, match="Classes: ski, ski mask, alpine ski, mushroom, skirt"):
        resolve_target("banana", NAMES)
    with pytest.raises(UsageError, match=r"Some of the 1000 classes: c0, c50, .*, c950\.$"):
        resolve_target("banana", [f"c{number}" for number in range(1000)])
    with pytest.raises(UsageError, match=r"'ski' names the classes \[0, 2\]; give an index"):
        resolve_target("ski", ["ski", "x", "ski"])


def test_class_names_must_be_unique() -> None:
    """T09: equal names are equal text weights."""
    check_classes(NAMES)
    with pytest.raises(UsageError, match="'missile' is class 1 and class 3"):
        check_classes(["a", "missile", "b", "missile"])


@pytest.mark.parametrize("split", ["tuning", "report", "shifted"])
def test_labels_cover_the_classes(small_store: Store, split: str) -> None:
    """T09."""
    corpus = open_corpus(small_store, corpus_key(corpus_spec(split)), Reader.REPORTING)
    check_classes(corpus.classes)
    assert set(corpus.labels.tolist()) == set(range(len(corpus.classes)))


# --- the zero-shot classifier


def test_the_head_is_the_mean_of_normalised_prompts() -> None:
    """Prompt by prompt, from the definition."""
    model = fresh(ModelSpec(), 0).eval()
    classes, templates = CLASSES[:3], TEMPLATES[:4]
    for batch_size in (1, 5, 1024):
        head_KD = text_head(model, model.tokenizer, classes, templates, CPU, batch_size)
        for index, name in enumerate(classes):
            total = torch.zeros(64)
            for template in templates:
                tokens = torch.from_numpy(model.tokenizer([template.format(name)])).long()
                with torch.no_grad():
                    feature = model.net.encode_text(tokens)[0]
                total = total + feature / feature.norm()
            expected = total / total.norm()
            assert torch.allclose(head_KD[index], expected, atol=1e-5)
    assert torch.allclose(head_KD.norm(dim=1), torch.ones(3), atol=1e-6)
    assert not head_KD.requires_grad


def test_prompts_are_in_the_worlds_words() -> None:
    tokenizer = WordTokenizer(world_vocabulary(), 16)
    prompts = [template.format(name) for template in TEMPLATES for name in CLASSES]
    assert not (tokenizer(prompts) == tokenizer.unknown).any()


def test_the_digest_of_the_templates_follows_words_and_order() -> None:
    """T40."""
    digests = {
        templates_digest(templates)
        for templates in (TEMPLATES, TEMPLATES[::-1], TEMPLATES[:-1], ["a {}"], ["A {}"], ["a {}."])
    }
    assert len(digests) == 6
    assert templates_digest(list(TEMPLATES)) == templates_digest(tuple(TEMPLATES))


# --- detectors


def test_detection_by_hand() -> None:
    poisoned = np.array([1, 1, 1, 1, 0, 0, 0, 0, 0, 0], dtype=bool)
    flagged = np.array([1, 1, 1, 0, 1, 0, 0, 0, 0, 0], dtype=bool)
    found = detection(flagged, poisoned)
    assert found == {
        "recall": Share(3, 4),
        "precision": Share(3, 4),
        "leak": Share(1, 4),
        "precision_bound": Share(4, 4),
        "clean_removed": Share(1, 6),
        "contamination": Share(1, 6),
    }
    assert detection(flagged, np.zeros(10, bool)) == {}, "no recall without poison"
    assert "precision" not in detection(np.zeros(10, bool), poisoned)


def slow_separation(scores: list[float], poisoned: list[bool]) -> dict[str, float]:
    """Pair by pair and threshold by threshold."""
    high = [s for s, p in zip(scores, poisoned, strict=True) if p]
    low = [s for s, p in zip(scores, poisoned, strict=True) if not p]
    wins = [1.0 if a > b else 0.5 if a == b else 0.0 for a in high for b in low]
    points = [
        (sum(a >= t for a in high), sum(b >= t for b in low))
        for t in sorted(set(scores), reverse=True)
    ]
    average, before = 0.0, 0
    for hits, alarms in points:
        average += (hits - before) / len(high) * hits / (hits + alarms)
        before = hits
    return {
        "auroc": sum(wins) / len(wins),
        "auprc": average,
        "base_rate": len(high) / len(scores),
        **{
            f"tpr_at_fpr{p}": max((h for h, a in points if 100 * a <= p * len(low)), default=0)
            / len(high)
            for p in (1, 5)
        },
        "fpr_at_tpr95": next(a for h, a in points if 20 * h >= 19 * len(high)) / len(low),
    }


@given(
    st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=40).filter(
        lambda rows: len({poison for _, poison in rows}) == 2
    )
)
def test_separation_is_what_counting_gives(rows: list[tuple[int, bool]]) -> None:
    scores, poisoned = [float(s) for s, _ in rows], [p for _, p in rows]
    found = separation(np.array(scores, np.float32), np.array(poisoned))
    values = {name: measured.as_dict()["value"] for name, measured in found.items()}
    assert values == pytest.approx(slow_separation(scores, poisoned))
    turned = separation(-np.array(scores, np.float32), np.array(poisoned))
    assert turned["auroc"].as_dict()["value"] == pytest.approx(1 - values["auroc"])
    low, high = (found["auroc"].as_dict()[end] for end in ("low", "high"))
    assert 0 <= low <= values["auroc"] <= high <= 1


def test_separation_agrees_with_scikit_learn() -> None:
    from sklearn.metrics import average_precision_score, roc_auc_score

    rng = np.random.default_rng(0)
    poisoned = rng.random(2000) < 0.03
    scores = (rng.normal(size=2000) + poisoned).round(1).astype(np.float32)
    found = {name: m.as_dict()["value"] for name, m in separation(scores, poisoned).items()}
    assert found["auroc"] == pytest.approx(roc_auc_score(poisoned, scores))
    assert found["auprc"] == pytest.approx(average_precision_score(poisoned, scores))


def test_delong_s_interval_holds_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    poisoned = np.arange(330) < 30
    truth = 0.7602499389065234  # Phi(1 / sqrt 2): two normal samples one apart
    held = 0
    for _ in range(400):
        scores = rng.normal(size=330) + poisoned
        low, high = (separation(scores, poisoned)["auroc"].as_dict()[e] for e in ("low", "high"))
        held += low <= truth <= high
    assert 0.91 <= held / 400 <= 0.98


def test_the_base_rate_reminder() -> None:
    """At 0.3 % poison a perfect recall with 5 % false alarms means 5.7 % precision."""
    poisoned = np.arange(100_000) < 300
    flagged = poisoned | (np.arange(100_000) >= 100_000 - 4985)
    found = {name: m.as_dict()["value"] for name, m in detection(flagged, poisoned).items()}
    assert found["recall"] == 1
    assert found["precision"] == pytest.approx(0.0568, abs=1e-4)
    assert found["precision_bound"] == found["precision"]
    assert found["contamination"] == 0
    few = detection(np.arange(100_000) < 600, poisoned)["precision_bound"]
    assert few.as_dict()["value"] == 0.5, "twice as many flagged as there are poisons"


def test_without_both_kinds_of_rows_nothing_is_told_apart() -> None:
    assert separation(np.arange(3.0), np.zeros(3, bool)) == {}


def test_rows_without_a_score_are_left_out() -> None:
    scores = np.array([0.1, np.nan, 0.9, np.nan, 0.4], np.float32)
    poisoned = np.array([False, True, True, False, False])
    kept = ~np.isnan(scores)
    assert separation(scores, poisoned) == separation(scores[kept], poisoned[kept])
    assert separation(np.full(3, np.nan), np.array([True, False, True])) == {}
    assert separation(np.arange(3.0), np.ones(3, bool)) == {}
