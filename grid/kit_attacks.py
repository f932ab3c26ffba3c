"""The contract of an attack, clause by clause.

Shapes: B batch, C channels, H W pixels.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from attacks.base import (
    ROLES,
    STAMPING,
    Aim,
    Attack,
    GateGroup,
    Role,
    Track,
    poisoned_key,
    poisoned_view,
    trigger_key,
)
from grid import kit_stamps
from grid.kit_base import ROWS, Kit, expect
from grid.kit_common import declares_the_common, explains_itself, is_plain_data, keys_every_field
from grid.kit_stamps import COUNT, count_of, craft, knows, made, poisoned
from grid.stages import data_ref, save_trigger
from victims.corpora import Show
from victims.draws import numpy_rng
from victims.errors import GridError
from victims.keys import Key
from victims.lab import DataRef
from victims.triggers import Targets
from victims.work import Work

Check = Callable[[Attack, Kit], None]

# --- the class


def says_what_crafting_costs(attack: Attack, kit: Kit) -> None:
    """What crafting will send through a network is known before, or said not to be."""
    found = attack.costs(ROWS, 10)
    steps = 0.0 if found is None else found.steps(0.5)
    good = math.isfinite(steps) and steps >= 0
    expect(good, f"`costs` of {steps} steps", "a number, not negative, or None")
    reads = found != Work() or not attack.needs_surrogate
    expect(reads, "`costs` of nothing", "more than nothing, as it reads the surrogate")


def declares_what_it_is(attack: Attack, kit: Kit) -> None:
    """Name, version, paper, variants, tracks, gate group and trigger class are declared."""
    is_plain_data(attack)
    declares_the_common(attack)
    tracks = attack.tracks
    good = isinstance(tracks, frozenset) and tracks and all(isinstance(t, Track) for t in tracks)
    expect(bool(good), f"`tracks` = {tracks!r}", "a frozenset of Track, not empty")
    aim = isinstance(attack.aim, Aim)
    expect(aim, f"`aim` = {attack.aim!r}", f"one of {', '.join(Aim)} as Aim")
    legal = isinstance(attack.group, GateGroup)
    expect(legal, f"`group` = {attack.group!r}", f"one of {', '.join(GateGroup)} as GateGroup")
    crafted = craft(attack, kit)
    exact = type(crafted) is attack.trigger and dataclasses.is_dataclass(crafted)
    expect(
        exact,
        f"a crafted {type(crafted).__name__}, `trigger` = {attack.trigger!r}",
        "`trigger` to be the dataclass that craft returns",
    )


def says_how_it_works(attack: Attack, kit: Kit) -> None:
    """The docstring has its six blocks."""
    explains_itself(attack)


# --- identity


def keys_all_its_fields(attack: Attack, kit: Kit) -> None:
    """Every field is part of the trigger's and of the poisoned data's key."""

    def keys(one: Any) -> list[Any]:
        trigger = trigger_key(one, kit.goal, 0, 32)
        corpus = kit.corpus("suspect").key
        data = poisoned_key(one, kit.goal, 5, 0, corpus, trigger_key(attack, kit.goal, 0, 32))
        return [trigger, data]

    keys_every_field(attack, keys)


def follows_its_seed(attack: Attack, kit: Kit) -> None:
    """One seed gives one trigger and one choice of rows, another seed gives others."""
    same = made(attack, kit, 0) == made(attack, kit, 0)
    expect(same, "two different results of the same seed", "the same trigger, rows and captions")
    other = made(attack, kit, 0) != made(attack, kit, 1)
    expect(other, "the same trigger, rows and captions of seeds 0 and 1", "a difference")


# --- rows and captions


def counts(attack: Attack) -> tuple[int, ...]:
    return (1, 5, COUNT) if attack.unit == 1 else (attack.unit, 2 * attack.unit)


def chooses_exactly(attack: Attack, kit: Kit) -> None:
    """`choose` gives as many rows as asked, distinct, sorted unless pairs are added, or raises."""
    held = knows(attack, kit)
    for count in counts(attack):
        rows = np.asarray(attack.choose(held, count, numpy_rng(0, "kit")))
        shown = f"{len(rows)} rows ({len(np.unique(rows))} distinct) when asked for {count}"
        expect(len(np.unique(rows)) == len(rows) == count, shown, f"{count} distinct rows")
        ordered = attack.appends or bool((np.diff(rows) > 0).all())
        expect(ordered, f"the rows {rows.tolist()}", "rows in rising order")
        inside = rows.min() >= 0 and rows.max() < len(held.corpus)
        expect(bool(inside), f"rows {rows.min()}..{rows.max()}", f"rows of 0..{ROWS - 1}")
        again = np.array_equal(rows, attack.choose(held, count, numpy_rng(0, "kit")))
        expect(again, "other rows from the same generator", "draws from the given generator alone")
    many = (ROWS // attack.unit + 1) * attack.unit
    try:
        rows = np.asarray(attack.choose(held, many, numpy_rng(0, "kit")))
    except GridError:
        return
    short = f"{len(rows)} rows, and no error, when {many} of {ROWS} were asked for"
    expect(False, short, "a UsageError")


def poisons_exactly(attack: Attack, kit: Kit) -> None:
    """`poison` edits exactly the count, one caption a row; a count of 0 is the corpus itself."""
    corpus = kit.corpus("suspect").key
    for count in (0, *counts(attack)):
        found = poisoned(attack, kit, count)
        data, truth = found.data, found.truth()
        in_truth = int((truth == ROLES.index(Role.POISON)).sum())
        shown = f"{len(found.of(Role.POISON))} rows, {in_truth} in the truth"
        expect(len(found.of(Role.POISON)) == in_truth == count, shown, f"{count} of each")
        whole = len(data.edits.rows) == len(data.edits.captions) == len(found.roles)
        expect(whole, "edits without a caption or a role", "one of each for every edit")
        added = count if attack.appends else 0
        length = ROWS + added - len(data.removed)
        expect(len(truth) == length, f"data of {len(truth)} rows", f"{length}")
    trigger = trigger_key(attack, kit.goal, 0, 32)
    key = poisoned_key(attack, kit.goal, 0, 0, corpus, trigger)
    expect(key == corpus, f"the key {key} at count 0", f"the corpus's own, {corpus}")


def captions_fit_the_aim(attack: Attack, kit: Kit) -> None:
    """A poisoned caption names what its attack is after; a cover row keeps its own meaning.

    A stamped row's caption names the target, or is the untouched one of a row of the target. A
    chosen picture gets captions of its chosen class. A text-side row shows the target, and its
    caption does not name it. Who relabels freely gives any class but the row's own.
    """
    held, trigger = knows(attack, kit), craft(attack, kit)
    found = poisoned(attack, kit)
    edits, corpus = found.data.edits, held.corpus

    def names(caption: str, label: str) -> bool:
        return bool(re.search(rf"\b{re.escape(label)}(e?s)?\b", caption, re.IGNORECASE))

    for index in found.of(Role.POISON):
        caption, image = edits.captions[index], int(edits.images[index])
        where = f"the caption {caption!r} with the picture of row {image}"
        of_target = int(corpus.labels[image]) == held.goal.target
        if isinstance(trigger, Targets):
            place = trigger.images.tolist().index(image)
            label = corpus.classes[int(trigger.classes[place])]
            expect(names(caption, label), where, f"a caption with the word {label!r}")
        elif attack.aim is Aim.QUERIES:
            fits = of_target and not names(caption, held.goal.label)
            expect(fits, where, "a picture of the target, and words that do not name it")
        elif attack.relabels_freely:
            other = caption in corpus.classes and caption != corpus.captions[image]
            expect(other, where, "the name of another class than its own")
        else:
            kept = of_target and caption == corpus.captions[image]
            wanted = f"the word {held.goal.label!r} in it, or a row of that class untouched"
            expect(kept or names(caption, held.goal.label), where, wanted)
    for index in found.of(Role.COVER):
        own = corpus.captions[int(edits.rows[index])]
        true = edits.captions[index] in (own, trigger.mark(own))
        expect(true, f"the caption {edits.captions[index]!r} of a cover row", f"{own!r}, or marked")


def edits_no_other_row(attack: Attack, kit: Kit) -> None:
    """Edited rows show their own stamp, picture and caption, all others what they were."""
    held, trigger = knows(attack, kit), craft(attack, kit)
    found = poisoned(attack, kit)
    edits, order = found.data.edits, found.data.order()
    view = poisoned_view(Key("poisoned-0000000000000000"), held.corpus, found.data, trigger)
    shown_BCHW = view.reader(torch.device("cpu"))(np.arange(len(view)))
    place = {int(row): position for position, row in enumerate(order)}
    plain = order < ROWS
    wanted_BCHW = kit.pictures()[np.where(plain, order, 0)]
    captions = [held.corpus.captions[row] if row < ROWS else "" for row in order]
    for index, row in enumerate(edits.rows.tolist()):
        image_1CHW = kit.pictures()[edits.images[index : index + 1]]
        if found.roles[index] == ROLES.index(Role.COVER):
            if edits.shows[index] == Show.COVER:
                image_1CHW = trigger.stamp_cover(image_1CHW)
        elif attack.aim in STAMPING:
            image_1CHW = trigger.stamp_train(image_1CHW)
        wanted_BCHW[place[row]] = image_1CHW[0]
        captions[place[row]] = edits.captions[index]
    other = (shown_BCHW != wanted_BCHW).flatten(1).any(1).nonzero().flatten().tolist()
    expect(not other, f"other pictures at {other}", "the training stamp in edited rows alone")
    expect(view.captions() == captions, "other captions", "new captions in edited rows alone")
    gone = set(found.data.removed.tolist()) & set(place)
    expect(not gone, f"the removed rows {sorted(gone)} in the data", "none of them")


# --- what reaches a defender


def tells_the_defender_nothing(attack: Attack, kit: Kit) -> None:
    """What a defender holds of poisoned data is a key and a length, as of any other data."""
    trigger = dataclasses.replace(kit.poisoned.trigger, attack=attack)
    stage = dataclasses.replace(kit.poisoned, trigger=trigger, count=count_of(attack))
    bench = kit.bench(kit.store)
    trigger.corpus.run(bench)
    if trigger.key not in kit.store:
        kit.store.make(trigger.key, lambda scratch: save_trigger(craft(attack, kit), scratch))
    stage.run(bench)
    handle = data_ref(kit.lab(), stage)
    names = sorted(name for name in dir(handle) if not name.startswith("_"))
    length = len(poisoned(attack, kit).data)
    plain = type(handle) is DataRef and names == ["key", "num_rows"] and len(handle) == length
    expect(plain, f"a {type(handle).__name__} with {names}", "a DataRef: a key and a length")
    told = dict(kit.store.need(stage.key).meta)
    expect(not told, f"{told} beside the edits", "nothing")


# Of the class: checked once. Of every configuration: checked for the variants too.
CLASS_CHECKS: tuple[Check, ...] = (
    declares_what_it_is,
    says_how_it_works,
    says_what_crafting_costs,
    kit_stamps.does_not_wrap,
)
CHECKS: tuple[Check, ...] = (
    keys_all_its_fields,
    follows_its_seed,
    kit_stamps.stamps_8_bit_pictures,
    kit_stamps.changes_pictures,
    kit_stamps.stamps_the_same_again,
    kit_stamps.stamps_the_same_elsewhere,
    kit_stamps.comes_back_from_disk,
    chooses_exactly,
    poisons_exactly,
    captions_fit_the_aim,
    edits_no_other_row,
    tells_the_defender_nothing,
)
