"""The contract over every attack of the table, and proof that every clause can fail."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from attacks.base import Attack, GateGroup, Knowledge, Track, pick, template_caption
from defenses.base import (
    LR,
    LR_KNOB,
    Between,
    Case,
    Defended,
    Defense,
    Fidelity,
    Knob,
    Need,
    Phase,
    Space,
)
from grid import kit
from grid.kit_base import Broken, Kit
from grid.kit_common import alternatives, built, explains_itself
from grid.kit_stamps import crafted_anew, stamps_the_same_elsewhere, visit
from grid.registry import Kind, resolve, table
from grid.step_costs import USUAL_IMAGE_SHARE
from tests.contracts import clauses, method, methods
from victims.corpora import Reader, Rows, open_corpus
from victims.draws import image_digest, keyed_bits, numpy_rng
from victims.errors import GridError, UsageError
from victims.lab import Lab, ModelRef
from victims.models import Clip
from victims.recipe import Clock
from victims.training import Objective, PlainClip, PlainClipSpec
from victims.triggers import Trigger
from victims.work import Work


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Kit:
    """The kit, and what one other process makes of every attack: of variants where they are run."""
    made = Kit(tmp_path_factory.mktemp("kit"))
    attacks = [resolve("attacks", name) for name in table("attacks")]
    # An attack that breaks the visit fails its own clause, and only that.
    with contextlib.suppress(Broken):
        everything = request.config.getoption("markexpr") != "not exhaustive"
        visit([*attacks, PerProcess], made, variants=everything)
    return made


@pytest.mark.parametrize(("name", "variant", "check"), clauses("attacks"))
def test_every_attack_keeps_its_contract(
    name: str, variant: str, check: kit.Check, world: Kit
) -> None:
    attack = method("attacks", name, variant)
    check(attack, world.suited(attack))


READING = [name for name in sorted(table("attacks")) if resolve("attacks", name).needs_surrogate]


@pytest.mark.parametrize("name", READING)
def test_what_an_attack_crafts_on_the_surrogate_costs_about_what_it_says(
    name: str, world: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the surrogate's meter counted, against what was known before."""
    attack, loaded, load = method("attacks", name, ""), list[Clip](), Lab.load

    def seen(self: Lab, ref: ModelRef) -> Clip:
        loaded.append(load(self, ref))
        return loaded[-1]

    monkeypatch.setattr(Lab, "load", seen)
    kit = world.suited(attack)
    crafted_anew(attack, kit, 32, 0)
    (model,) = loaded
    meter = model.meter
    counted = Work(
        images=meter.images_forward - meter.images_backward,
        texts=meter.texts_forward - meter.texts_backward,
        images_trained=meter.images_backward,
        texts_trained=meter.texts_backward,
    )
    corpus = kit.held().corpus
    said = attack.costs(len(corpus), len(corpus.classes))
    share = 1.0 if kit.labelled else USUAL_IMAGE_SHARE
    assert counted.steps(share) / 2 <= said.steps(share) <= 2 * counted.steps(share)


def test_every_attack_and_variant_is_here() -> None:
    assert {name for name, _ in methods("attacks")} == set(table("attacks"))
    counted = {variant: len(kit.checks_of("attacks", variant)) for variant in ("", "any")}
    assert counted == {"": 16, "any": 12}


# --- an attack that keeps the contract, and its broken sisters


@dataclass(frozen=True, slots=True, kw_only=True)
class Spot(Trigger):
    """A square of one keyed colour in a corner."""

    colour: Tensor
    side: int

    def stamp(self, image_BCHW: Tensor) -> Tensor:
        out_BCHW = image_BCHW.clone()
        out_BCHW[:, :, : self.side, : self.side] = self.colour[:, None, None]
        return out_BCHW


@dataclass(frozen=True, slots=True, kw_only=True)
class Sound(Attack):
    """A spot and a caption.

    Idea: the plainest attack there is.
    Reference: none.
    Symbols: none.
    Where: everything is below.
    Differences: none known.
    Cost: none.
    """

    name: ClassVar[str] = "sound"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "none"
    tracks: ClassVar[frozenset[Track]] = frozenset({Track.MULTIMODAL})
    group: ClassVar[GateGroup] = GateGroup.STRONG
    trigger: ClassVar[type[Any]] = Spot
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {"wide": {"cells": 3}}

    cells: int = 2

    def craft(self, lab: Lab, held: Knowledge, size: int) -> Any:
        colour = torch.from_numpy(numpy_rng(held.seed, "sound").integers(0, 256, 3, np.uint8))
        return self.trigger(colour=colour, side=self.cells * size // 16)

    def choose(self, held: Knowledge, count: int, rng: np.random.Generator) -> Rows:
        return pick(np.arange(len(held.corpus)), count, rng, self.name)

    def recaption(self, caption: str, held: Knowledge, rng: np.random.Generator) -> str:
        return template_caption(held.goal, rng)


def _sister(base: type[Any], **members: Any) -> type[Any]:
    """The same class with other members; annotated ones become fields."""
    doc = members.pop("__doc__", base.__doc__)
    body = {**members, "__doc__": doc, "__module__": __name__}
    return dataclass(frozen=True, kw_only=True)(type(f"Broken{base.__name__}", (base,), body))


def _stamping(stamp: Callable[[Any, Tensor], Tensor], base: type[Any] = Spot) -> type[Any]:
    return _sister(Sound, trigger=_sister(base, stamp=stamp))


def _in_place(spot: Any, image_BCHW: Tensor) -> Tensor:
    image_BCHW[:, :, :2, :2] = 7
    return image_BCHW


def _floats(spot: Any, image_BCHW: Tensor) -> Tensor:
    return image_BCHW.float()


def _cropped(spot: Any, image_BCHW: Tensor) -> Tensor:
    return Spot.stamp(spot, image_BCHW)[..., :-1]


def _only_small(spot: Any, image_BCHW: Tensor) -> Tensor:
    wave_W = torch.ones(32, dtype=torch.uint8)
    return (image_BCHW.float() * 0.5 + wave_W).to(torch.uint8)


def _seldom(spot: Any, image_BCHW: Tensor) -> Tensor:
    even_B = image_BCHW.flatten(1).sum(1) % 2 == 0
    return torch.where(even_B[:, None, None, None], Spot.stamp(spot, image_BCHW), image_BCHW)


def _dice(spot: Any, image_BCHW: Tensor) -> Tensor:
    out_BCHW = image_BCHW.clone()
    out_BCHW[:, :, :2, :2] = torch.randint(0, 256, (2, 2)).to(torch.uint8)
    return out_BCHW


def _by_batch(spot: Any, image_BCHW: Tensor) -> Tensor:
    out_BCHW = Spot.stamp(spot, image_BCHW)
    out_BCHW[:, :, -1] = int(image_BCHW.float().mean())
    return out_BCHW


def _by_position(spot: Any, image_BCHW: Tensor) -> Tensor:
    out_BCHW = Spot.stamp(spot, image_BCHW)
    if len(out_BCHW) > 1:
        out_BCHW[0] = 255 - image_BCHW[0]
    return out_BCHW


def _wrapping(spot: Any, image_BCHW: Tensor) -> Tensor:
    return image_BCHW + 40


def _wrapping_below(spot: Any, image_BCHW: Tensor) -> Tensor:
    return image_BCHW - 40


def _redrawn(spot: Any, image_BCHW: Tensor) -> Tensor:
    """Noise of its own for every picture: unusual, and sound."""
    out_BCHW = image_BCHW.clone()
    bits = keyed_bits(image_digest(image_BCHW, 5), 1, 3, 6, 6) >> 24
    out_BCHW[:, :, :6, :6] = bits.to(torch.uint8)
    return out_BCHW


def _pairs_craft(self: Any, lab: Lab, held: Knowledge, size: int) -> Any:
    return replace(Sound.craft(self, lab, held, size), side=(size // 8, size // 8))


def _pairs_stamp(spot: Any, image_BCHW: Tensor) -> Tensor:
    return Spot.stamp(Spot(colour=spot.colour, side=spot.side[0]), image_BCHW)


def _one_less(self: Any, held: Knowledge, count: int, rng: np.random.Generator) -> Rows:
    return Sound.choose(self, held, max(0, count - 1), rng)


def _repeats(self: Any, held: Knowledge, count: int, rng: np.random.Generator) -> Rows:
    return np.sort(rng.integers(0, 4, count))


def _unsorted(self: Any, held: Knowledge, count: int, rng: np.random.Generator) -> Rows:
    return rng.choice(len(held.corpus), count, replace=False)


def _never_short(self: Any, held: Knowledge, count: int, rng: np.random.Generator) -> Rows:
    return Sound.choose(self, held, min(count, len(held.corpus)), rng)


def _own_dice(self: Any, held: Knowledge, count: int, rng: np.random.Generator) -> Rows:
    return Sound.choose(self, held, count, np.random.default_rng())


def _same_rows(self: Any, held: Knowledge, count: int, rng: np.random.Generator) -> Rows:
    return Sound.choose(self, held, count, np.random.default_rng(0))


def _same_colour(self: Any, lab: Lab, held: Knowledge, size: int) -> Any:
    return self.trigger(colour=torch.tensor([1, 2, 3], dtype=torch.uint8), side=size // 8)


def _same_caption(self: Any, caption: str, held: Knowledge, rng: np.random.Generator) -> str:
    return f"a photo of a {held.goal.label}"


def _class_nought(self: Any, caption: str, held: Knowledge, rng: np.random.Generator) -> str:
    return f"a photo of a {held.corpus.classes[0]}"


def _untouched(self: Any, caption: str, held: Knowledge, rng: np.random.Generator) -> str:
    return caption


def _plain_spot(self: Any, lab: Lab, held: Knowledge, size: int) -> Any:
    return Spot(colour=torch.tensor([1, held.seed, 3], dtype=torch.uint8), side=size // 8)


def _any_other(self: Any, caption: str, held: Knowledge, rng: np.random.Generator) -> str:
    return next(name for name in held.corpus.classes if name != caption)


def _not_in_training(spot: Any, image_BCHW: Tensor) -> Tensor:
    return image_BCHW.clone()


UNKEYED = {"__annotations__": {"place": str}, "place": field(default="", metadata={"keyed": False})}
DOC = str(Sound.__doc__)

ANNOTATOR = {
    "clean_image": True,
    "relabels_freely": True,
    "tracks": frozenset({Track.SUPERVISED}),
    "trigger": _sister(Spot, stamp_train=_not_in_training),
}
BROKEN_ATTACKS: dict[str, tuple[type[Any], set[str]]] = {
    "sound": (_sister(Sound), set()),
    "annotator": (_sister(Sound, recaption=_any_other, **ANNOTATOR), set()),
    "annotator_stamps": (
        _sister(Sound, recaption=_any_other, **{**ANNOTATOR, "trigger": Spot}),
        {"changes_pictures"},
    ),
    "annotator_keeps": (
        _sister(Sound, recaption=_untouched, **ANNOTATOR),
        {"captions_fit_the_aim"},
    ),
    "annotator_undeclared": (
        _sister(Sound, recaption=_any_other, **{**ANNOTATOR, "relabels_freely": False}),
        {"captions_fit_the_aim"},
    ),
    "stamps_undeclared": (
        _sister(Sound, recaption=_any_other, **{**ANNOTATOR, "clean_image": False}),
        {"changes_pictures"},
    ),
    "redrawn": (_stamping(_redrawn), set()),
    "in_place": (_stamping(_in_place), {"stamps_8_bit_pictures"}),
    "floats": (_stamping(_floats), {"stamps_8_bit_pictures", "changes_pictures"}),
    "cropped": (_stamping(_cropped), {"stamps_8_bit_pictures", "edits_no_other_row"}),
    "only_small": (_stamping(_only_small), {"stamps_8_bit_pictures", "changes_pictures"}),
    "seldom": (_stamping(_seldom), {"changes_pictures"}),
    "dice": (_stamping(_dice), {"stamps_the_same_again", "comes_back_from_disk"}),
    "by_batch": (_stamping(_by_batch), {"stamps_the_same_again"}),
    "by_position": (_stamping(_by_position), {"stamps_the_same_again"}),
    "wrapping": (_stamping(_wrapping), {"does_not_wrap"}),
    "wrapping_below": (_stamping(_wrapping_below), {"does_not_wrap"}),
    "pairs": (
        _sister(Sound, craft=_pairs_craft, trigger=_sister(Spot, stamp=_pairs_stamp)),
        {"comes_back_from_disk"},
    ),
    "one_less": (_sister(Sound, choose=_one_less), {"chooses_exactly", "poisons_exactly"}),
    "repeats": (_sister(Sound, choose=_repeats), {"chooses_exactly", "poisons_exactly"}),
    "unsorted": (_sister(Sound, choose=_unsorted), {"chooses_exactly"}),
    "never_short": (_sister(Sound, choose=_never_short), {"chooses_exactly"}),
    "own_dice": (_sister(Sound, choose=_own_dice), {"chooses_exactly", "follows_its_seed"}),
    "seedless": (
        _sister(Sound, choose=_same_rows, craft=_same_colour, recaption=_same_caption),
        {"follows_its_seed"},
    ),
    "class_nought": (_sister(Sound, recaption=_class_nought), {"captions_fit_the_aim"}),
    "untouched": (_sister(Sound, recaption=_untouched), {"captions_fit_the_aim"}),
    "unkeyed": (_sister(Sound, **UNKEYED), {"keys_all_its_fields"}),
    "undocumented": (_sister(Sound, __doc__="A spot."), {"says_how_it_works"}),
    "no_symbols": (
        _sister(Sound, __doc__=DOC.replace("Symbols: none.", "")),
        {"says_how_it_works"},
    ),
    "version_text": (_sister(Sound, version="1"), {"declares_what_it_is"}),
    "no_track": (_sister(Sound, tracks=frozenset()), {"declares_what_it_is"}),
    "group_text": (_sister(Sound, group="strong"), {"declares_what_it_is"}),
    "other_trigger": (
        _sister(Sound, craft=_plain_spot, trigger=_sister(Spot)),
        {"declares_what_it_is"},
    ),
    "no_paper": (_sister(Sound, paper=""), {"declares_what_it_is"}),
    "idle_variant": (_sister(Sound, variants={"same": {"cells": 2}}), {"declares_what_it_is"}),
    "bad_variant": (_sister(Sound, variants={"odd": {"cellz": 2}}), {"declares_what_it_is"}),
}


def _failed(kind: Kind, cls: type[Any], wanted: set[str], world: Kit) -> set[str]:
    """Names of the clauses that a class does not keep, of those wanted, or of all."""
    method, failed = built(cls), set()
    for check in kit.checks_of(kind):
        # What another process makes of a class needs one that it can import: tested below.
        if check is stamps_the_same_elsewhere or (wanted and check.__name__ not in wanted):
            continue
        try:
            check(method, world)
        except Exception:
            failed.add(check.__name__)
    return failed


@pytest.mark.parametrize("name", BROKEN_ATTACKS)
def test_a_broken_attack_fails_its_clauses(name: str, world: Kit) -> None:
    cls, expected = BROKEN_ATTACKS[name]
    assert _failed("attacks", cls, expected, world) == expected


@dataclass(frozen=True, slots=True, kw_only=True)
class PerProcess(Sound):
    """Rows that depend on the process: hash() of text differs between two."""

    name: ClassVar[str] = "per_process"

    def choose(self, held: Knowledge, count: int, rng: np.random.Generator) -> Rows:
        rows = np.arange(len(held.corpus))
        return pick(rows, count, np.random.default_rng(os.getpid()), self.name)


def test_an_attack_that_depends_on_its_process_is_found(world: Kit) -> None:
    with pytest.raises(Broken, match="another trigger, stamp or choice of rows in another process"):
        stamps_the_same_elsewhere(PerProcess(), world)


# --- a defense that keeps the contract, and its broken sisters


@dataclass(frozen=True, slots=True, kw_only=True)
class Gentle(Defense):
    __doc__ = DOC

    name: ClassVar[str] = "gentle"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "none"
    phase: ClassVar[Phase] = Phase.FINETUNING
    needs: ClassVar[frozenset[Need]] = frozenset({Need.VICTIM, Need.CLEAN_DATA})
    fidelity: ClassVar[Any] = Fidelity.EXACT
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    knob: ClassVar[Knob | None] = LR_KNOB
    space: ClassVar[Space] = {"recipe.lr": LR, "share": Between(low=0.1, high=1)}

    share: float = 0.5

    def apply(self, lab: Lab, case: Case) -> Defended:
        recipe = replace(case.recipes.repair, lr=case.recipes.repair.rate * self.share)
        return Defended(lab.train(PlainClipSpec(), case.clean_data, recipe, init=case.victim))


class Restless(PlainClip):
    """Adds noise that no seed determines."""

    def forward(self, model: Any, batch: Any, clock: Clock) -> dict[str, Tensor]:
        noise = random.SystemRandom().random()
        return {**super().forward(model, batch, clock), "noise": noise * model.scale}


@dataclass(frozen=True, slots=True, kw_only=True)
class RestlessSpec:
    name: ClassVar[str] = "restless"
    version: ClassVar[int] = 1

    def build(self, model: Any) -> Objective:
        return Restless()


def _unseeded(self: Any, lab: Lab, case: Case) -> Defended:
    return Defended(lab.train(RestlessSpec(), case.clean_data, case.recipes.repair))


def _another_seed(self: Any, lab: Lab, case: Case) -> Defended:
    recipe = replace(case.recipes.repair, seed=random.SystemRandom().randrange(2**40))
    return Defended(lab.train(PlainClipSpec(), case.clean_data, recipe, init=case.victim))


def _idle(self: Any, lab: Lab, case: Case) -> Defended:
    return Defended(case.victim)


def _unmoved(self: Any, lab: Lab, case: Case) -> Defended:
    recipe = replace(case.recipes.repair, lr=0.0)
    return Defended(lab.train(PlainClipSpec(), case.clean_data, recipe, init=case.victim))


def _greedy(self: Any, lab: Lab, case: Case) -> Defended:
    assert len(case.suspect_data)
    return Gentle.apply(self, lab, case)


def _peeks_at(kind: str) -> Callable[[Any, Lab, Case], Defended]:
    """Reads whatever of a kind lies in the store, as no handle of the case allows."""

    def apply(self: Any, lab: Lab, case: Case) -> Defended:
        for key in lab.store.keys(kind):
            lab.store.need(key)
        return Gentle.apply(self, lab, case)

    return apply


def _reads_report(self: Any, lab: Lab, case: Case) -> Defended:
    for key in lab.store.keys("corpus"):
        with contextlib.suppress(GridError):
            open_corpus(lab.store, key, Reader.TUNING)
    return Gentle.apply(self, lab, case)


def _bare(self: Any, lab: Lab, case: Case) -> Any:
    return case.victim


def _no_model(self: Any, lab: Lab, case: Case) -> Any:
    return Defended(ModelRef("model-0123456789abcdef"))  # type: ignore[arg-type]


def _flags(shape: int, dtype: Any) -> Callable[[Any, Lab, Case], Defended]:
    def apply(self: Any, lab: Lab, case: Case) -> Defended:
        trained = Gentle.apply(self, lab, case)
        return replace(trained, flagged=np.zeros(len(case.suspect_data) + shape, dtype=dtype))

    return apply


def _scores_too_few(self: Any, lab: Lab, case: Case) -> Defended:
    trained = Gentle.apply(self, lab, case)
    return replace(trained, scores={"first": np.zeros(3, np.float32)})


def _needs_poison(self: Any, lab: Lab, case: Case) -> Defended:
    assert case.truth.poisoned.any()
    return Gentle.apply(self, lab, case)


def _needs_reference(self: Any, lab: Lab, case: Case) -> Defended:
    assert case.start is not None
    return Gentle.apply(self, lab, case)


OWN = {Need.VICTIM, Need.CLEAN_DATA}
JUDGE = {"needs": frozenset({*OWN, Need.SUSPECT_DATA})}
CONTROL = {"needs": frozenset({*OWN, Need.SUSPECT_DATA, Need.TRUTH}), "phase": Phase.CONTROL}
STARTER = {"needs": frozenset({*OWN, Need.START})}
RUNS = {"hands_back_a_model", "does_nothing_twice", "repeats_bit_for_bit"}

BROKEN_DEFENSES: dict[str, tuple[type[Any], set[str]]] = {
    "sound": (_sister(Gentle), set()),
    "judge": (_sister(Gentle, apply=_flags(0, bool), **JUDGE), set()),
    "unseeded": (_sister(Gentle, apply=_unseeded), {"repeats_bit_for_bit"}),
    "another_seed": (
        _sister(Gentle, apply=_another_seed),
        {"does_nothing_twice", "repeats_bit_for_bit"},
    ),
    "idle": (_sister(Gentle, apply=_idle), {"moves_the_weights"}),
    "unmoved": (_sister(Gentle, apply=_unmoved), {"moves_the_weights"}),
    "greedy": (_sister(Gentle, apply=_greedy), RUNS),
    "truth": (_sister(Gentle, apply=_peeks_at("truth")), {"reads_what_it_declares_alone"}),
    "edits": (_sister(Gentle, apply=_peeks_at("corpus")), {"reads_what_it_declares_alone"}),
    "report": (_sister(Gentle, apply=_reads_report), {"reads_what_it_declares_alone"}),
    "truthful": (
        _sister(Gentle, needs=frozenset({*OWN, Need.TRUTH})),
        {"declares_what_it_is"},
    ),
    "bare": (_sister(Gentle, apply=_bare), RUNS),
    "no_model": (_sister(Gentle, apply=_no_model), {"hands_back_a_model"}),
    "long_flags": (_sister(Gentle, apply=_flags(1, bool), **JUDGE), {"judges_every_row"}),
    "soft_flags": (_sister(Gentle, apply=_flags(0, float), **JUDGE), {"judges_every_row"}),
    "needs_poison": (
        _sister(Gentle, apply=_needs_poison, **CONTROL),
        {"defends_other_victims"},
    ),
    "needs_reference": (
        _sister(Gentle, apply=_needs_reference, **STARTER),
        {"defends_other_victims"},
    ),
    "unkeyed": (_sister(Gentle, **UNKEYED), {"keys_all_its_fields"}),
    "undocumented": (_sister(Gentle, __doc__="Gentle."), {"says_how_it_works"}),
    "no_needs": (_sister(Gentle, needs={Need.VICTIM}), {"declares_what_it_is"}),
    "no_knob": (_sister(Gentle, knob=None), {"offers_its_settings"}),
    "knob_of_nothing": (
        _sister(Gentle, knob=Knob(name="temper", values=(1, 2))),
        {"offers_its_settings"},
    ),
    "one_knob_value": (
        _sister(Gentle, knob=Knob(name="share", values=(0.5,))),
        {"offers_its_settings"},
    ),
    "illegal_space": (
        _sister(Gentle, space={"recipe.epochs": Between(low=0, high=3)}),
        {"offers_its_settings"},
    ),
    "no_scores": (
        _sister(Gentle, apply=_scores_too_few, **JUDGE),
        {"judges_every_row"},
    ),
    "phase_text": (_sister(Gentle, phase="finetuning"), {"declares_what_it_is"}),
    "fidelity_word": (_sister(Gentle, fidelity="close"), {"declares_what_it_is"}),
    "fidelity_f_only": (_sister(Gentle, fidelity={"F": "exact"}), {"declares_what_it_is"}),
}


@pytest.mark.parametrize("name", BROKEN_DEFENSES)
def test_a_broken_defense_fails_its_clauses(name: str, world: Kit) -> None:
    cls, expected = BROKEN_DEFENSES[name]
    assert _failed("defenses", cls, expected, world) == expected


def test_what_was_read_is_said_by_name(world: Kit) -> None:
    method = built(BROKEN_DEFENSES["report"][0])
    from grid.kit_defenses import reads_what_it_declares_alone

    with pytest.raises(Broken) as caught:
        reads_what_it_declares_alone(method, world)
    message = str(caught.value)
    assert "(report)" in message
    assert "(tuning)" in message
    assert "its needs alone: clean_data, victim" in message


# --- building and printing


def test_a_method_without_a_default_cannot_be_built() -> None:
    cls = _sister(Sound, __annotations__={"strength": float})
    with pytest.raises(Broken, match=r"cannot be built with its defaults: missing key 'strength'"):
        built(cls)


def test_alternatives_have_the_field_s_type() -> None:
    cases: list[tuple[Any, Any]] = [
        (int, 3),
        (float, 0.5),
        (bool, True),
        (str, "a"),
        (int | None, None),
        (int | None, 2),
        (tuple[float, float], (0.1, 1.0)),
        (Phase, Phase.CONTROL),
    ]
    for hint, value in cases:
        found = list(alternatives(hint, value))
        assert found, hint
        assert value not in found, hint
    assert {type(v) for v in alternatives(int | None, 2)} == {int, type(None)}


def test_the_blocks_may_stand_in_the_class_or_the_file() -> None:
    explains_itself(Sound())
    with pytest.raises(Broken, match="found the blocks Idea, Reference, Where, Differences, Cost"):
        explains_itself(built(BROKEN_ATTACKS["no_symbols"][0]))


def test_check_method_prints_a_line_per_clause() -> None:
    lines: list[str] = []
    failed = kit.check_method(f"{__name__}:Gentle", lines.append)
    assert failed == []
    assert lines[0] == f"{__name__}:Gentle: defense {__name__}:Gentle"
    assert lines[-1].startswith("13 checks, 0 failed, ")
    assert [line.split(maxsplit=1)[0] for line in lines[1:-1]] == ["ok"] * 13
    assert float(lines[-1].split()[-2]) < 60


def test_check_method_says_what_was_found_and_expected() -> None:
    lines: list[str] = []
    failed = kit.check_method(f"{__name__}:Careless", lines.append)
    assert f"FAILED  {failed[0]}" in lines
    declared = next(line for line in failed if line.startswith("declares"))
    assert declared == ("declares what it is: found `version` = 0; expected a whole number >= 1")
    raised = next(line for line in failed if line.startswith("hands back"))
    assert "found RuntimeError: not yet; expected: The defended model loads" in raised


@dataclass(frozen=True, slots=True, kw_only=True)
class Careless(Gentle):
    version: ClassVar[int] = 0

    def apply(self, lab: Lab, case: Case) -> Defended:
        raise RuntimeError("not yet")


def test_what_is_no_method_is_refused() -> None:
    with pytest.raises(UsageError, match=r"no method called 'cleanclp'. Did you mean 'cleanclip'"):
        kit.load_class("cleanclp")
    with pytest.raises(UsageError, match=r"no_such_module:Thing cannot be imported: ModuleNotF"):
        kit.load_class("no_such_module:Thing")
    with pytest.raises(UsageError, match=r"tests.test_contracts:Clock is no method: an attack is"):
        kit.load_class("tests.test_contracts:Clock")
