"""Several processes are one: the same global batch gives the same loss, gradients and weights.

Run as a program, this file is one of two ranks, or of four; the tests start them and compare what
they leave with what one process computes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from attacks import ATTACKS
from defenses import DEFENSES, abl
from defenses.abl import Bound, LocalAscentSpec, Over, UnlearningSpec
from defenses.controls import AugmentedClipSpec
from defenses.fine_pruning import PrunedCrossEntropySpec
from defenses.finetune import Part, PartialClipSpec
from defenses.neural_cleanse import StampedCrossEntropySpec
from defenses.roclip import Augment, PoolInit, Query
from grid.registry import resolve
from tests.conftest import corpus_spec
from tests.test_abd import PER_PICTURE
from tests.test_abd import SPEC as PATCHED
from tests.test_ta_cleaner import SPEC as SUB_TEXTS
from tests.test_ta_cleaner import dressed
from tests.test_training import IN_MODAL, POOLED, RECIPE, Interrupted, Kept, Stopped, state, view_of
from victims.adversarial import AdversarialSpec, Climb
from victims.augment import NoiseErase
from victims.away import AwaySpec, Gate
from victims.away import Sides as Pushed
from victims.batches import Batch
from victims.class_relearning import ClassRelearningSpec
from victims.classifiers import ClassifierSpec
from victims.corpora import (
    Reader,
    View,
    annotate,
    build_corpus,
    corpus_key,
    open_corpus,
    subset,
    whole,
)
from victims.distributed import agreed, gather, rank, share_batch_norm, world_size
from victims.draws import numpy_rng, torch_rng
from victims.errors import GridError
from victims.forgetting import Forget, LocalForgettingSpec
from victims.in_modal import Side
from victims.keys import Key
from victims.lab import DataRef, Lab, model_key
from victims.labelled import LabelledWorld
from victims.labels import CrossEntropySpec
from victims.mixture import SafeRule, SplitRule
from victims.models import EMBEDDED_CONTEXT, Clip, ModelSpec, WordTokenizer, fresh
from victims.overfitting import EarlyClipSpec, OutsideClipSpec
from victims.patched_pairs import Placement
from victims.recipe import Augment as Crop
from victims.recipe import BatchNormMode, Recipe, Runtime
from victims.relearning import Bank, RelearnUnlearnSpec, Sides
from victims.safe_phases import Counting, PairCosine, SafePhaseSpec, Split
from victims.store import Busy, Store
from victims.sub_text_alignment import Aligned, Denominator, Mode
from victims.sub_text_alignment import Sides as SubSides
from victims.training import Objective, ObjectiveSpec, PlainClipSpec
from victims.words import NOUNS, world_vocabulary
from victims.world import CLASSES

# Two steps without moving: the first fills a pool, and the gradient of the second is compared.
# The seeds of views and order differ from step to step as in any fit.
STILL = replace(RECIPE, epochs=2, lr=0.0)
# A larger eps: AdamW divides by the gradient's size, which makes rounding of a gradient that is
# zero in truth into a full step.
MOVING = replace(RECIPE, epochs=3, lr=2e-3, warmup_steps=0, eps=1e-3)


PRECISIONS = {"single": torch.float32, "half": torch.bfloat16}


class Case(NamedTuple):
    """An objective, by the name of its class, under a recipe, on rows with what it reads; of an
    image classifier on a labelled set, or of a CLIP on pairs."""

    objective: str
    spec: ObjectiveSpec
    still: Recipe = STILL
    columns: Mapping[str, np.ndarray] = {}
    dress: Callable[[View], View] = lambda view: view
    labelled: bool = False
    again: bool = False  # activations are computed again, block by block


MATCHING = replace(POOLED, every=1)


def judged() -> dict[str, np.ndarray]:
    """32 rows that a judge with features of its own put into a clean and a triggered part."""
    features = numpy_rng(0, "judged").normal(size=(2, 32, 8)).astype(np.float32)
    features /= np.linalg.norm(features, axis=-1, keepdims=True)
    row = np.arange(32)
    masks = {"clean": row % 3 > 0, "triggered": row % 6 == 0, "held": row > 99}
    return {**masks, "number": row // 2, "judge_image": features[0], "judge_text": features[1]}


JUDGED = judged()
RELEARN = RelearnUnlearnSpec(
    alpha=0.5,
    beta=0.25,
    temperature=3.0,
    epsilon=1e-6,
    teacher_scale=20.0,
    limit=0.6,
    bank=None,
    sides=Sides.IMAGE,
    balanced=False,
    most_rows=32,
    num_held=0,
)
BANK = Bank(
    captions=("a red circle", "a fish", "a small blue key"),
    numbers=(0, 90, 91),
    text_MD=torch.from_numpy(JUDGED["judge_text"][:3].copy()),
)
AWAY = AwaySpec(
    threshold=2.15,
    weight=0.5,
    gate=Gate.BATCH,
    sides=Pushed.BOTH,
    train_scale=False,
    policy=NoiseErase(),
)
# More pairs to forget than a step takes, each with a word of its own.
FORGETTING = LocalForgettingSpec(
    made_of=Key("pairs-0123456789abcdef"),
    pairs={
        "image": torch.randint(0, 256, (40, 3, 32, 32), generator=torch_rng(0)).byte(),
        "tokens": torch.from_numpy(
            WordTokenizer(world_vocabulary(), EMBEDDED_CONTEXT)([*NOUNS, *NOUNS])
        ).long(),
    },
    batch=32,
    forget=Forget.SQUARE,
    ascent_limit=100.0,
    target_cosine=-1.0,
    stop_margin=0.0,
    beta=0.5,
)
# Near the mean loss of the two steps that are taken.
ASCENT = LocalAscentSpec(gamma=2.9875, bound=Bound.ASCENT, over=Over.ROW, augment=Crop.CROP_FLIP)
REVERSED = StampedCrossEntropySpec(
    share=0.5,
    augment=Crop.CROP_FLIP,
    triggers_sha256="",
    mask_F1HW=torch.rand((2, 1, 32, 32), generator=torch_rng(1)),
    pattern_FCHW=torch.rand((2, 3, 32, 32), generator=torch_rng(2)),
)
SUB_TEXT_CASES: dict[str, dict[str, Any]] = {
    "subset": {},
    "lone": {"k_fraction": 0.04},  # one chosen row: the other rank has none of its own
    "own": {"denominator": Denominator.OWN, "aligned": Aligned.AUGMENTED},
    "batch": {"denominator": Denominator.BATCH, "sides": SubSides.NEGATIVE},
    "replace": {"mode": Mode.REPLACE, "sides": SubSides.POSITIVE},
}
UNIMODAL = SafePhaseSpec(crossed=False, bank_size=40, crop_scale=(0.5, 1.0))
CROSSED = SafePhaseSpec(crossed=True, bank_size=None, crop_scale=(0.5, 1.0))
PARTED = Split(
    rule=SplitRule(threshold=0.5, increment=0.1, cap=0.85, safe_rule=SafeRule.POSTERIOR),
    scorer=PairCosine(),
    batch_size=4,
    train_risky=True,
    schedule=Counting.FIXED,
    epochs=2,
    epochs_before=2,
)
DRAWN = PairCosine(crop_scale=(0.5, 1.0), seed=3)
SMALL = replace(STILL, batch_size=4)
CASES: dict[str, Case] = {
    "plain": Case("PlainClip", PlainClipSpec()),
    # Parts of a batch that are normalised apart, each over both ranks.
    "plain-parts": Case("PlainClip", PlainClipSpec(), replace(STILL, micro_batch=8), again=True),
    "plain-bn-eval": Case("PlainClip", PlainClipSpec(), replace(STILL, bn_mode=BatchNormMode.EVAL)),
    **{
        f"partial-{part}": Case("PartialClip", PartialClipSpec(part=part))
        for part in (Part.IMAGE, Part.TEXT, Part.PROJECTIONS)
    },
    **{f"inmodal-{side}": Case("InModal", replace(IN_MODAL, side=side)) for side in Side},
    "inmodal-apart": Case("InModal", replace(IN_MODAL, concat_views=False)),
    "pooled-plain": Case("PooledCaptions", replace(POOLED, every=None)),
    "pooled-refreshed": Case("PooledCaptions", replace(POOLED, every=3)),
    "pooled-image": Case("PooledCaptions", MATCHING),
    "pooled-caption": Case("PooledCaptions", replace(MATCHING, query=Query.CAPTION)),
    "pooled-drift": Case("PooledCaptions", replace(MATCHING, text_drift=True)),
    "pooled-legacy": Case("PooledCaptions", replace(MATCHING, pool_init=PoolInit.LEGACY)),
    "pooled-unseen": Case("PooledCaptions", replace(MATCHING, augment=Augment.NONE)),
    "safe-unimodal": Case("SafePhase", UNIMODAL),
    "safe-no-banks": Case("SafePhase", replace(UNIMODAL, bank_size=None)),
    "safe-crossed": Case("SafePhase", CROSSED),
    "safe-unseen": Case("SafePhase", replace(UNIMODAL, crop_scale=None)),
    "safe-split": Case("SafePhase", replace(UNIMODAL, split=PARTED), SMALL),
    "safe-split-drawn": Case(
        "SafePhase",
        replace(CROSSED, split=replace(PARTED, scorer=DRAWN, train_risky=False)),
        SMALL,
    ),
    **{
        f"augmented-{policy}": Case("AugmentedClip", AugmentedClipSpec(image_policy=policy))
        for policy in ("autoaugment", "simclr", "noise_erase", "noise_patch")
    },
    "relearn-image": Case("RelearnUnlearn", RELEARN, columns=JUDGED),
    "relearn-both": Case("RelearnUnlearn", replace(RELEARN, sides=Sides.BOTH), columns=JUDGED),
    "relearn-bank": Case("RelearnUnlearn", replace(RELEARN, bank=BANK), columns=JUDGED),
    # Eight clean and no triggered rows: a term without any, and unequal shares of ranks.
    "relearn-few": Case(
        "RelearnUnlearn",
        RELEARN,
        replace(STILL, batch_size=16),
        {**JUDGED, "clean": np.arange(32) < 8, "triggered": np.arange(32) > 99},
    ),
    "away": Case("Away", AWAY),
    # Between the means of the two halves in the step that is compared: one rank alone would push,
    # the other would not.
    "away-split": Case("Away", replace(AWAY, threshold=1.575)),
    "away-sample": Case("Away", replace(AWAY, threshold=1.575, gate=Gate.SAMPLE)),
    "early": Case("EarlyClip", EarlyClipSpec(epochs=2)),
    "outside": Case("OutsideClip", OutsideClipSpec(weak=16, pairs=16)),
    **{
        f"forgetting-{how}": Case("LocalForgetting", replace(FORGETTING, forget=how))
        for how in Forget
    },
    **{
        f"subtexts-{name}": Case("SubTextAlignment", replace(SUB_TEXTS, **fields), dress=dressed)
        for name, fields in SUB_TEXT_CASES.items()
    },
    "patched": Case("PatchedPairs", replace(PATCHED, clean_mix=0.3)),
    "patched-fixed": Case("PatchedPairs", replace(PATCHED, placement=Placement.FIXED)),
    "patched-aligned": Case("PatchedPairs", replace(PATCHED, align=True)),
    "patched-each": Case("PatchedPairs", PER_PICTURE),
    "labels": Case("CrossEntropy", CrossEntropySpec(augment=Crop.CROP_FLIP), labelled=True),
    "class-relearning": Case(
        "ClassRelearning",
        ClassRelearningSpec(
            alpha=0.5,
            beta=0.25,
            temperature=3.0,
            epsilon=1e-6,
            teacher_scale=2.0,
            augment=Crop.CROP_FLIP,
            num_listed=32,
            most_rows=32,
            num_held=0,
        ),
        columns={
            **{name: JUDGED[name] for name in ("clean", "triggered", "held")},
            "copies": np.ones(32, dtype=np.int64),
            "judge": numpy_rng(0, "labelled").normal(size=(32, len(CLASSES))),
        },
        labelled=True,
    ),
    # The mean lies between those of the halves: each rank alone would go another way.
    "ascent": Case("LocalAscent", ASCENT, labelled=True),
    "ascent-batch": Case("LocalAscent", replace(ASCENT, over=Over.BATCH), labelled=True),
    "ascent-flooding": Case("LocalAscent", replace(ASCENT, bound=Bound.FLOODING), labelled=True),
    "unlearning": Case("Unlearning", UnlearningSpec(augment=Crop.CROP_FLIP), labelled=True),
    "pruned": Case(
        "PrunedCrossEntropy",
        PrunedCrossEntropySpec(augment=Crop.CROP_FLIP, channels=(0, 3, 60)),
        labelled=True,
    ),
    "reversed": Case("StampedCrossEntropy", REVERSED, labelled=True),
    "adversarial": Case(
        "Adversarial",
        AdversarialSpec(inner=Climb(eps=8.0, step=3.0, steps=2), augment=Crop.NONE),
        labelled=True,
    ),
}
TRAINED = (
    "plain",
    "inmodal-both",
    "pooled-image",
    "augmented-simclr",
    "relearn-both",
    "away",
    "subtexts-subset",
    "ascent-batch",
)

# By default each objective in its plain use, which is its first case.
FIRST = {
    name
    for name, case in CASES.items()
    if next(n for n, other in CASES.items() if other.objective == case.objective) == name
} | {"plain-parts"}
MORE = pytest.mark.exhaustive


LABELLED = LabelledWorld(of=corpus_spec("clean"))


def labelled_of(store: Store, num_rows: int) -> View:
    """The first rows of the clean split, labelled."""
    build_corpus(store, LABELLED)
    corpus = open_corpus(store, corpus_key(LABELLED), Reader.TRAINING)
    return subset(whole(corpus), np.arange(num_rows))


def small_model_of(case: Case) -> Clip:
    spec = ClassifierSpec(classes=tuple(CLASSES)) if case.labelled else ModelSpec()
    return fresh(spec, 3)


def fit_of(store: Store, case: Case, recipe: Recipe) -> Interrupted:
    # In double precision up to the features: in single precision a rounding now and then turns a
    # ReLU over, which on 32 rows changes some gradients by per cents and hides what is looked for.
    model = small_model_of(case).double()
    torch.manual_seed(99)
    objective = case.spec.build(model)
    view = labelled_of(store, 32) if case.labelled else case.dress(view_of(store, 32))
    if case.columns:
        view = annotate(view, case.columns)
    runtime = Runtime(checkpoint_activations=case.again)
    return Interrupted(model, view, objective, recipe, runtime=runtime)


def computed(store: Store, name: str) -> tuple[dict[str, Tensor], Any]:
    """Gradients, statistics and buffers after two steps at lr 0, and the curves."""
    fit = fit_of(store, CASES[name], CASES[name].still)
    report = fit()
    found = {n: t for n, t in state(fit).items() if "running" in n or n.startswith("objective.")}
    for parameter_name, parameter in fit.model.named_parameters():
        grad = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        found[f"grad.{parameter_name}"] = grad
    return found, report.curves


def trained(store: Store, name: str) -> tuple[dict[str, Tensor], Any]:
    """Weights after three steps, and the curves."""
    fit = fit_of(store, CASES[name], MOVING)
    report = fit()
    return state(fit), report.curves


# --- one rank


def _main(this_rank: int, world: int, folder: Path, source: str, wanted: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=this_rank, world_size=world
    )
    store, notes = Store(source), dict[str, Any]()
    tensors: dict[str, Tensor] = {}

    def keep(name: str, found: tuple[dict[str, Tensor], Any]) -> None:
        tensors.update({f"{name}/{n}": t.contiguous().clone() for n, t in found[0].items()})
        notes[name] = found[1]

    for name in wanted:
        keep(f"still/{name}", computed(store, name))
    for name in TRAINED:
        keep(f"trained/{name}", trained(store, name))
    if world == 2:
        notes |= _agreements(store, folder)
    save_file(tensors, folder / f"{this_rank}.safetensors")
    (folder / f"{this_rank}.json").write_text(json.dumps(notes))
    dist.destroy_process_group()


def _agreements(store: Store, folder: Path) -> dict[str, Any]:
    """What else ranks must agree on."""
    notes: dict[str, Any] = {"lab": _lab(Store(folder / "lab"))}
    notes["resumed"] = _resumed(store, folder)
    notes["branches"] = _branches()
    notes["odd"] = _refused(store, replace(STILL, batch_size=31))
    notes["odd parts"] = _refused(store, replace(STILL, micro_batch=3))
    for name, precision in PRECISIONS.items():
        notes[name] = _normalised(precision)
    notes["agreed"] = agreed(rank() + 5)
    return notes


def _lab(store: Store) -> dict[str, Any]:
    """Training and scoring through the lab: made once, by rank 0, found by both."""
    from tests.test_lab import MeanLevel

    lab = Lab(store, ModelSpec(), Runtime())
    data = DataRef(corpus_key(corpus_spec("clean", 64)), 64)
    ref = lab.train(PlainClipSpec(), data, replace(RECIPE, epochs=1))
    values = lab.score(MeanLevel(), data, ref)
    meta = store.need(ref.key).meta
    made = list(lab.ledger.made)
    # Somebody else is making another model.
    other = replace(RECIPE, epochs=1, seed=9)
    key = model_key(PlainClipSpec(), other, data.key, None, ModelSpec())
    with Store(store.uri).claim(key) if rank() == 0 else nullcontext():
        try:
            lab.train(PlainClipSpec(), data, other)
        except Busy:
            met = True
        else:
            met = False
    images = meta["cost"]["images_forward"]
    return {"key": ref.key, "made": made, "values": values.tolist(), "images": images, "busy": met}


def _resumed(store: Store, folder: Path) -> bool:
    """Both ranks die at step 2 and go on from rank 0's checkpoint: the same bits."""
    recipe = replace(RECIPE, batch_size=16)
    undisturbed = fit_of(store, Case("", POOLED), recipe)
    undisturbed()
    kept = Kept(folder / "fit")
    for stop_at in (3, 10**9):
        fit = fit_of(store, Case("", POOLED), recipe)
        fit.checkpoints, fit.stop_at = kept, stop_at
        fit.runtime = Runtime(checkpoint_seconds=0)
        try:
            fit()
        except Stopped:
            dist.barrier()
    before, after = state(undisturbed), state(fit)
    return all(torch.equal(before[name], after[name]) for name in before)


def _branches() -> list[float]:
    """The gradient of a value that is gathered and used beside it, for two equal inputs."""
    a = torch.full((2, 1), 1.0, requires_grad=True)
    b = torch.zeros(4, 1, requires_grad=True)
    # Addition hands one and the same gradient tensor to both of its inputs, to the younger first.
    older = b * 1
    ((gather(a) + older) * torch.ones(4, 1)).sum().backward()  # type: ignore[no-untyped-call]
    assert a.grad is not None
    assert b.grad is not None
    return [float(a.grad[0]), float(b.grad[0])]


def _refused(store: Store, recipe: Recipe) -> str:
    try:
        fit_of(store, CASES["plain"], recipe)
    except GridError as error:
        return str(error)
    return ""


def far_from_zero() -> Tensor:
    """Levels around 1000 with a spread of 1: their squares need more digits than there are."""
    return 1000 + torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def _normalised(precision: torch.dtype) -> list[Any]:
    """One rank's half of the batch through a shared normalisation: outputs and statistics."""
    norm = nn.Sequential(nn.BatchNorm2d(3))
    share_batch_norm(norm)
    half = far_from_zero()[rank() * 4 : rank() * 4 + 4].to(precision)
    out, running = norm(half), norm.state_dict()
    names = ("0.running_mean", "0.running_var", "0.num_batches_tracked")
    return [out.tolist(), *(running[name].tolist() for name in names), str(out.dtype)]


# --- all ranks, and the comparison


class Ranks(NamedTuple):
    tensors: list[dict[str, Tensor]]
    notes: list[dict[str, Any]]


def run_ranks(world: int, folder: Path, source: Store, request: pytest.FixtureRequest) -> Ranks:
    # Those of the tests that run.
    asked = [getattr(item, "callspec", None) for item in request.session.items]
    named = {spec.params.get("name") for spec in asked if spec is not None}
    wanted = ",".join(name for name in CASES if name in named)
    build_corpus(Store(folder / "lab"), corpus_spec("clean", 64))
    build_corpus(source, LABELLED)
    program = [sys.executable, "-W", "error", "-m", "tests.test_distributed"]
    children = [
        subprocess.Popen(
            [*program, str(r), str(world), str(folder), source.uri, wanted],
            cwd=Path(__file__).parents[1],
            stderr=subprocess.PIPE,
            text=True,
        )
        for r in range(world)
    ]
    errors = [child.communicate(timeout=200 * world)[1] for child in children]
    assert [child.returncode for child in children] == [0] * world, "\n".join(errors)
    return Ranks(
        [load_file(folder / f"{r}.safetensors") for r in range(world)],
        [json.loads((folder / f"{r}.json").read_text()) for r in range(world)],
    )


@pytest.fixture(scope="module")
def ranks(
    small_store: Store, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Ranks:
    return run_ranks(2, tmp_path_factory.mktemp("ranks"), small_store, request)


@pytest.fixture(scope="module")
def four_ranks(
    small_store: Store, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Ranks:
    return run_ranks(4, tmp_path_factory.mktemp("four"), small_store, request)


def of(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def compare(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Relative to the largest number of a tensor, with a floor for what is zero in truth."""
    assert found.keys() == expected.keys()
    top = max(float(t.abs().max()) for n, t in expected.items() if t.is_floating_point())
    off = {}
    for name, tensor in expected.items():
        scale = max(float(tensor.double().abs().max()), 1e-3 * top)
        error = float((found[name].double() - tensor.double()).abs().max()) / scale
        if error > tolerance:
            off[name] = error
    assert not off, "; ".join(f"{name}: {error:.1e}" for name, error in off.items())


def compare_curves(found: Any, expected: Any) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name in other:
            assert one[name] == pytest.approx(other[name], rel=1e-5), name


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in FIRST else MORE) for n in CASES])
def test_two_ranks_compute_what_one_does(ranks: Ranks, small_store: Store, name: str) -> None:
    check_gradients(ranks, small_store, name)


@MORE
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", CASES)
def test_four_ranks_compute_what_one_does(four_ranks: Ranks, small_store: Store, name: str) -> None:
    check_gradients(four_ranks, small_store, name)


def check_gradients(ranks: Ranks, small_store: Store, name: str) -> None:
    expected, curves = computed(small_store, name)
    assert any(float(t.abs().max()) > 0 for n, t in expected.items() if n.startswith("grad."))
    for tensors, notes in zip(ranks.tensors, ranks.notes, strict=True):
        compare(of(tensors, f"still/{name}/"), expected, 1e-5)
        compare_curves(notes[f"still/{name}"], curves)


@pytest.mark.parametrize("name", TRAINED)
def test_two_ranks_train_to_the_same_weights(ranks: Ranks, small_store: Store, name: str) -> None:
    check_weights(ranks, small_store, name)


@MORE
@pytest.mark.parametrize("name", TRAINED)
def test_four_ranks_train_to_the_same_weights(
    four_ranks: Ranks, small_store: Store, name: str
) -> None:
    check_weights(four_ranks, small_store, name)


def check_weights(ranks: Ranks, small_store: Store, name: str) -> None:
    expected, curves = trained(small_store, name)
    for tensors, notes in zip(ranks.tensors, ranks.notes, strict=True):
        compare(of(tensors, f"trained/{name}/"), expected, 1e-4)
        compare_curves(notes[f"trained/{name}"], curves)
    one, *others = (of(tensors, f"trained/{name}/") for tensors in ranks.tensors)
    weights = [n for n in one if "num_batches" not in n]
    apart = [n for n in weights for other in others if not torch.equal(one[n], other[n])]
    assert apart == [], "the ranks drift apart"


def all_objectives() -> Iterator[type[Objective]]:
    """Every objective of the repository: what any method's module defines."""
    for kind, table in (("attacks", ATTACKS), ("defenses", DEFENSES)):
        for name in table:
            resolve("attacks" if kind == "attacks" else "defenses", name)
    waiting = [Objective]
    while waiting:
        for cls in waiting.pop().__subclasses__():
            waiting.append(cls)
            if cls.__module__.split(".")[0] in ("attacks", "defenses", "victims"):
                yield cls


def test_every_objective_is_compared() -> None:
    covered = {case.objective for case in CASES.values()}
    assert {cls.__name__ for cls in all_objectives()} == covered
    for name, case in CASES.items():
        model = small_model(case.labelled)
        assert type(case.spec.build(model)).__name__ == case.objective, name


@cache
def small_model(labelled: bool) -> Clip:
    return small_model_of(Case("", PlainClipSpec(), labelled=labelled))


def test_both_passes_of_a_split_were_compared(small_store: Store) -> None:
    assert {"unimodal", "cross"} <= set(computed(small_store, "safe-split")[1][1])


def test_the_matching_step_of_a_pool_was_compared(small_store: Store) -> None:
    assert "matched" in computed(small_store, "pooled-image")[1][1]
    assert "matched" not in computed(small_store, "pooled-plain")[1][1]


def test_the_mean_that_gates_was_the_global_one(small_store: Store) -> None:
    gated = [record["gated_image"] for record in computed(small_store, "away-split")[1]]
    assert gated == [1, 0]
    shares = [record["gated_image"] for record in computed(small_store, "away-sample")[1]]
    assert all(0 < share < 1 for share in shares)


def test_the_mean_that_turns_the_ascent_was_the_global_one(
    small_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows lie on both sides of gamma, and so do the means of the halves of a batch."""
    losses: list[Tensor] = []
    plain = abl.row_losses

    def row_losses(model: Clip, batch: Batch) -> Tensor:
        losses.append(plain(model, batch))
        return losses[-1]

    monkeypatch.setattr(abl, "row_losses", row_losses)
    computed(small_store, "ascent")
    halves, gamma = losses[-1].detach().chunk(2), ASCENT.gamma
    assert all(float(half.min()) < gamma < float(half.max()) for half in halves)
    assert (halves[0].mean() < gamma) != (halves[1].mean() < gamma), halves


# --- the rest of what ranks must agree on


def test_the_lab_makes_once_and_both_ranks_find_it(ranks: Ranks) -> None:
    zero, one = (notes["lab"] for notes in ranks.notes)
    assert zero["key"] == one["key"]
    assert zero["made"][0] == zero["key"]
    assert len(zero["made"]) == 2
    assert one["made"] == []
    assert zero["values"] == one["values"]
    assert len(zero["values"]) == 64
    assert zero["images"] == 64, "the cost of a model counts the rows of both ranks"
    assert zero["busy"], "rank 0 met the lock"
    assert one["busy"], "rank 1 must follow rank 0"


def test_two_ranks_resume_to_the_same_bits(ranks: Ranks) -> None:
    assert [notes["resumed"] for notes in ranks.notes] == [True, True]


def test_a_gathered_gradient_leaves_its_neighbours_alone(ranks: Ranks) -> None:
    """Each row counts once on each of two ranks; what is not gathered counts once."""
    assert [notes["branches"] for notes in ranks.notes] == [[2.0, 1.0]] * 2


def test_a_batch_that_ranks_cannot_share_is_refused(ranks: Ranks) -> None:
    for notes in ranks.notes:
        assert "batch_size 31 does not divide among 2 workers" in notes["odd"]
        assert "micro_batch 3 cuts a batch of 32 into 11 parts" in notes["odd parts"]


def test_shared_normalisation_is_torchs_own(ranks: Ranks) -> None:
    for name, precision in PRECISIONS.items():
        norm = nn.BatchNorm2d(3)
        expected = norm(far_from_zero().to(precision).float())
        for index, notes in enumerate(ranks.notes):
            out, mean, variance, count, kind = notes[name]
            assert kind == str(precision)
            half = expected[index * 4 : index * 4 + 4]
            rough = 0.02 if precision is torch.bfloat16 else 1e-3
            assert torch.allclose(torch.tensor(out), half, atol=rough)
            running = norm.state_dict()
            assert mean == pytest.approx(running["running_mean"].tolist())
            assert variance == pytest.approx(running["running_var"].tolist(), rel=1e-4)
            assert count == 1


def test_ranks_follow_rank_zero(ranks: Ranks) -> None:
    assert [notes["agreed"] for notes in ranks.notes] == [5, 5]


def test_one_process_alone_gathers_nothing() -> None:
    value = torch.ones(2)
    assert gather(value) is value
    assert (rank(), world_size(), agreed(7)) == (0, 1, 7)


if __name__ == "__main__":
    _main(
        int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4], sys.argv[5].split(",")
    )
