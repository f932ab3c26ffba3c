"""What an embedded architecture cannot read: it knows the words of the embedded world alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from grid.spec import Grid
from victims.models import EMBEDDED, ModelSpec
from victims.words import world_vocabulary

_SHOWN = 5


def unread(names: Iterable[str]) -> list[str]:
    """The names in which a word is unknown to the tokenizer of whole words."""
    known = set(world_vocabulary())
    return [name for name in names if not known.issuperset(name.lower().split())]


def unread_cautions(grid: Grid) -> Iterator[str]:
    """Targets and classes that an embedded model reads as so many unknown words."""
    if not isinstance(grid.model, ModelSpec) or grid.model.arch not in EMBEDDED:
        return
    every = grid.data.classes
    targets, classes = unread(every[target] for target in grid.targets), unread(every)
    words = f"the {len(world_vocabulary())} words of the embedded world"
    arch = f"model: {grid.model.arch} reads {words}"
    if targets:
        yield (
            f"{arch}, and the target {', '.join(map(repr, targets))} is none of them: captions that"
            " name it name an unknown word. Take an architecture of open_clip, or another target."
        )
    if classes:
        some = ", ".join(classes[:_SHOWN]) + ", ..." * (len(classes) > _SHOWN)
        yield (
            f"{arch}, and cannot read {len(classes)} of {len(every)} classes ({some}):"
            " they are the same unknown word to it, and accuracy is chance at best among them. It"
            " shows that files are read; for numbers take an architecture of open_clip."
        )
