"""What a knob can buy: the attack success that is left at so many points of clean accuracy.

The settings are those that a grid file lists with ``along``. The best of them is picked on the very
pictures that it is reported on, so this is what tuning could find at best, and it is never ranked.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from analysis.reader import Tables
from analysis.render import UNKNOWN
from analysis.standing import Standing, Standings
from analysis.text import Grid

LIMITS = (1.0, 2.0, 5.0)
"""Points of clean accuracy that may be lost."""


class Setting(NamedTuple):
    """One value of a knob, and where it stands: means over strata."""

    value: str
    asr: float
    loss: float


@dataclass(frozen=True, slots=True)
class Knob:
    """A defense at several settings; ``best`` are those of least ASR within each of `LIMITS`."""

    defense: str
    name: str
    settings: tuple[Setting, ...]
    missing: int
    best: tuple[Setting | None, ...]


def load_knobs(tables: Tables, found: Standings) -> list[Knob]:
    """The knobs of a board, in its order."""
    rows = tables.query(
        "SELECT DISTINCT ON (defense) defense, knob FROM newest"
        " WHERE metric = 'cell' AND knob IS NOT NULL ORDER BY defense"
    ).rows
    own = {str(label): json.loads(text) for label, text in rows}
    return knobs(own, found.lines)


def knobs(own: Mapping[str, Mapping[str, str]], lines: Sequence[Standing]) -> list[Knob]:
    """By label, of which settings it is one; lines without all their numbers are only counted."""
    families: dict[tuple[str, str], list[Standing]] = {}
    for line in lines:
        if line.defense in own:
            about = own[line.defense]
            families.setdefault((about["of"], about["name"]), []).append(line)
    made = []
    for (defense, name), members in families.items():
        whole = [line for line in members if not line.is_partial]
        settings = tuple(
            Setting(own[line.defense]["value"], line.asr.value, line.loss.value) for line in whole
        )
        best = tuple(least(settings, limit / 100) for limit in LIMITS)
        made.append(Knob(defense, name, settings, len(members) - len(whole), best))
    return made


def least(settings: Sequence[Setting], limit: float) -> Setting | None:
    """The setting of least ASR that loses at most ``limit``; of equals the one that loses less."""
    within = [setting for setting in settings if setting.loss <= limit + 1e-9]
    return min(within, key=lambda setting: (setting.asr, setting.loss), default=None)


def knob_table(found: Sequence[Knob]) -> Grid:
    """A line per knob."""
    points = [f"{limit:g} point{'s' if limit != 1 else ''}" for limit in LIMITS]
    return Grid(
        title="Mean ASR % along a knob, at so many points of CA lost",
        headings=["Defense", "Knob", "Settings", *points],
        lines=[
            [
                knob.defense,
                knob.name,
                ", ".join(setting.value for setting in knob.settings)
                + (f" ({knob.missing} incomplete)" if knob.missing else ""),
                *(
                    UNKNOWN if best is None else f"{100 * best.asr:.1f} at {best.value}"
                    for best in knob.best
                ),
            ]
            for knob in found
        ],
        values=[
            {
                "defense": knob.defense,
                "knob": knob.name,
                "settings": [setting._asdict() for setting in knob.settings],
                "missing": knob.missing,
                **{
                    f"at_{limit:g}": best._asdict() if best else None
                    for limit, best in zip(LIMITS, knob.best, strict=True)
                },
            }
            for knob in found
        ],
        are_numbers=[False, False, False, True, True, True],
        notes=[
            "Each is the best of its settings on the very pictures that it is reported on: what"
            " tuning could find at most, and no result of a defense."
        ],
        heads=["" for _ in found],
    )
