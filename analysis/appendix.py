"""What methods say of themselves, as the last part of the report: by file, block by block."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from analysis.methods import Method, method_of, methods_of
from analysis.page import Block, Prose, Section, Told

BLOCKS = ("Idea", "Reference", "Symbols", "Where", "Differences", "Cost")
LISTS = ("Symbols", "Where")
"""Blocks whose parts stand in lines of their own."""


def appendix(attacks: Iterable[str], defenses: Iterable[str]) -> Section:
    """The methods behind these labels; those that share a file share its part."""
    parts = []
    for package, labels in (("attacks", attacks), ("defenses", defenses)):
        known = methods_of(package)
        found = dict.fromkeys(m for label in labels if (m := method_of(label, package)))
        for file in dict.fromkeys(known[name].file for name in found):
            own = [known[name] for name in found if known[name].file == file]
            names = ", ".join(method.name for method in own)
            kind = package.removesuffix("s") if len(own) == 1 else package
            parts.append(
                Section(
                    name=f"{package}-{own[0].name}", title=f"{names} ({kind})", blocks=_blocks(own)
                )
            )
    return Section(name="methods", title="Methods", blocks=[], parts=parts)


def idea(label: str, package: str) -> Iterator[Block]:
    """One line of the method behind a label."""
    name = method_of(label, package)
    if name is not None:
        yield Prose(methods_of(package)[name].idea, has_code=True)


def _blocks(methods: list[Method]) -> list[Block]:
    """What the docstring of their file says, and of several each in its own words."""
    head, named = in_blocks(methods[0].told)
    first: list[Block] = [Prose(head, has_code=True)]
    if len(methods) > 1:
        first.append(Told(pairs=[(method.name, [method.idea]) for method in methods]))
    elif methods[0].idea != head:
        first.append(Prose(methods[0].idea, has_code=True))
    return [*first, *([Told(pairs=named)] if named else [])]


def in_blocks(told: str) -> tuple[str, list[tuple[str, list[str]]]]:
    """A method's docstring: what comes first, then its blocks by name, in lines."""
    pieces = re.split(rf"^({'|'.join(BLOCKS)}):", told, flags=re.MULTILINE)
    head, *rest = (" ".join(piece.split()) for piece in pieces)
    named = list(zip(rest[::2], rest[1::2], strict=True))
    return head, [(name, _items(said) if name in LISTS else [said]) for name, said in named]


def _items(said: str) -> list[str]:
    """Parts between semicolons, but for those within brackets."""
    items, depth = [""], 0
    for letter in said:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == ";" and depth <= 0:
            items.append("")
        else:
            items[-1] += letter
    return [item.strip() for item in items if item.strip()]
