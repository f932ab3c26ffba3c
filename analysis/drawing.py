"""The figures of a results directory: what `analysis.figures` draws, out of the board's numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis import exhibits, figures
from analysis.imports.points import beside
from analysis.leaderboard import Asked, Found, read
from analysis.matrix import UNDEFENDED, load_matrix
from analysis.reader import Tables, read_tables
from analysis.standing import BY_WORST, Standing, Standings
from analysis.standing_render import needs_words
from analysis.theme import Drawn, draw_all, house_style, subtitle
from grid.schema.status import Status

if TYPE_CHECKING:
    import pandas as pd

CELLS = """
SELECT attack, track, regime, model, target, rate, defense, victim_seed AS seed,
       avg(asr_top1) AS asr, avg(clean_top1) AS clean,
       arg_max(status, CASE status WHEN 'ok' THEN 0 ELSE 1 END) AS status,
       bool_or(is_control) AS is_control, min(position) AS position, any_value(tuned) AS tuned
FROM cells
WHERE is_planned AND eval_set = ?
GROUP BY ALL
ORDER BY min(position), attack, rate, defense, seed
"""
ORACLE = " (oracle)"
"""What stands behind the name of a defense whose settings no defender could have chosen."""
KINDS = ("target", "model", "regime", "track")
"""What tells victims of one attack and rate apart."""


def figures_of(directory: Path, asked: Asked) -> Mapping[str, Callable[[], Any]]:
    """Every figure by the name of its function, drawn when it is called."""
    return read_tables(directory, lambda tables: figures_in(tables, asked))


def figures_in(
    tables: Tables, asked: Asked, answered: Found | None = None
) -> Mapping[str, Callable[[], Any]]:
    """The same of open results: their numbers are read now, unless the board's were."""
    import pandas as pd

    answer = tables.query(CELLS, asked.eval_set)
    cells = _marked(_told_apart(pd.DataFrame(answer.rows, columns=answer.columns)))
    answered = answered or read(tables, asked)
    tiers, imported = answered.tiers, answered.imported
    own = cells[~cells["is_control"].astype(bool)]
    order = list(dict.fromkeys(own["defense"]))
    poisoned = own[own["rate"] > 0]
    found: dict[str, Callable[[], Any]] = {
        "heat_map": partial(figures.heat_map, _over_seeds(poisoned)),
        "rate_curves": partial(
            figures.rate_curves, own[own["status"] == "ok"], order, _invalid_rates(own)
        ),
        "profile": partial(figures.profile, _of_sound_victims(poisoned), order),
        "cost": partial(figures.cost, _costs(tables, asked)),
    }
    if tiers is not None:
        points = _points(tiers)
        attacks, defenses = set(poisoned["attack"]), set(own["defense"])
        others = beside(imported, attacks, defenses, asked.eval_set)
        found["trade_off"] = partial(figures.trade_off, points, *others)
        found["rank_plot"] = partial(
            figures.rank_plot, _ranks(tiers), "worst ASR" if tiers.score == BY_WORST else "mean ASR"
        )
    curves = exhibits.rocs(tables)
    if len(curves):
        found["detection"] = partial(figures.detection, curves, order)
    seeds = cells["seed"].nunique()
    shown = f"{tables.grid.name or tables.directory.name}, {asked.eval_set} set"
    words = dict.fromkeys(found, f"{shown}, {seeds} victim seed{'' if seeds == 1 else 's'}")
    words["detection"] = f"{shown}, one victim an attack"
    return {name: partial(_styled, draw, words[name]) for name, draw in found.items()}


def attack_figures(tables: Tables) -> Mapping[str, Mapping[str, Callable[[], Any]]]:
    """By attack, what was kept of one victim to be looked at: pictures, features, fits."""
    found: dict[str, dict[str, Callable[[], Any]]] = {}
    grid, victims = tables.grid.name or tables.directory.name, exhibits.victims(tables)

    def add(attack: str, kind: str, draw: Callable[[], Any]) -> None:
        words = f"{grid}: {attack}, {victims[attack]}"
        found.setdefault(attack, {})[kind] = partial(_styled, draw, words)

    shown = exhibits.pictures(tables)
    for name in dict.fromkeys(picture.attack for picture in shown):
        own = [picture._replace(attack="") for picture in shown if picture.attack == name]
        add(name, "gallery", partial(figures.gallery, own))
    for kind, draw, frame in (
        ("feature_map", figures.feature_map, exhibits.features(tables)),
        ("training", figures.training, exhibits.fits(tables)),
    ):
        for attack, rows in frame.groupby("attack", sort=False):
            add(str(attack), kind, partial(draw, rows))
    return found


def draw_board(
    directory: Path, folder: Path, asked: Asked, say: Callable[[str], None] = lambda _: None
) -> Drawn:
    """Draw every figure into a folder, each as PNG and SVG; ``say`` hears what is going on."""

    def every(tables: Tables) -> dict[str, Callable[[], Any]]:
        by_attack = attack_figures(tables)
        of_attacks = {f"{n}-{a}": d for a, own in by_attack.items() for n, d in own.items()}
        return {**figures_in(tables, asked), **of_attacks}

    drawn = read_tables(directory, every)
    say(f"drawing {len(drawn)} figures ...")
    return draw_all(drawn, folder)


def _styled(draw: Callable[[], Any], words: str) -> Any:
    """A figure under what it shows."""
    with house_style():
        figure = draw()
        subtitle(figure, words)
        return figure


def _told_apart(cells: pd.DataFrame) -> pd.DataFrame:
    """Attacks with what differs among a board's victims behind them: nothing is averaged over."""
    differ = [name for name in KINDS if cells[name].nunique() > 1]
    if not differ:
        return cells
    kinds = cells[differ].astype(str).agg(", ".join, axis=1)
    return cells.assign(attack=cells["attack"] + " (" + kinds + ")")


def _marked(cells: pd.DataFrame) -> pd.DataFrame:
    """Oracles with a mark behind their names: they are drawn beside, and compared with nothing."""
    oracles = {
        defense
        for defense, tuned in zip(cells["defense"], cells["tuned"], strict=True)
        if isinstance(tuned, str) and json.loads(tuned).get("oracle")
    }
    named = {defense: f"{defense}{ORACLE}" for defense in oracles}
    return cells.assign(defense=cells["defense"].replace(named)).drop(columns=["tuned"])


def _of_sound_victims(cells: pd.DataFrame) -> pd.DataFrame:
    """Every cell that could have a number, with no ASR where the defense gave none."""
    victim = ["attack", "rate", "seed"]
    is_sound = (cells["defense"] == UNDEFENDED) & (cells["status"] == "ok") & cells["asr"].notna()
    sound = cells[cells["status"] != Status.NOT_APPLICABLE].merge(
        cells[is_sound][victim], on=victim
    )
    return sound.assign(asr=sound["asr"].where(sound["status"] == "ok"))


def _invalid_rates(cells: pd.DataFrame) -> dict[str, list[float]]:
    """By attack, the rates of which every victim is invalid."""
    none = cells[(cells["defense"] == UNDEFENDED) & cells["rate"].notna()]
    are_invalid: dict[tuple[str, float], bool] = {}
    for attack, rate, status in zip(none["attack"], none["rate"], none["status"], strict=True):
        place = str(attack), float(rate)
        are_invalid[place] = are_invalid.get(place, True) and status == Status.INVALID_VICTIM
    found: dict[str, list[float]] = {}
    for (attack, rate), is_invalid in are_invalid.items():
        if is_invalid:
            found.setdefault(attack, []).append(rate)
    return found


def _over_seeds(cells: pd.DataFrame) -> pd.DataFrame:
    """One row per attack, rate and defense: the mean of what is ok, which may be a part of what was
    planned, else the worst status."""
    is_ok = cells["status"] == "ok"
    sound = {name: cells[name].where(is_ok).astype(float) for name in ("asr", "clean")}
    groups = cells.assign(**sound, is_ok=is_ok).groupby(["attack", "rate", "defense"], sort=False)
    found = groups.agg(
        asr=("asr", "mean"),
        clean=("clean", "mean"),
        status=("status", "first"),
        is_ok=("is_ok", "any"),
        has=("asr", "count"),
        planned=("asr", "size"),
    ).reset_index()
    status = found["status"].where(~found["is_ok"], "ok")
    found = found.assign(status=status, is_part=found["has"] < found["planned"])
    return found.drop(columns=["is_ok", "has", "planned"])


def _points(tiers: Standings) -> pd.DataFrame:
    """Accuracy and ASR of everything that is compared, with the front among them."""
    import pandas as pd

    rows: list[dict[str, Any]] = []
    for line in tiers.lines:
        if line.is_beside or line.is_partial:
            continue
        rows.append(
            {
                "defense": line.defense,
                "clean": line.clean.value,
                "clean_low": line.clean.low,
                "clean_high": line.clean.high,
                "asr": line.asr.value,
                "asr_low": line.asr.low,
                "asr_high": line.asr.high,
            }
        )
    for row in rows:
        row["on_front"] = not any(
            other["clean"] >= row["clean"]
            and other["asr"] <= row["asr"]
            and (other["clean"], other["asr"]) != (row["clean"], row["asr"])
            for other in rows
        )
    return pd.DataFrame(rows)


def _ranks(tiers: Standings) -> pd.DataFrame:
    import pandas as pd

    is_worst = tiers.score == BY_WORST

    def score(line: Standing) -> float:
        if line.is_partial:
            return math.nan  # of what did not fail alone it would be too good
        return line.worst.value if is_worst and line.worst else line.asr.value

    return pd.DataFrame(
        {
            "defense": line.defense,
            "score": score(line),
            "rank_low": line.rank[0] if line.rank else math.nan,
            "rank_high": line.rank[1] if line.rank else math.nan,
            "letters": line.letters,
            "needs": needs_words(line) if tiers.groups != [()] else "",
            "partial": line.is_partial,
        }
        for line in tiers.lines
        if not line.is_beside
    )


def _costs(tables: Tables, asked: Asked) -> pd.DataFrame:
    """What each defense costs, and the share of the attacks' lift that it removes; where its method
    failed it removes none."""
    import numpy as np
    import pandas as pd

    matrix = load_matrix(tables, asked.eval_set)
    if matrix is None:
        return pd.DataFrame(columns=["defense", "relative_cost", "lift_removed"])
    none = matrix.defenses.index(UNDEFENDED)
    has_failed = matrix.has_failed_DSR()
    lift = np.where(has_failed, matrix.asr_DSR[none], matrix.asr_DSR) - matrix.base_DSR[none]
    rows = []
    for d, name in enumerate(matrix.defenses):
        about = matrix.about[d]
        costs = matrix.cost_DSR[d][~np.isnan(matrix.cost_DSR[d])]
        there = ~np.isnan(lift[d]) & matrix.is_sound_SR
        if d == none or about.is_control or not len(costs) or not there.any():
            continue
        whole = lift[none][there].sum()
        if whole <= 0:
            continue  # the attacks lifted nothing that could be removed
        removed = 1 - lift[d][there].sum() / whole
        failed = int(has_failed[d].sum())
        name = f"{name}{ORACLE}" if about.is_oracle else name
        told = f"{name} ({failed} of {there.sum()} failed)" if failed else name
        rows.append(
            {"defense": told, "relative_cost": float(costs.mean()), "lift_removed": float(removed)}
        )
    return pd.DataFrame(rows, columns=["defense", "relative_cost", "lift_removed"])
