"""The pictures of the documents: the demo's triggers and board, and the papers' board.

``make docs`` draws ``docs/NAME.png`` from ``docs/NAME-board.json`` where the board or this file has
changed; a picture keeps the digest of what it was drawn from.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch

from analysis.published import published
from attacks.base import Goal, Knowledge
from docs.tables import (
    BOARD,
    PAPERS,
    PAPERS_PICTURE,
    PICTURE,
    given_words,
    picture_inputs,
    read_board,
)
from grid.gridfile import load_grid
from grid.spec import Grid
from victims.corpora import Reader, build_corpus, open_corpus
from victims.lab import Lab
from victims.recipe import Runtime
from victims.store import Store

SHOWN = ("none", "finetune", "cleanclip", "roclip", "augment_only", "oracle_filter")
ROW = 5


def pairs(grid: Grid) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Per attack: its name, a clean picture and the same picture triggered."""
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder))
        key = build_corpus(store, grid.data.corpus("clean")).key
        corpus = open_corpus(store, key, Reader.TRAINING)
        goal = Goal(grid.targets[0], corpus.classes[grid.targets[0]], tuple(corpus.templates))
        held = Knowledge(corpus=corpus, goal=goal, seed=grid.seeds[0])
        lab = Lab(store, grid.model, Runtime())
        rows = [row for row in range(60) if corpus.labels[row] != goal.target]
        found = []
        for entry, row in zip(grid.attacks, rows[ROW:], strict=False):
            image_BCHW = torch.from_numpy(corpus.images_NCHW[row : row + 1].copy())
            stamped = entry.method.craft(lab, held, corpus.size).stamp(image_BCHW)
            as_picture = [t[0].permute(1, 2, 0).numpy() for t in (image_BCHW, stamped)]
            found.append((entry.label, as_picture[0], as_picture[1]))
        return found


def draw(path: Path) -> None:
    mpl.use("Agg")
    import matplotlib.pyplot as plt
    import seaborn as sns

    sns.set_theme(style="whitegrid", context="notebook", font_scale=0.95)
    grid = load_grid("demo")
    board = read_board(BOARD)["rows"]
    poisoned = [row for row in board if row["rate"] and row["asr_top1"] is not None]
    shown = pairs(grid)
    figure = plt.figure(figsize=(11, 4.6), layout="constrained")
    panels = figure.subfigures(1, 2, width_ratios=(0.72, 2), squeeze=False)
    left, right = panels[0]
    axes = left.subplots(len(shown), 2)
    for (name, clean, triggered), (first, second) in zip(shown, axes, strict=True):
        for axis, picture in ((first, clean), (second, triggered)):
            axis.imshow(picture, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        first.set_ylabel(name)
    axes[0][0].set_title("clean")
    axes[0][1].set_title("triggered")
    _dots(
        right.subplots(), poisoned, [name for name, _, _ in shown], sns.color_palette("colorblind")
    )
    figure.savefig(path, dpi=150, metadata={"Inputs": picture_inputs(path)})
    plt.close(figure)


def _dots(axis: Any, rows: list[dict[str, Any]], attacks: list[str], palette: Any) -> None:
    """ASR with its interval, one line per defense, one colour and marker per attack."""
    for place, defense in enumerate(SHOWN):
        for offset, attack in enumerate(attacks):
            found = [r for r in rows if (r["defense"], r["attack"]) == (defense, attack)]
            if not found:
                continue
            value = 100 * found[0]["asr_top1"]
            low, high = 100 * found[0]["asr_top1_low"], 100 * found[0]["asr_top1_high"]
            axis.errorbar(
                value,
                place + 0.2 * (offset - 1),
                xerr=[[max(0.0, value - low)], [max(0.0, high - value)]],
                fmt="os^Dv"[offset % 5],
                color=palette[offset],
                capsize=3,
                label=attack if place == 0 else None,
            )
    axis.set_yticks(range(len(SHOWN)), SHOWN)
    axis.invert_yaxis()
    axis.set_xlim(-3, 103)
    axis.set_xlabel("attack success on pictures of other classes, % (95 % within-cell interval)")
    axis.set_title("1 % poison, embedded world, one seed", loc="left")
    axis.legend(title="attack", loc="lower right")


def draw_papers(path: Path) -> None:
    """One panel per attack, one line per defense under what it is given; published in grey."""
    mpl.use("Agg")
    import matplotlib.pyplot as plt
    import seaborn as sns

    sns.set_theme(style="whitegrid", context="notebook", font_scale=0.9)
    rows = [
        row for row in read_board(PAPERS)["rows"] if row["rate"] and row["asr_top1"] is not None
    ]
    attacks = list(dict.fromkeys(row["attack"] for row in rows))
    places, headings = _places(rows)
    printed = [f for f in published() if f.metric == "asr_top1" and not f.setting]
    figure, axes = plt.subplots(
        1, len(attacks), figsize=(13, 0.27 * (max(places.values()) + 3)), sharey=True
    )
    color = sns.color_palette("colorblind")
    for axis, attack in zip(axes, attacks, strict=True):
        for row in rows:
            if row["attack"] == attack:
                value, place = 100 * row["asr_top1"], places[row["defense"]]
                low, high = 100 * row["asr_top1_low"], 100 * row["asr_top1_high"]
                error = [[max(0.0, value - low)], [max(0.0, high - value)]]
                shade = color[7] if row["is_control"] else color[0]
                axis.errorbar(value, place, xerr=error, fmt="o", color=shade, capsize=3, ms=5)
        for figure_ in printed:
            if figure_.attack == attack and figure_.defense in places:
                below = places[figure_.defense] + 0.3
                axis.plot(100 * figure_.value, below, "D", color="0.6", ms=5, mfc="none")
        axis.set(xlim=(-4, 104), xlabel="ASR %", title=attack)
        for heading, place in headings.items():
            axis.axhline(place, color="0.85", linewidth=8, zorder=0)
            if axis is axes[0]:
                axis.text(0, place, f"given {heading}", fontsize=8, va="center", color="0.25")
    axes[0].set_yticks(list(places.values()), list(places))
    axes[0].set_ylim(max(places.values()) + 1, -1)
    marks = {
        "defense": ("o", color[0], color[0]),
        "control": ("o", color[7], color[7]),
        "published: another model, other data": ("D", "0.6", "none"),
    }
    for label, (marker, edge, face) in marks.items():
        axes[0].plot([], [], marker, color=edge, mfc=face, label=label)
    figure.legend(loc="lower center", ncols=3, frameon=False)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(path, dpi=130, metadata={"Inputs": picture_inputs(path)})
    plt.close(figure)


def _places(rows: list[dict[str, Any]]) -> tuple[dict[str, int], dict[str, int]]:
    """A line for every defense, controls last, and for every heading of what some are given."""
    places: dict[str, int] = {}
    headings: dict[str, int] = {}
    place = 0
    for is_control in (False, True):
        last = ""
        for row in rows:
            if row["is_control"] != is_control or row["defense"] in places:
                continue
            given = given_words(row) + (" (control)" if is_control else "")
            if given != last:
                headings[given], last = place, given
                place += 1
            places[row["defense"]] = place
            place += 1
    return places, headings


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for target, drawn in ((PICTURE, draw), (PAPERS_PICTURE, draw_papers)):
        drawn(target)
        print(f"{target} written")
