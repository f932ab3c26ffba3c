"""Standings as a table of texts."""

from __future__ import annotations

import math
from dataclasses import asdict
from itertools import compress
from typing import Any

from analysis.inference import Mean, Span
from analysis.matrix import UNDEFENDED
from analysis.render import NEED_WORDS, UNKNOWN, percent
from analysis.standing import Standing, Standings
from analysis.text import Grid

HEADINGS = (
    *("Tier", "Rank", "Defense", "Given", "Mean ASR %", "CA lost, points", "Worst-case ASR %"),
    *("Pointwise %", "Front", "Beats finetune", "Cost"),
)
ALWAYS = ("Tier", "Defense", "Mean ASR %", "CA lost, points")
ARE_NUMBERS = (False, True, False, False, *[True] * 7)


def standing_table(found: Standings) -> Grid:
    """Lines by tier, under a head where their kinds differ."""
    limit = "" if found.at_ca_loss is None else f", at most {found.at_ca_loss:g} points of CA lost"
    but = " but those that a note names" if found.left_out else ""
    texts = [_texts(line) for line in found.lines]
    # A column that holds nothing says nothing; a tier is nothing that is left out.
    kept = [
        heading in ALWAYS or any(line[i] != UNKNOWN for line in texts)
        for i, heading in enumerate(HEADINGS)
    ]
    return Grid(
        title=f"Over all attacks and rates{but}{limit}",
        headings=list(compress(HEADINGS, kept)),
        lines=[list(compress(line, kept)) for line in texts],
        values=[
            {**_values(line), "left_out": "; ".join(found.left_out) or None} for line in found.lines
        ],
        are_numbers=list(compress(ARE_NUMBERS, kept)),
        notes=found.notes(),
        heads=[_head(line, found) for line in found.lines],
    )


def _head(line: Standing, found: Standings) -> str:
    if line.is_control:
        return "controls, not compared"
    if line.is_oracle:
        return "oracles, tuned on what no defender sees, not compared"
    if line.is_partial:
        return "partial: numbers on less than 95 % of the sound victims, not compared"
    if line.is_beyond:
        return f"beyond {found.at_ca_loss:g} points of clean accuracy, not compared"
    if line.defense == UNDEFENDED:
        return "undefended"
    return f"given {needs_words(line)}" if found.groups != [()] else "defenses"


def needs_words(line: Standing) -> str:
    return " + ".join(NEED_WORDS.get(need, need) for need in line.needs) or "nothing"


def _texts(line: Standing) -> list[str]:
    worst = UNKNOWN
    if line.worst is not None:
        worst = f"{_span(line.worst)} {line.worst_attack}"
    asr, loss = _mean(line.asr), _mean(line.loss)
    if line.bounds is not None:
        asr = f"{_range(line.bounds)} ({100 * line.coverage:.0f} % there)"
    if line.loss_bounds is not None:
        loss = _range(line.loss_bounds)
    marks = [
        *(["oracle"] if line.is_oracle else ["seen"] if line.is_seen else []),
        *([f"{line.failures} failed"] if line.failures else []),
    ]
    told = f" ({', '.join(marks)})" if marks else ""
    return [
        line.letters or UNKNOWN,
        UNKNOWN if line.rank is None else "-".join(map(str, dict.fromkeys(line.rank))),
        f"{line.defense}{told}{' *' if line.added_later else ''}",
        needs_words(line),
        asr,
        loss,
        worst,
        UNKNOWN if line.pointwise is None else _mean(line.pointwise),
        UNKNOWN if line.on_front is None else f"{line.on_front:.2f}",
        UNKNOWN if line.improves is None else f"{line.improves:.2f}",
        UNKNOWN if line.relative_cost is None else f"{line.relative_cost:.2f}",
    ]


def _range(bounds: tuple[float, float]) -> str:
    return f"{percent(bounds[0])} to {percent(bounds[1])}"


def _mean(mean: Mean) -> str:
    if math.isnan(mean.value):
        return UNKNOWN
    if math.isinf(mean.low):
        return percent(mean.value)
    return f"{100 * mean.value:.1f} [{100 * mean.low:.1f}, {100 * mean.high:.1f}]"


def _span(span: Span) -> str:
    return f"{100 * span.value:.1f} [{100 * span.low:.1f}, {100 * span.high:.1f}]"


def _values(line: Standing) -> dict[str, Any]:
    """Plain columns; an interval that one seed cannot give is null."""
    found: dict[str, Any] = {}
    for name, value in asdict(line).items():
        own = getattr(line, name)
        if isinstance(own, Mean | Span):
            found[name] = _finite(own.value)
            found[f"{name}_low"], found[f"{name}_high"] = _finite(own.low), _finite(own.high)
        elif name == "rank":
            found["rank_low"], found["rank_high"] = own or (None, None)
        elif name == "bounds":
            found["asr_best"], found["asr_worst"] = own or (None, None)
        elif name == "loss_bounds":
            found["loss_best"], found["loss_worst"] = own or (None, None)
        elif name == "needs":
            found["needs"] = " ".join(own)
        elif name in ("middle", "worst", "pointwise"):
            found |= {name: None, f"{name}_low": None, f"{name}_high": None}
        else:
            found[name] = value
    return found


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None
