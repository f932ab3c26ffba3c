"""Pictures of how defenses judged the rows of their data: every row by two scores, and its role.

`grid scores GRID` draws, from what finished cells left in the store, one panel per cell whose
defense scored the rows twice (a judge's rank beside another model's, for instance). The truth
colours the rows: it is read here, where a person looks, and by no defense.
Shapes: N rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from attacks.base import ROLES, Role
from grid.filters import CellFilter
from grid.plan import CellPlan, Plan
from grid.stages import DefendStage, roles_of
from victims.errors import GridError
from victims.store import Store

Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]
SCORE = "suspicion-"
MOST_PANELS = 48
MOST_DOTS = 4000  # rows of a role that are drawn, of a panel


@dataclass(frozen=True, slots=True)
class ScoreMap:
    """What one cell's defense made of its rows. ``kept`` are those outside the largest of its sets,
    ``flagged`` those that it held to be poisoned."""

    attack: str
    defense: str
    seeds: str
    names: tuple[str, str]
    x_N: Floats
    y_N: Floats
    roles_N: npt.NDArray[np.int8]
    kept_N: Bools | None
    flagged_N: Bools | None


def score_maps(
    plan: Plan, store: Store, only: CellFilter | None, say: Callable[[str], None] = print
) -> list[ScoreMap]:
    """One per finished cell with two scores, of the first seed unless ``only`` names others."""
    seeds = plan.grid.seeds[:1]
    chosen = [
        planned
        for planned in plan.cells
        if (only.matches(planned.cell) if only else planned.cell.seed in seeds)
    ]
    found = [made for planned in chosen if (made := _map(planned, store)) is not None]
    if not found:
        raise GridError(f"{plan.grid.name}: {_nothing_to_draw(chosen, store)}")
    if len(found) > MOST_PANELS:
        say(f"{MOST_PANELS} of {len(found)} cells are drawn; choose others with --only")
    return found[:MOST_PANELS]


def _nothing_to_draw(chosen: Sequence[CellPlan], store: Store) -> str:
    """Why no cell gives a picture: it is not finished, or its defense does not score rows twice."""
    numbers: dict[str, int] = {}
    finished = [planned for planned in chosen if planned.measure.defended.key in store]
    for planned in finished:
        files = store.need(planned.measure.defended.key).files
        scores = sum(file.startswith("suspicion") for file in files)
        label = planned.cell.defense.label
        numbers[label] = max(numbers.get(label, 0), scores)
    if not finished:
        return f"none of {len(chosen)} cells is finished. Run the grid first."
    told = ", ".join(f"{label} {number or 'no'}" for label, number in numbers.items())
    return (
        "a picture sets two scores of every row against each other, which a defense must give"
        f" beside its suspicion. {len(finished)} of {len(chosen)} cells are finished, and their"
        f" defenses give rows so many scores: {told}. The README's table of commands names defenses"
        " that give enough; choose other cells with --only if the grid has one."
    )


def _map(planned: CellPlan, store: Store) -> ScoreMap | None:
    stage = planned.measure.defended
    if stage.key not in store:
        return None
    artefact = store.need(stage.key)
    names = sorted(file for file in artefact.files if file.startswith(SCORE))
    if len(names) < 2:
        return None

    def read(file: str) -> Any:
        return np.load(artefact.path(file), allow_pickle=False) if file in artefact.files else None

    sets = [read(file) for file in artefact.files if file.startswith("flagged-")]
    rejected = max(sets, key=np.count_nonzero, default=None)
    first, second = names[:2]
    return ScoreMap(
        attack=f"{planned.cell.attack.label} {planned.cell.rate}",
        seeds=planned.cell.label.split("/", 3)[3],
        defense=planned.cell.defense.label,
        names=(_title(first), _title(second)),
        x_N=read(first),
        y_N=read(second),
        roles_N=_roles(stage, store),
        kept_N=None if rejected is None else ~rejected,
        flagged_N=read("flagged.npy"),
    )


def _title(file: str) -> str:
    return file.removeprefix(SCORE).removesuffix(".npy")


def _roles(stage: DefendStage, store: Store) -> npt.NDArray[np.int8]:
    if stage.poisoned is None:
        return np.full(stage.victim.num_rows, ROLES.index(Role.CLEAN), dtype=np.int8)
    return roles_of(store, stage.poisoned)


def box_of(found: ScoreMap, chosen_N: Bools | None) -> tuple[float, float, float, float] | None:
    """The smallest rectangle around the chosen rows, where it holds them and no others."""
    if chosen_N is None or not chosen_N.any():
        return None
    x_N, y_N = found.x_N[chosen_N], found.y_N[chosen_N]
    low_x, high_x, low_y, high_y = x_N.min(), x_N.max(), y_N.min(), y_N.max()
    inside_N = (found.x_N >= low_x) & (found.x_N <= high_x)
    inside_N &= (found.y_N >= low_y) & (found.y_N <= high_y)
    exact = bool((inside_N == chosen_N).all())
    return (float(low_x), float(high_x), float(low_y), float(high_y)) if exact else None


def draw(maps: Sequence[ScoreMap], path: Path) -> None:
    """Attacks down, defenses across. Suspicious rows lie to the right and at the top."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt
    import seaborn as sns

    sns.set_theme(style="white", context="paper")
    attacks = list(dict.fromkeys((found.attack, found.seeds) for found in maps))
    defenses = list(dict.fromkeys(found.defense for found in maps))
    figure, axes = plt.subplots(
        len(attacks),
        len(defenses),
        figsize=(2.5 * len(defenses) + 0.6, 2.5 * len(attacks) + 0.7),
        dpi=150,
        squeeze=False,
        sharex=True,
        sharey=True,
        layout="constrained",
    )
    for axis in axes.flat:
        axis.set_axis_off()
    for found in maps:
        axis = axes[attacks.index((found.attack, found.seeds))][defenses.index(found.defense)]
        axis.set_axis_on()
        _panel(axis, found, sns.color_palette("colorblind"))
    handles, labels = axes.flat[0].get_legend_handles_labels()
    for axis in axes.flat:
        more = axis.get_legend_handles_labels()
        for handle, label in zip(*more, strict=True):
            if label not in labels:
                handles.append(handle)
                labels.append(label)
    columns = len(labels) if len(defenses) > 1 else 2
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


def _panel(axis: Any, found: ScoreMap, colors: Any) -> None:
    looks = {
        Role.CLEAN: ("0.72", 2, "clean rows"),
        Role.COVER: (colors[0], 5, "cover rows"),
        Role.POISON: (colors[3], 5, "poisoned rows"),
    }
    for role, (color, size, name) in looks.items():
        rows = np.flatnonzero(found.roles_N == ROLES.index(role))
        if not len(rows):
            continue
        shown = rows[:: -(-len(rows) // MOST_DOTS)]
        axis.scatter(
            found.x_N[shown], found.y_N[shown], s=size, color=color, linewidths=0, label=name
        )
    boxes = [
        (found.kept_N, "-", "kept as clean"),
        (None if found.flagged_N is None else ~found.flagged_N, "--", "not flagged"),
    ]
    for chosen_N, style, name in boxes:
        box = box_of(found, chosen_N)
        if box is not None:
            x = [box[0], box[1], box[1], box[0], box[0]]
            y = [box[2], box[2], box[3], box[3], box[2]]
            axis.plot(x, y, style, color="0.15", linewidth=0.9, label=name)
    axis.set_title(f"{found.attack}, {found.defense}, {found.seeds}", fontsize=8)
    axis.set_xlabel(f"suspicion: {found.names[0]}", fontsize=8)
    axis.set_ylabel(f"suspicion: {found.names[1]}", fontsize=8)
    axis.tick_params(labelsize=7)
    axis.set_box_aspect(1)
