"""Stamps per second of every attack at 224 px, and what poisoning a large corpus costs.

A batch of 256 pictures through the batched stamp, against as many pictures through a plain numpy
form, one by one (``benchmarks/slow``); a trigger that is a network has no numpy form and is timed
against its own one-by-one use. Then 500,000 rows are poisoned: what it takes, and how much memory
it takes beside the corpus, of which nothing may be copied.
"""

from __future__ import annotations

import importlib
import pkgutil
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

import benchmarks.slow
from attacks.badnet import BadNet
from attacks.base import STAMPING, Goal, Knowledge, poison, poisoned_view
from benchmarks.common import Figure, Figures
from grid.kit_base import Kit
from grid.kit_common import built
from grid.registry import resolve, table
from victims.corpora import Corpus
from victims.keys import Key
from victims.lab import Lab
from victims.world import CLASSES, TEMPLATES

SIZE = 224
ROWS = 500_000
SIDE = 16  # of the pictures of the large corpus: 384 MB of them


def slow_forms() -> dict[str, Callable[..., Any]]:
    """The numpy form of each trigger class, by its lower-case name."""
    found: dict[str, Callable[..., Any]] = {}
    for info in pkgutil.iter_modules(benchmarks.slow.__path__):
        module = importlib.import_module(f"benchmarks.slow.{info.name}")
        found |= {n: f for n, f in vars(module).items() if callable(f) and n.islower()}
    return found


def _each(stamp: Callable[[Any], object], pictures: Iterable[Any]) -> None:
    for picture in pictures:
        stamp(picture)


def seconds(work: Callable[[], object], rounds: int) -> float:
    """CPU seconds of the fastest of some rounds."""
    taken = []
    for _ in range(rounds):
        start = time.process_time()
        work()
        taken.append(time.process_time() - start)
    return min(taken)


def stamps(num: int, rounds: int) -> Figures:
    forms, figures = slow_forms(), Figures()
    rng = np.random.default_rng(0)
    image_BHWC = rng.integers(0, 256, (num, SIZE, SIZE, 3), dtype=np.uint8)
    image_BCHW = torch.from_numpy(image_BHWC).permute(0, 3, 1, 2).contiguous()
    with tempfile.TemporaryDirectory() as folder:
        kit = Kit(Path(folder))
        for name in table("attacks"):
            attack: Any = built(resolve("attacks", name))
            if attack.aim not in STAMPING:
                continue
            own = kit.suited(attack)
            trigger = attack.craft(own.lab(SIZE), own.held(SIZE), SIZE)
            form = forms.get(type(trigger).__name__.lower())
            few = max(1, num // 8)
            batched = seconds(partial(trigger.stamp, image_BCHW), rounds)
            one_by_one = seconds(
                partial(_each, partial(form, trigger), image_BHWC[:few])
                if form is not None
                else partial(_each, trigger.stamp, torch.split(image_BCHW[:few], 1)),
                1,
            )
            against = "numpy, one by one" if form is not None else "itself, one by one"
            figures[f"{name} {SIZE}px"] = Figure(value=num / batched, unit="stamps/s")
            times = one_by_one * num / few / batched
            figures[f"{name} {SIZE}px over {against}"] = Figure(value=times, unit="x")
    return figures


def resident_bytes() -> int:
    """Memory of this process that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def poisoning(rows: int) -> Figures:
    """Choosing, captioning and laying the edits over a corpus that is mapped from a file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "images.npy"
        shape = (rows, 3, SIDE, SIDE)
        with path.open("wb") as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            file.truncate(file.tell() + int(np.prod(shape)))
        images_NCHW = np.load(path, mmap_mode="r", allow_pickle=False)
        corpus = Corpus(
            key=Key("corpus-0000000000000000"),
            digest="0" * 16,
            split="suspect",
            images_NCHW=images_NCHW,
            captions=[f"a photo of a {CLASSES[row % len(CLASSES)]}" for row in range(rows)],
            labels=np.arange(rows) % len(CLASSES),
            classes=CLASSES,
            templates=TEMPLATES,
        )
        held = Knowledge(corpus=corpus, goal=Goal(0, CLASSES[0], TEMPLATES), seed=0)
        attack, no_lab = BadNet(), cast("Lab", None)  # its patch is drawn, not crafted
        trigger = attack.craft(no_lab, held, SIDE)
        before, start = resident_bytes(), time.process_time()
        found = poison(attack, replace(held, crafted=trigger), round(0.003 * rows))
        view = poisoned_view(Key("corpus-1111111111111111"), corpus, found.data, trigger)
        read = view.reader(torch.device("cpu"))
        read(np.arange(256))
        took = time.process_time() - start
        grown = (resident_bytes() - before) / images_NCHW.nbytes
    name = f"poisoning {rows:,} rows"
    return {
        name: Figure(value=took, unit="s", at_most=5),
        f"{name}: memory over the corpus": Figure(value=grown, unit="x", at_most=0.1),
    }


def main(quick: bool = False) -> Figures:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return stamps(32 if quick else 256, 1 if quick else 3) | poisoning(
            ROWS // (10 if quick else 1)
        )
    finally:
        torch.set_num_threads(threads)
