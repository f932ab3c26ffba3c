"""The contract of a defense, clause by clause, on a victim of the kit's world."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from defenses.base import (
    Between,
    Case,
    Defense,
    Fidelity,
    Need,
    OneOf,
    Phase,
    Regime,
    Sizes,
    fidelity_in,
)
from grid.decode import decode
from grid.kit_base import ROWS, Kit, expect
from grid.kit_common import declares_the_common, explains_itself, is_plain_data, keys_every_field
from grid.kit_runs import Run, applied, run_of, stage_of
from grid.nodes import Raw, Where
from victims.errors import Forbidden, UsageError
from victims.keys import Key, kind_of
from victims.lab import ModelRef

Check = Callable[[Defense, Kit], None]
TRAINS = (Phase.PRETRAINING, Phase.FINETUNING)


# --- the class


def declares_what_it_is(defense: Defense, kit: Kit) -> None:
    """Name, version, paper, variants, phase, needs and fidelity are declared and legal."""
    is_plain_data(defense)
    declares_the_common(defense)
    phase, needs = defense.phase, defense.needs
    words = ", ".join(Phase)
    expect(isinstance(phase, Phase), f"`phase` = {phase!r}", f"one of {words} as Phase")
    good = isinstance(needs, frozenset) and needs and all(isinstance(n, Need) for n in needs)
    expect(bool(good), f"`needs` = {needs!r}", "a frozenset of Need, not empty")
    honest = Need.TRUTH not in needs or phase is Phase.CONTROL
    expect(honest, f"the need of truth in phase {phase}", "truth for controls alone")
    for regime in Regime:
        try:
            fidelity_in(defense, regime)
        except (KeyError, TypeError, ValueError):
            shown = f"`fidelity` = {defense.fidelity!r}, which says nothing of regime {regime}"
            expect(False, shown, f"one of {', '.join(Fidelity)} as Fidelity, or one per Regime")


def offers_its_settings(defense: Defense, kit: Kit) -> None:
    """Its knob and its search space name fields, of its own or of the recipe, and legal values."""
    knob, space = defense.knob, dict(defense.space)
    proposes = defense.phase is not Phase.CONTROL
    expect(knob is not None or not proposes, "no `knob`", "the setting of its trade-off curve")
    settings = {name: list(values_of(found)) for name, found in space.items()}
    if knob is not None:
        good = len(knob.values) > 1
        expect(good, f"`knob` with the values {knob.values}", "two or more values for its curve")
        settings[f"{knob.name} "] = list(knob.values)
    for name, values in settings.items():
        for value in values:
            try:
                _with_setting(defense, kit, name.strip(), value)
            except (UsageError, ValueError, TypeError) as error:
                shown = f"{name.strip()} = {value!r} in `knob` or `space`: {error}"
                expect(False, shown, "a field or recipe.FIELD, and values that are legal there")


def values_of(found: Between | OneOf) -> Sequence[Any]:
    """The ends of a range, or every choice."""
    return found.values if isinstance(found, OneOf) else (found.low, found.high)


def _with_setting(defense: Defense, kit: Kit, name: str, value: object) -> None:
    of_recipe = name.startswith("recipe.")
    owner: Any = kit.recipe(epochs=1) if of_recipe else defense
    field = name.removeprefix("recipe.")
    plain = list(value) if isinstance(value, tuple) else value
    changed = decode(type(owner), Raw.of({field: plain}, Where(path=name)), base=owner)
    if not of_recipe:
        changed.check()


def says_what_it_costs(defense: Defense, kit: Kit) -> None:
    """What it will send through the network is known before: more where there are more rows."""
    stage = stage_of(defense, kit)
    found = [
        defense.costs(stage.recipes, Sizes(clean=rows, suspect=rows, classes=10)).steps(0.5)
        for rows in (ROWS, 100 * ROWS)
    ]
    good = all(math.isfinite(steps) and steps >= 0 for steps in found) and found[1] >= found[0]
    expect(good, f"`costs` of {found} steps", "numbers, not negative, not fewer for more rows")
    at_work = found[0] > 0 or not stage.trains
    expect(at_work, "`costs` of nothing", "more than nothing, as it is given data to train on")


def says_how_it_works(defense: Defense, kit: Kit) -> None:
    """The docstring has its six blocks."""
    explains_itself(defense)


# --- identity


def keys_all_its_fields(defense: Defense, kit: Kit) -> None:
    """Every field is part of the defended model's key."""
    keys_every_field(defense, lambda one: [stage_of(one, kit).key])


# --- what it is handed


def is_refused_what_it_does_not_declare(defense: Defense, kit: Kit) -> None:
    """A case gives each declared need and raises Forbidden on every other."""
    stage = stage_of(defense, kit)
    case: Case = stage.case(kit.lab(store=kit.ready))
    for need in Need:
        if need in defense.needed():
            given = getattr(case, need.value)
            # An image classifier begins with random weights, which no reference names.
            named = given is not None or (need is Need.START and kit.labelled)
            expect(named, f"nothing for the declared need {need}", "what it names")
            continue
        try:
            given = getattr(case, need.value)
        except Forbidden:
            continue
        expect(False, f"{given!r} for the undeclared need {need}", "Forbidden")


def reads_what_it_declares_alone(defense: Defense, kit: Kit) -> None:
    """Of the store it reads its needs and what it made: no evaluation split, no truth."""
    run = run_of(defense, kit)
    allowed = {*run.stage.inputs, *run.used}
    if Need.TRUTH in defense.needed():
        allowed.add(kit.poisoned.truth_key)
    names = {kit.corpus(split).key: split for split in ("public", "tuning", "report", "shifted")}
    names |= {kit.poisoned.truth_key: "the truth", kit.poisoned.key: "the suspect data"}
    strays = [f"{key} ({names.get(Key(key)) or kind_of(key)})" for key in run.read - allowed]
    needs = ", ".join(sorted(defense.needed()))
    expect(not strays, f"that it read {', '.join(sorted(strays))}", f"its needs alone: {needs}")


# --- what it hands back


def hands_back_a_model(defense: Defense, kit: Kit) -> None:
    """The defended model loads, is finite, and sees pictures and captions."""
    run = run_of(defense, kit)
    expect(isinstance(run.done.model, ModelRef), f"{run.done.model!r}", "a ModelRef as `model`")
    model = run.lab.load(run.done.model)
    broken = [n for n, t in model.state_dict().items() if not bool(torch.isfinite(t).all())]
    expect(not broken, f"weights that are not finite: {', '.join(broken)}", "finite weights")
    with torch.no_grad():
        image_BD = model.encode_image(kit.pictures()[:8])
        tokens_BT = torch.from_numpy(model.tokenizer(kit.held().corpus.captions[:8]))
        text_BD = model.encode_text(tokens_BT)
    lengths = torch.cat([image_BD, text_BD]).norm(dim=-1)
    unit = bool((lengths - 1).abs().max() < 1e-4)
    expect(unit, f"features of lengths {lengths.tolist()}", "unit features")


def judges_every_row(defense: Defense, kit: Kit) -> None:
    """`flagged` and `suspicion`, where given, have one entry per suspect row."""
    done = run_of(defense, kit).done
    flags, scores = np.dtype(bool), np.dtype(np.float32)
    for name, found, dtype in (
        ("flagged", done.flagged, flags),
        ("suspicion", done.suspicion, scores),
        *((f"sets[{name!r}]", values, flags) for name, values in done.sets.items()),
        *((f"scores[{name!r}]", values, scores) for name, values in done.scores.items()),
    ):
        if found is None:
            continue
        fits = isinstance(found, np.ndarray) and found.shape == (ROWS,) and found.dtype == dtype
        shown = f"`{name}` of {getattr(found, 'dtype', type(found).__name__)} {np.shape(found)}"
        expect(fits, shown, f"{dtype} ({ROWS},), one per suspect row")
        if name.startswith("scores"):
            no_inf = not np.isinf(found).any()
            expect(no_inf, f"`{name}` with inf", "numbers, or NaN for a row without a score")
        else:
            expect(bool(np.isfinite(found).all()), f"`{name}` with NaN", "finite numbers")
        allowed = Need.SUSPECT_DATA in defense.needed()
        expect(allowed, f"`{name}` without the need suspect_data", "that it saw what it judges")


def moves_the_weights(defense: Defense, kit: Kit) -> None:
    """What it trains differs from the victim; a method that repairs or retrains does train."""
    run = run_of(defense, kit)
    victim, key = run.stage.victim.key, run.done.model.key
    if defense.phase in TRAINS:
        untouched = {victim, kit.reference.key}
        expect(
            key not in untouched,
            f"{key}, a model it was given",
            f"one it trained, in phase {defense.phase}",
        )
    if key in run.used:
        ours, theirs = _weights(run, key), _weights(run, victim)
        moved = [n for n in ours if not torch.equal(ours[n], theirs[n])]
        expect(bool(moved), "the victim's weights, all equal, after training", "a difference")


def _weights(run: Run, key: Key) -> dict[str, Tensor]:
    """What training moves; statistics that a forward pass updates are none of it."""
    return dict(run.lab.load(ModelRef(key)).named_parameters())


# --- again


def does_nothing_twice(defense: Defense, kit: Kit) -> None:
    """A restart finds every step by its key, and a finished stage runs nothing."""
    run = run_of(defense, kit)
    bench = kit.bench(run.store)
    stage = stage_of(defense, kit)
    expect(stage.key == run.stage.key, "another key for the same stage", "the same key")
    stage.run(bench)
    again = [key for key in bench.ledger.made if key != stage.key]
    shown = f"that a restart made {', '.join(again)} anew"
    expect(not again, shown, "steps memoised by keys that hold all that determines them")
    bench = kit.bench(run.store)
    stage.run(bench)
    expect(not bench.ledger.made, f"that a third run made {bench.ledger.made}", "nothing to do")


def repeats_bit_for_bit(defense: Defense, kit: Kit) -> None:
    """In another store, with other global random state, it makes the same, to the last bit."""
    first = run_of(defense, kit)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        second = applied(defense, kit)
    same = first.done.model.key == second.done.model.key and first.made == second.made
    shown = f"{second.done.model.key} after {second.made}"
    expect(same, shown, f"{first.done.model.key} after {first.made}, as before")
    for key in first.made:
        files = first.store.need(key).files
        other = [n for n in files if _bytes(first, key, n) != _bytes(second, key, n)]
        expect(not other, f"other bytes in {', '.join(other)} of {key}", "the same bytes")
    for name in ("flagged", "suspicion"):
        ours, theirs = getattr(first.done, name), getattr(second.done, name)
        expect(np.array_equal(ours, theirs), f"another `{name}`", "the same in every run")
    for name in ("sets", "scores"):
        ours, theirs = getattr(first.done, name), getattr(second.done, name)
        same = ours.keys() == theirs.keys() and all(
            values.tobytes() == theirs[key].tobytes() for key, values in ours.items()
        )
        expect(same, f"other `{name}`", "the same in every run")


def _bytes(run: Run, key: str, name: str) -> bytes:
    return Path(run.store.need(key).path(name)).read_bytes()


def defends_other_victims(defense: Defense, kit: Kit) -> None:
    """It also runs where nothing is poisoned, and on a victim trained from nothing."""
    _, clean, scratch = kit.victims()
    cases = {"a victim of rate 0": clean}
    if Need.REFERENCE not in defense.needed():
        cases["a victim of regime S"] = scratch
    for what, victim in cases.items():
        stage = dataclasses.replace(stage_of(defense, kit, victim), defense=defense)
        try:
            run = applied(defense, kit, stage)
        except Exception as error:
            expect(False, f"{type(error).__name__}: {error}, on {what}", "a defended model")
            raise
        run.lab.load(run.done.model)


CLASS_CHECKS: tuple[Check, ...] = (
    declares_what_it_is,
    offers_its_settings,
    says_what_it_costs,
    says_how_it_works,
    defends_other_victims,
)
CHECKS: tuple[Check, ...] = (
    keys_all_its_fields,
    is_refused_what_it_does_not_declare,
    reads_what_it_declares_alone,
    hands_back_a_model,
    judges_every_row,
    moves_the_weights,
    does_nothing_twice,
    repeats_bit_for_bit,
)
# A variant is applied once: what running again would show, the defaults have shown.
VARIANT_CHECKS: tuple[Check, ...] = CHECKS[:-2]
