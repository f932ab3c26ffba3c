"""The clauses about an attack's trigger: what a stamp does to pictures, again and elsewhere.

Shapes: B batch, C channels, H W pixels.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attacks.base import STAMPING, Attack, Knowledge, Poison, poison, trigger_key
from grid.kit_base import PICTURES, Kit, expect
from grid.kit_common import built, target_of
from grid.stages import load_trigger, save_trigger
from victims.triggers import Trigger

COUNT = 12  # rows poisoned where a clause needs some


def craft(attack: Attack, kit: Kit, size: int = 32, seed: int = 0) -> Trigger:
    """The attack's trigger for pictures of that size, crafted once per kit."""
    key = (id(attack), size, seed)
    if key not in kit.crafted:
        # The attack is kept beside its trigger, so that no other object gets its id.
        kit.crafted[key] = attack, crafted_anew(attack, kit, size, seed)
    trigger: Trigger = kit.crafted[key][1]
    return trigger


def crafted_anew(attack: Attack, kit: Kit, size: int, seed: int) -> Trigger:
    """Crafted on as many threads as the kit's runtime says, like every stage: their number may
    change the bits of what is optimised."""
    threads = torch.get_num_threads()
    torch.set_num_threads(kit.runtime.threads)
    try:
        return attack.craft(kit.lab(size), kit.held(size, seed), size)
    finally:
        torch.set_num_threads(threads)


def count_of(attack: Attack) -> int:
    """How many rows are poisoned where a clause needs some."""
    return max(attack.unit, COUNT // attack.unit * attack.unit)


def knows(attack: Attack, kit: Kit, seed: int = 0) -> Knowledge:
    """What the attacker holds once its trigger is crafted."""
    return dataclasses.replace(kit.held(seed=seed), crafted=craft(attack, kit, seed=seed))


def poisoned(attack: Attack, kit: Kit, count: int | None = None, seed: int = 0) -> Poison:
    return poison(attack, knows(attack, kit, seed), count_of(attack) if count is None else count)


def stamps_8_bit_pictures(attack: Attack, kit: Kit) -> None:
    """At 32, 64 and 224 px a stamp gives new uint8 pictures and leaves its input as it was."""
    for size in PICTURES:
        trigger, image_BCHW = craft(attack, kit, size), kit.pictures(size)
        before_BCHW = image_BCHW.clone()
        for name, stamp in stamps_of(trigger):
            where = f"{name} at {size} px"
            out_BCHW = stamp(image_BCHW)
            expect(
                out_BCHW.dtype == torch.uint8 and out_BCHW.shape == image_BCHW.shape,
                f"{out_BCHW.dtype} {tuple(out_BCHW.shape)} from {where}",
                f"torch.uint8 {tuple(image_BCHW.shape)}",
            )
            kept = torch.equal(image_BCHW, before_BCHW)
            expect(kept, f"that {where} changed its input", "the input as it was")


def changes_pictures(attack: Attack, kit: Kit) -> None:
    """A stamp changes 99 of 100 natural pictures, in training and at test, or there is none.

    Clean-image attacks change none in training.
    """
    for size in PICTURES:
        trigger, image_BCHW = craft(attack, kit, size), kit.pictures(size)
        for name, stamp in stamps_of(trigger):
            share = float((stamp(image_BCHW) != image_BCHW).flatten(1).any(1).float().mean())
            if attack.aim not in STAMPING or (attack.clean_image and name != "stamp"):
                expect(share == 0, f"{share:.1%} of pictures changed by {name}", "none changed")
                continue
            expect(share >= 0.99, f"{share:.1%} of pictures changed by {name} at {size} px", "99%")


def stamps_the_same_again(attack: Attack, kit: Kit) -> None:
    """Called again, alone or in another batch, with other global random state: the same bytes."""
    trigger, image_BCHW = craft(attack, kit), kit.pictures()[:32]
    for name, stamp in stamps_of(trigger):
        first_BCHW = stamp(image_BCHW)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            before = torch.get_rng_state()
            again_BCHW = stamp(image_BCHW)
            untouched = torch.equal(before, torch.get_rng_state())
        same = torch.equal(first_BCHW, again_BCHW)
        expect(same, f"other bytes when {name} is called again", "the same bytes")
        expect(untouched, f"that {name} drew from torch's global generator", "keyed draws alone")
        alone = torch.cat([stamp(image_1CHW) for image_1CHW in torch.split(image_BCHW, 1)])
        same = torch.equal(first_BCHW, alone)
        expect(same, f"other bytes when {name} sees one picture at a time", "the same bytes")
        turned = torch.equal(first_BCHW.flip(0), stamp(image_BCHW.flip(0)))
        expect(turned, f"other bytes when {name} sees the batch in reverse", "the same bytes")


def stamps_the_same_elsewhere(attack: Attack, kit: Kit) -> None:
    """Another process, with two threads and another hash seed, makes the same of the same."""
    key = trigger_key(attack, kit.goal, 0, 32)
    if key not in kit.elsewhere:
        visit([type(attack)], kit)
    expect(key in kit.elsewhere, "another key in another process", "the same key")
    same = kit.elsewhere[key] == fingerprint(attack, kit)
    expect(same, "another trigger, stamp or choice of rows in another process", "the same")


def does_not_wrap(attack: Attack, kit: Kit) -> None:
    """Brighter pictures come out brighter: no byte runs over white or under black.

    Pictures of 64 near-blacks, near-greys and near-whites; the bytes of all, sorted, must rise
    from one to the next wherever a stamp draws its places or pixels. Released forms may wrap.
    """
    trigger = craft(attack, kit)
    dither_BCHW = kit.pictures()[:64] % 2
    for name, stamp in stamps_of(trigger):
        levels = [stamp(dither_BCHW + level).flatten().sort().values for level in (0, 127, 254)]
        for (dark, bright), what in zip(
            [(levels[0], levels[1]), (levels[1], levels[2])], ("black", "white"), strict=True
        ):
            worst = int((dark.int() - bright.int()).max())
            expect(
                worst <= 16,
                f"bytes that wrap in {name} of {what} pictures (out of order by {worst} levels)",
                "values clamped to 0..255 before they become bytes",
            )


def comes_back_from_disk(attack: Attack, kit: Kit) -> None:
    """A trigger that was saved and loaded is the same, field by field, and stamps the same."""
    trigger, image_BCHW = craft(attack, kit), kit.pictures()[:16]
    key = trigger_key(attack, kit.goal, 0, 32)
    kit.store.make(key, lambda scratch: save_trigger(trigger, scratch))
    loaded = load_trigger(kit.store, key, attack)
    before, after = fields_of(trigger), fields_of(loaded)
    lost = [name for name in before if digest_of(before[name]) != digest_of(after[name])]
    expect(not lost, f"other values of {', '.join(lost)} after loading", "what was saved")
    for (name, stamp), (_, again) in zip(stamps_of(trigger), stamps_of(loaded), strict=True):
        same = torch.equal(stamp(image_BCHW), again(image_BCHW))
        expect(same, f"other bytes from {name} after loading", "the same bytes")


# --- what an attack makes, here and in another process


def made(attack: Attack, kit: Kit, seed: int) -> list[Any]:
    """What an attack makes of a seed: the trigger, crafted anew, the rows and the captions."""
    crafted = crafted_anew(attack, kit, 32, seed)
    held = dataclasses.replace(kit.held(seed=seed), crafted=crafted)
    found = poison(attack, held, count_of(attack))
    edits = found.data.edits
    numbers: list[Any] = [edits.rows, edits.images, edits.shows, found.roles, found.data.order()]
    dealt = [column.tolist() for column in numbers]
    return [digest_of(fields_of(crafted)), dealt, list(edits.captions)]


def fingerprint(attack: Attack, kit: Kit) -> str:
    """A digest of all that an attack makes from the kit's world."""
    trigger, image_BCHW = craft(attack, kit), kit.pictures()[:32]
    stamped = [stamp(image_BCHW) for _, stamp in stamps_of(trigger)]
    return digest_of([made(attack, kit, 0), stamped])


def visit(classes: Iterable[type[Any]], kit: Kit, *, variants: bool = True) -> None:
    """Fingerprints of attacks, and of all their variants, taken by one other process."""
    classes = list(classes)
    named = [[cls, "", *(cls.variants if variants else ())] for cls in classes]
    targets = [f"{target_of(cls)}:{name}" for cls, *names in named for name in names]
    for suited in dict.fromkeys(kit.suited(cls) for cls in classes):
        suited.held()
    code = "from grid.kit_stamps import report_fingerprints as r; r()"
    paths = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, "-c", code, str(kit.root), *targets],
        env={**os.environ, "PYTHONPATH": paths, "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        check=False,
    )
    last = done.stderr.strip().splitlines()[-1:] or ["nothing on its standard error"]
    expect(done.returncode == 0, f"another process that ended with {last[0]}", "fingerprints")
    kit.elsewhere |= json.loads(done.stdout.splitlines()[-1])


def report_fingerprints() -> None:
    """The other process: arguments are the kit's folder and classes; prints JSON."""
    from importlib import import_module
    from operator import attrgetter

    torch.manual_seed(99)
    kit, found = Kit(Path(sys.argv[1])), dict[str, str]()
    for target in sys.argv[2:]:
        module, name, variant = target.split(":")
        attack = built(attrgetter(name)(import_module(module)), variant)
        own = kit.suited(attack)
        found[trigger_key(attack, own.goal, 0, 32)] = fingerprint(attack, own)
    print(json.dumps(found))


def stamps_of(trigger: Trigger) -> list[tuple[str, Callable[[Tensor], Tensor]]]:
    names = ("stamp", "stamp_train", "stamp_cover")
    return [(name, getattr(trigger, name)) for name in names]


def fields_of(trigger: Trigger) -> dict[str, Any]:
    plain: Any = trigger
    return {f.name: getattr(plain, f.name) for f in dataclasses.fields(plain)}


def digest_of(value: Any) -> str:
    """Of tensors, bit for bit, and of plain values with their types."""
    hashed = hashlib.sha256()

    def add(one: Any) -> None:
        if isinstance(one, Tensor):
            hashed.update(f"{one.dtype}{tuple(one.shape)}".encode())
            hashed.update(one.detach().cpu().contiguous().numpy().tobytes())
        elif isinstance(one, dict):
            for name in sorted(one):
                hashed.update(name.encode())
                add(one[name])
        elif isinstance(one, list):
            hashed.update(f"list{len(one)}".encode())
            for item in one:
                add(item)
        else:
            hashed.update(f"{type(one).__name__}:{one!r};".encode())

    add(value)
    return hashed.hexdigest()
