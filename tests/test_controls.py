"""Controls: which trainings they share with the victims, what they drop, and who sees the truth."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import numpy as np
import pytest
import torch

from attacks.badnet import BadNet
from attacks.base import Goal
from defenses import DEFENSES
from defenses.base import (
    Case,
    Defended,
    Defense,
    Fidelity,
    Need,
    Phase,
    Recipes,
    check_truth,
)
from defenses.cleanclip import CleanClip
from defenses.controls import (
    POLICIES,
    VIEWS_PER_PAIR,
    AugmentedClipSpec,
    AugmentOnly,
    Budget,
    CleanModel,
    CleanTraining,
    NoDefense,
    OracleFilter,
    PartialOracle,
    RandomFilter,
    SameBudgetFinetune,
)
from defenses.finetune import Finetune
from defenses.roclip import RoClip
from defenses.ubt import UbtOracle
from grid.registry import Method, _checked
from grid.stages import Bench, CorpusStage, DefendStage, ModelStage, PoisonStage, TriggerStage
from tests.conftest import corpus_spec
from victims.augment import augment, seeded
from victims.batches import Batch
from victims.draws import Draws, torch_rng
from victims.errors import Forbidden, UsageError
from victims.lab import DataRef, Lab, Ledger, ModelRef, model_key
from victims.labels import plain
from victims.measuring import detection
from victims.models import ModelSpec
from victims.recipe import Recipe, Runtime
from victims.rewrite import EdaMode, EdaText
from victims.store import Store
from victims.training import PlainClipSpec
from victims.world import CLASSES, TEMPLATES

MODEL, ROWS, COUNT = ModelSpec(), 160, 16
FIT = Recipe(epochs=1, batch_size=32, lr=2e-3, warmup_steps=1)
REPAIR = replace(FIT, batch_size=64, seed=5)


@dataclass
class Scene:
    """A poisoned and an unpoisoned victim of one grid, and defenses on them."""

    store: Store
    poisoned: PoisonStage
    victim: ModelStage
    clean_victim: ModelStage
    clean: CorpusStage
    suspect: CorpusStage
    reference: ModelStage | None

    def stage(self, defense: Any, *, rate_0: bool = False, seed: int = 0) -> DefendStage:
        return DefendStage(
            cast("Defense", defense),
            Recipes(victim=FIT, repair=REPAIR),
            seed,
            self.clean_victim if rate_0 else self.victim,
            self.clean,
            self.suspect,
            self.reference,
        )

    def lab(self) -> Lab:
        return Lab(self.store, MODEL, Runtime())

    def apply(self, defense: Any, *, rate_0: bool = False, seed: int = 0) -> Defended:
        stage, lab = self.stage(defense, rate_0=rate_0, seed=seed), self.lab()
        return stage.defense.apply(lab, stage.case(lab))


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    store = Store(tmp_path_factory.mktemp("controls"))
    suspect, clean = [
        CorpusStage(corpus_spec(split, rows)) for split, rows in (("suspect", ROWS), ("clean", 64))
    ]
    goal = Goal(0, CLASSES[0], TEMPLATES)
    trigger = TriggerStage(BadNet(patch=6, cell=2), goal, 0, suspect, MODEL)
    poisoned = PoisonStage(trigger, COUNT, ROWS)
    reference = ModelStage(MODEL, replace(FIT, seed=9), 64, clean, None)
    victim = ModelStage(MODEL, FIT, ROWS, poisoned, reference)
    clean_victim = ModelStage(MODEL, FIT, ROWS, suspect, reference)
    bench = Bench(store, Runtime(), lambda line: None, Ledger())
    for stage in (suspect, clean, trigger, poisoned, reference, victim, clean_victim):
        stage.run(bench)
    return Scene(store, poisoned, victim, clean_victim, clean, suspect, reference)


def truth_of(scene: Scene) -> Any:
    path = scene.store.need(scene.poisoned.truth_key).path("roles.npy")
    return np.load(path, allow_pickle=False) != 0


# --- equal trainings have equal keys


@pytest.mark.parametrize(
    "defense",
    [NoDefense(), CleanTraining(), OracleFilter(), PartialOracle(), RandomFilter(fraction=0)],
)
def test_at_rate_0_they_are_the_clean_victim(scene: Scene, defense: Any) -> None:
    """One training run, so one key: the cell costs nothing."""
    assert scene.apply(defense, rate_0=True).model.key == scene.clean_victim.key


@pytest.mark.parametrize(
    "defense", [NoDefense(), RandomFilter(fraction=0.0), PartialOracle(recall=0.0)]
)
def test_dropping_nothing_is_the_victim(scene: Scene, defense: Any) -> None:
    lab, stage = scene.lab(), scene.stage(defense)
    assert defense.apply(lab, stage.case(lab)).model.key == scene.victim.key
    assert not lab.ledger.made


def test_clean_training_is_the_clean_victim_of_every_attack(scene: Scene) -> None:
    assert scene.apply(CleanTraining()).model.key == scene.clean_victim.key
    assert scene.victim.key != scene.clean_victim.key


def test_full_recall_is_the_oracle(scene: Scene) -> None:
    full, oracle = scene.apply(PartialOracle(recall=1.0)), scene.apply(OracleFilter())
    assert full.model.key == oracle.model.key
    assert np.array_equal(cast("Any", full.flagged), cast("Any", oracle.flagged))
    assert oracle.model.key not in (scene.victim.key, scene.clean_victim.key)


def test_the_clean_model_is_the_reference_itself(scene: Scene) -> None:
    assert scene.reference is not None
    assert scene.apply(CleanModel()).model.key == scene.reference.key
    assert scene.stage(CleanModel()).key == scene.stage(CleanModel(), rate_0=True).key


# --- what is dropped


def test_the_oracle_drops_the_poisons_and_nothing_else(scene: Scene) -> None:
    """By row, not by position in the file: and the model is the one that the rest trains."""
    done, truth = scene.apply(OracleFilter()), truth_of(scene)
    assert truth.sum() == COUNT
    assert not truth[:COUNT].all()
    assert np.array_equal(cast("Any", done.flagged), truth)
    shares = detection(cast("Any", done.flagged), truth)
    assert (shares["precision"].value, shares["recall"].value) == (1.0, 1.0)
    lab = scene.lab()
    case = scene.stage(OracleFilter()).case(lab)
    kept = lab.subset(case.suspect_data, np.flatnonzero(~truth))
    assert len(kept) == ROWS - COUNT
    assert scene.reference is not None
    start = scene.reference.key
    assert done.model.key == model_key(PlainClipSpec(), FIT, kept.key, start, MODEL)
    captions = lab.captions(kept)
    clean = lab.captions(DataRef(scene.suspect.key, ROWS))
    assert captions == [clean[row] for row in np.flatnonzero(~truth)]


@pytest.mark.parametrize("recall", [0.25, 0.5, 0.9])
def test_partial_recall_drops_its_share_of_the_poisons(scene: Scene, recall: float) -> None:
    flagged, truth = cast("Any", scene.apply(PartialOracle(recall=recall)).flagged), truth_of(scene)
    assert flagged.sum() == round(recall * COUNT)
    assert not (flagged & ~truth).any()


def dropped(scene: Scene, fraction: float, seed: int = 0, rows: int = ROWS) -> Any:
    """Which rows `random_filter` drops, without training on the others."""
    lab = PlanLab()
    data = DataRef(scene.victim.data.key, rows)
    grants = {Need.SUSPECT_DATA: lambda: data, Need.START: lambda: None}
    case = Case("random_filter", grants, (Recipes(victim=FIT, repair=REPAIR), seed))
    done = RandomFilter(fraction=fraction).apply(cast("Lab", lab), case)
    assert np.array_equal(lab.rows, np.flatnonzero(~cast("Any", done.flagged)))
    return done.flagged


def test_the_random_filter_drops_uniformly(scene: Scene) -> None:
    """Precision close to the rate, within three binomial deviations; each row equally often."""
    truth = truth_of(scene)
    flags = np.stack([dropped(scene, 0.25, seed) for seed in range(400)])
    assert set(flags.sum(1)) == {40}
    rate = COUNT / ROWS
    precision = flags[:, truth].sum() / flags.sum()
    assert abs(precision - rate) < 3 * (rate * (1 - rate) / flags.sum()) ** 0.5
    often = flags.mean(0)
    assert abs(often - 0.25).max() < 5 * (0.25 * 0.75 / 400) ** 0.5
    assert np.array_equal(dropped(scene, 0.25, 7), flags[7])


@pytest.mark.parametrize(
    ("fraction", "rows", "count"), [(0.29, 100, 29), (0.1, 159, 15), (1, 9, 9)]
)
def test_the_share_is_rounded_down_as_a_decimal(
    scene: Scene, fraction: float, rows: int, count: int
) -> None:
    """In floats 0.29 of 100 rows was 28."""
    assert dropped(scene, fraction, rows=rows).sum() == count


@pytest.mark.parametrize(
    "defense", [RandomFilter(fraction=1.1), OracleFilter(recall=-0.1), PartialOracle(recall=2)]
)
def test_shares_outside_0_to_1_are_refused(scene: Scene, defense: Any) -> None:
    with pytest.raises(UsageError, match=r"0\.\.1"):
        scene.apply(defense)


# --- fine-tunes


class PlanLab:
    """A lab that writes down what it is asked for, and trains nothing."""

    def __init__(self) -> None:
        self.rows: Any = None
        self.text: EdaText | None = None
        self.asked: tuple[Any, ...] = ()

    def subset(self, data: DataRef, rows: Any) -> DataRef:
        self.rows = rows
        return DataRef(data.key, len(rows))

    def with_text(self, data: DataRef, **texts: EdaText) -> DataRef:
        self.text = texts["eda"]
        return data

    def plain(self, recipe: Recipe) -> Any:
        return plain(MODEL, recipe)

    def train(self, spec: Any, data: DataRef, recipe: Recipe, *, init: Any) -> ModelRef:
        self.asked = (spec, data, recipe, init)
        return ModelRef(data.key)


def planned(scene: Scene, defense: Any) -> PlanLab:
    lab = PlanLab()
    defense.apply(cast("Lab", lab), scene.stage(defense).case(scene.lab()))
    return lab


def test_the_same_steps_are_fine_tuning(scene: Scene) -> None:
    expected = scene.apply(Finetune()).model.key
    # An entry of any name: its steps are in the recipe that the control takes over.
    for like in (*VIEWS_PER_PAIR, "roclip", "cleanclip-x8"):
        assert scene.apply(SameBudgetFinetune(like=like)).model.key == expected
    views = SameBudgetFinetune(like="finetune", budget=Budget.VIEWS)
    assert scene.apply(views).model.key == expected


def test_the_same_views_are_twice_the_epochs_of_cleanclip(scene: Scene) -> None:
    """Counted, not declared: as many views with gradient as the method itself."""
    views = SameBudgetFinetune(like="cleanclip", budget=Budget.VIEWS)
    assert planned(scene, views).asked[2] == replace(REPAIR, epochs=2 * REPAIR.epochs)
    costs = [
        scene.store.need(scene.apply(defense).model.key).meta["cost"]
        for defense in (views, CleanClip())
    ]
    for name in ("images_backward", "texts_backward"):
        assert costs[0][name] == costs[1][name] > 0


def test_augmenting_with_nothing_is_fine_tuning(scene: Scene) -> None:
    assert planned(scene, AugmentOnly(policy="none")).asked == planned(scene, Finetune()).asked


@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "none"])
def test_augmenting_replaces_both_sides(scene: Scene, policy: str) -> None:
    lab = planned(scene, AugmentOnly(policy=policy))
    image_policy, mode = POLICIES[policy]
    spec, _, recipe, init = lab.asked
    assert spec == AugmentedClipSpec(image_policy=seeded(image_policy, 0))
    assert recipe == REPAIR
    assert init == ModelRef(scene.victim.key)
    assert lab.text is not None
    assert lab.text.mode is mode
    assert (mode is EdaMode.STATIC) is policy.endswith("_eda")


def test_an_augmented_step_is_the_clip_loss_of_the_views_alone(scene: Scene) -> None:
    # In train mode: a young model's features hardly depend on the picture in eval mode.
    model = scene.lab().load(ModelRef(scene.victim.key)).train()
    objective = AugmentedClipSpec(image_policy="simclr").build(model)
    image = torch.randint(0, 256, (6, 3, 32, 32), generator=torch_rng(0, "x"), dtype=torch.uint8)
    plain, eda = [
        torch.from_numpy(model.tokenizer([f"{opener} {word}" for word in CLASSES[:6]])).long()
        for opener in ("a photo of a", "this is a")
    ]
    batch = Batch(torch.arange(6), image, plain, {"eda": eda})
    batch = replace(batch, views=objective.views(batch, Draws(torch_rng(0), 6, 0, 6)))
    with torch.no_grad():
        (term,) = objective(model, batch, cast("Any", None)).values()
        views = augment("simclr", image, Draws(torch_rng(0), 6, 0, 6))
        logits = model.scale * model.encode_image(views) @ model.encode_text(eda).T
    log_p = [logits.log_softmax(dim).diagonal().mean() for dim in (0, 1)]
    assert float(term) == pytest.approx(-float(log_p[0] + log_p[1]) / 2, rel=1e-5)


def test_unknown_names_are_explained(scene: Scene) -> None:
    with pytest.raises(UsageError, match="Did you mean 'cleanclip'"):
        scene.apply(SameBudgetFinetune(like="cleanclp", budget=Budget.VIEWS))
    with pytest.raises(UsageError, match="Did you mean 'simclr_eda'"):
        scene.apply(AugmentOnly(policy="simcrl_eda"))


# --- truth

TOLD = (CleanTraining, OracleFilter, PartialOracle, UbtOracle)


def test_truth_is_a_need_of_four_controls() -> None:
    import importlib

    declared = set()
    for target in DEFENSES.values():
        module, name = target.split(":")
        defense = getattr(importlib.import_module(module), name)
        if Need.TRUTH in defense.needs:
            declared.add(defense)
    assert declared == set(TOLD)


@pytest.mark.parametrize(
    "defense",
    [
        NoDefense(),
        CleanModel(),
        RandomFilter(),
        SameBudgetFinetune(),
        AugmentOnly(),
        Finetune(),
        CleanClip(),
        RoClip(),
    ],
)
def test_asking_for_the_truth_undeclared_raises(scene: Scene, defense: Any) -> None:
    case = scene.stage(defense).case(scene.lab())
    with pytest.raises(Forbidden, match=f"{defense.name} asked for truth"):
        _ = case.truth
    refused = {need for need in Need if need not in defense.needs}
    for need in refused:
        with pytest.raises(Forbidden):
            getattr(case, need.value)
    for need in defense.needs:
        getattr(case, need.value)


def test_the_truth_is_the_poisoned_rows_and_the_data_as_it_was(scene: Scene) -> None:
    truth = scene.stage(OracleFilter()).case(scene.lab()).truth
    assert np.array_equal(truth.poisoned, truth_of(scene))
    assert truth.restored == DataRef(scene.suspect.key, ROWS)
    unpoisoned = scene.stage(OracleFilter(), rate_0=True).case(scene.lab()).truth
    assert not unpoisoned.poisoned.any()


@dataclass(frozen=True, slots=True, kw_only=True)
class Cheat(Defense):
    """A filter that would like to know."""

    name: ClassVar[str] = "cheat"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "none"
    phase: ClassVar[Phase] = Phase.FILTERING
    needs: ClassVar[frozenset[Need]] = frozenset({Need.SUSPECT_DATA, Need.TRUTH})
    fidelity: ClassVar[Fidelity] = Fidelity.EXACT
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    def apply(self, lab: Lab, case: Case) -> Defended:
        raise AssertionError(json.dumps(case.truth.poisoned.tolist()))


def test_a_defense_cannot_declare_the_truth(scene: Scene) -> None:
    """Neither when it is looked up for a plan nor when a stage hands out what it declares."""
    with pytest.raises(Forbidden, match=r"cheat is a filtering defense and declares Need\.TRUTH"):
        check_truth(Cheat())
    with pytest.raises(Forbidden, match="cheat"):
        scene.stage(Cheat()).case(scene.lab())
    with pytest.raises(Forbidden, match="cheat"):
        _checked("defenses", Method("cheat", __name__, "Cheat", "a-plugin"), Cheat)
    for control in TOLD:
        check_truth(control)
