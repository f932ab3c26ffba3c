"""The picture of the README: three triggers, and what the demo's defenses leave of them.

``make docs`` draws ``docs/demo.png`` from ``docs/demo-board.json`` and its attacks where one of
these has changed; the picture keeps the digest of what it was drawn from.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch

from attacks.base import Goal, Knowledge
from docs.tables import BOARD, PICTURE, picture_inputs, read_board
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
    figure.savefig(path, dpi=150, metadata={"Inputs": picture_inputs()})
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


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    draw(PICTURE)
    print(f"{PICTURE} written")
