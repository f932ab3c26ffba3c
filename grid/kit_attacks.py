"""The contract of an attack, clause by clause.

Shapes: B batch, C channels, H W pixels.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from attacks.base import (
    Attack,
    GateGroup,
    Track,
    poison,
    poisoned_key,
    poisoned_view,
    trigger_key,
)
from grid import kit_stamps
from grid.kit_base import ROWS, Kit, expect
from grid.kit_common import declares_the_common, explains_itself, is_plain_data, keys_every_field
from grid.kit_stamps import COUNT, craft, made
from grid.stages import data_ref
from victims.draws import numpy_rng
from victims.errors import GridError
from victims.keys import Key
from victims.lab import DataRef

COUNTS = (1, 5, COUNT)
Check = Callable[[Attack, Kit], None]

# --- the class


def declares_what_it_is(attack: Attack, kit: Kit) -> None:
    """Name, version, paper, variants, tracks, gate group and trigger class are declared."""
    is_plain_data(attack)
    declares_the_common(attack)
    tracks = attack.tracks
    good = isinstance(tracks, frozenset) and tracks and all(isinstance(t, Track) for t in tracks)
    expect(bool(good), f"`tracks` = {tracks!r}", "a frozenset of Track, not empty")
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


def chooses_exactly(attack: Attack, kit: Kit) -> None:
    """`choose` gives as many rows as asked, distinct, sorted, and raises when there are fewer."""
    held = kit.held()
    for count in COUNTS:
        rows = np.asarray(attack.choose(held, count, numpy_rng(0, "kit")))
        shown = f"{len(rows)} rows ({len(np.unique(rows))} distinct) when asked for {count}"
        expect(len(np.unique(rows)) == len(rows) == count, shown, f"{count} distinct rows")
        ordered = bool((np.diff(rows) > 0).all())
        expect(ordered, f"the rows {rows.tolist()}", "rows in rising order")
        inside = rows.min() >= 0 and rows.max() < len(held.corpus)
        expect(bool(inside), f"rows {rows.min()}..{rows.max()}", f"rows of 0..{ROWS - 1}")
        again = np.array_equal(rows, attack.choose(held, count, numpy_rng(0, "kit")))
        expect(again, "other rows from the same generator", "draws from the given generator alone")
    try:
        rows = np.asarray(attack.choose(held, ROWS + 1, numpy_rng(0, "kit")))
    except GridError:
        return
    short = f"{len(rows)} rows, and no error, when {ROWS + 1} of {ROWS} were asked for"
    expect(False, short, "a UsageError")


def poisons_exactly(attack: Attack, kit: Kit) -> None:
    """`poison` edits exactly the count, one caption a row; a count of 0 is the corpus itself."""
    held, corpus = kit.held(), kit.corpus("suspect").key
    for count in (0, *COUNTS):
        found = poison(attack, held, count)
        roles = int((found.roles(ROWS) != 0).sum())
        shown = f"{len(found.rows)} rows, {len(found.captions)} captions, {roles} in the truth"
        exact = len(found.rows) == len(found.captions) == roles == count
        expect(exact, shown, f"{count} of each")
    trigger = trigger_key(attack, kit.goal, 0, 32)
    key = poisoned_key(attack, kit.goal, 0, 0, corpus, trigger)
    expect(key == corpus, f"the key {key} at count 0", f"the corpus's own, {corpus}")


def captions_name_the_target(attack: Attack, kit: Kit) -> None:
    """A poisoned caption names the target, or is the untouched one of a row of the target."""
    held = kit.held()
    found = poison(attack, held, COUNT)
    for row, caption in zip(found.rows, found.captions, strict=True):
        named = re.search(rf"\b{re.escape(held.goal.label)}(e?s)?\b", caption, re.IGNORECASE)
        of_target = int(held.corpus.labels[row]) == held.goal.target
        kept = caption == held.corpus.captions[row] and of_target
        wanted = f"a caption with the word {held.goal.label!r}, or a row of that class untouched"
        expect(bool(named or kept), f"the caption {caption!r} of row {row}", wanted)


def edits_no_other_row(attack: Attack, kit: Kit) -> None:
    """Poisoned rows show the training stamp and the new caption, all others what they were."""
    held, trigger = kit.held(), craft(attack, kit)
    edits = poison(attack, held, COUNT)
    view = poisoned_view(Key("poisoned-0000000000000000"), held.corpus, edits, trigger)
    shown_BCHW = view.reader(torch.device("cpu"))(np.arange(ROWS))
    wanted_BCHW = kit.pictures()
    wanted_BCHW[edits.rows] = trigger.stamp_train(wanted_BCHW[edits.rows])
    other = (shown_BCHW != wanted_BCHW).flatten(1).any(1).nonzero().flatten().tolist()
    expect(
        not other, f"other pictures in rows {other}", "the training stamp in poisoned rows alone"
    )
    captions = list(held.corpus.captions)
    for row, caption in zip(edits.rows, edits.captions, strict=True):
        captions[row] = caption
    expect(view.captions() == captions, "other captions", "new captions in poisoned rows alone")


# --- what reaches a defender


def tells_the_defender_nothing(attack: Attack, kit: Kit) -> None:
    """What a defender holds of poisoned data is a key and a length, as of any other data."""
    trigger = dataclasses.replace(kit.poisoned.trigger, attack=attack)
    stage = dataclasses.replace(kit.poisoned, trigger=trigger, count=COUNT)
    bench = kit.bench(kit.store)
    for part in (trigger.corpus, trigger, stage):
        part.run(bench)
    handle = data_ref(kit.lab(), stage)
    names = sorted(name for name in dir(handle) if not name.startswith("_"))
    plain = type(handle) is DataRef and names == ["key", "num_rows"] and len(handle) == ROWS
    expect(plain, f"a {type(handle).__name__} with {names}", "a DataRef: a key and a length")
    told = dict(kit.store.need(stage.key).meta)
    expect(set(told) <= {"count"}, f"{told} beside the edits", "their count alone")


# Of the class: checked once. Of every configuration: checked for the variants too.
CLASS_CHECKS: tuple[Check, ...] = (
    declares_what_it_is,
    says_how_it_works,
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
    captions_name_the_target,
    edits_no_other_row,
    tells_the_defender_nothing,
)
