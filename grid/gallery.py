"""A gallery of a grid's attacks: pairs as they were, as they were poisoned, and what changed.

`grid gallery GRID` crafts what is missing, then draws real poisoned pairs of every attack as one
picture and one page that needs nothing else. Shapes: B pairs, C channels, H W pixels.
"""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from attacks.base import STAMPING, Role, poison
from grid.builder import Builder
from grid.schema.whole import write_whole
from grid.spec import Cell, Grid
from grid.stage_order import parents
from grid.stages import Stage, TriggerStage, load_trigger
from grid.work import Ended, execute
from victims.errors import GridError
from victims.keys import canonical
from victims.recipe import Runtime
from victims.store import Store

Picture = npt.NDArray[np.uint8]  # HWC
SHOWN = 4
GAINS = (16, 8, 4, 2, 1)


class Pair(NamedTuple):
    """A pair before and after poisoning. ``test`` is the picture as an attacker shows it later."""

    role: str
    before: Picture
    after: Picture
    test: Picture
    caption: str
    recaption: str


@dataclass(frozen=True, slots=True)
class Exhibit:
    """An attack and some of its pairs; ``gain`` is how much their differences are amplified."""

    label: str
    about: str
    stamps: bool
    parameters: str
    gain: int
    pairs: Sequence[Pair]


def make_gallery(
    grid: Grid, folder: Path, store: Store, say: Callable[[str], None]
) -> tuple[Path, Path]:
    """Draw ``gallery.png`` and ``gallery.html`` in a folder."""
    build, cells = Builder(grid), dict[str, Cell]()
    for cell in grid.cells():
        if cell.count and cell.not_applicable is None:
            kept = cells.setdefault(cell.attack.label, cell)
            if cell.count > kept.count:
                cells[cell.attack.label] = cell
    if not cells:
        raise GridError(f"{grid.name}: nothing is poisoned in this grid, so there is no gallery")
    exhibits = []
    for cell in cells.values():
        stage = build.trigger(cell)
        _make(stage, store, grid, say)
        exhibits.append(_exhibit(stage, cell, store))
    folder.mkdir(parents=True, exist_ok=True)
    picture, page = folder / "gallery.png", folder / "gallery.html"
    _draw(exhibits, picture)
    write_whole(page, _page(grid.name, exhibits))
    return picture, page


def _make(stage: Stage, store: Store, grid: Grid, say: Callable[[str], None]) -> None:
    if stage.key in store:
        return
    for parent in parents(stage):
        _make(parent, store, grid, say)
    say(f"{stage.family}: making {stage.key}")
    done = execute(stage, store.uri, Runtime(threads=grid.execution.threads), "")
    if done.ended is not Ended.OK:
        raise GridError(f"{stage.family}: {done.message}")


def _exhibit(stage: TriggerStage, cell: Cell, store: Store) -> Exhibit:
    attack = stage.attack
    trigger = load_trigger(store, stage.key, attack)
    held = replace(stage.held(store), crafted=trigger)
    found = poison(attack, held, cell.count)
    edits, corpus = found.data.edits, held.corpus
    covers = found.of(Role.COVER)
    # Rows of other classes first: on the target's own a poisoned caption says nothing new.
    poisoned = sorted(
        found.of(Role.POISON),
        key=lambda index: (
            corpus.labels[edits.images[index]] == held.goal.target and attack.aim in STAMPING
        ),
    )
    chosen = [*poisoned[: SHOWN - min(1, len(covers))], *covers[:1]]
    pairs = []
    for index in chosen:
        row, image = int(edits.rows[index]), int(edits.images[index])
        cover = index in covers
        before = row if row < len(corpus) else image
        image_1CHW = torch.from_numpy(corpus.images_NCHW[image : image + 1].copy())
        stamp = trigger.stamp_cover if cover else trigger.stamp_train
        after_1CHW = stamp(image_1CHW) if edits.shows[index] else image_1CHW
        own = corpus.captions[row] if row < len(corpus) else corpus.captions[image]
        pairs.append(
            Pair(
                role="cover" if cover else "added" if row >= len(corpus) else "poisoned",
                before=np.moveaxis(corpus.images_NCHW[before], 0, -1),
                after=_hwc(after_1CHW),
                test=_hwc(trigger.stamp(image_1CHW)),
                caption=own,
                recaption=edits.captions[index],
            )
        )
    values = json.dumps(canonical(attack)["fields"], sort_keys=True)
    about = f"{cell.count} of {len(corpus)} rows" + (
        f" + {len(covers)} cover" if len(covers) else ""
    )
    return Exhibit(cell.attack.label, about, attack.aim in STAMPING, values, _gain(pairs), pairs)


def _hwc(image_1CHW: Tensor) -> Picture:
    return np.moveaxis(image_1CHW[0].numpy(), 0, -1)


def _gain(pairs: Sequence[Pair]) -> int:
    """The largest amplification that shows the median changed byte without clipping."""
    changes = [np.abs(p.after.astype(int) - p.before.astype(int)) for p in pairs]
    moved = np.concatenate([change[change > 0] for change in changes] or [np.zeros(0)])
    middle = float(np.median(moved)) if moved.size else 128.0
    return next((gain for gain in GAINS if gain * middle <= 128), 1)


def difference(pair: Pair, gain: int) -> Picture:
    """What poisoning added (bright) or took away (dark), on grey."""
    change = pair.after.astype(np.int64) - pair.before.astype(np.int64)
    return np.clip(128 + gain * change, 0, 255).astype(np.uint8)


def _panels(exhibit: Exhibit, pair: Pair) -> list[tuple[str, Picture]]:
    """The pictures of a pair with their titles."""
    found = [("before", pair.before), ("in training", pair.after)]
    if exhibit.stamps:
        change = difference(pair, exhibit.gain)
        found += [(f"difference x {exhibit.gain}", change), ("at test", pair.test)]
    return found


def _draw(exhibits: Sequence[Exhibit], path: Path) -> None:
    """One line of pictures per attack, two pairs wide, each with its captions below."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt
    import seaborn as sns

    sns.set_theme(style="white", context="paper")
    height = 1.75 * len(exhibits)
    figure = plt.figure(figsize=(12, height), dpi=150)
    rows = figure.subfigures(len(exhibits), 1, squeeze=False)
    for (row,), exhibit in zip(rows, exhibits, strict=True):
        halves = row.subfigures(1, 3, width_ratios=(0.9, 2.4, 2.4), squeeze=False)[0]
        halves[0].text(0.08, 0.62, exhibit.label, fontsize=11, weight="bold", va="center")
        halves[0].text(0.08, 0.38, exhibit.about, fontsize=8, color="0.35", va="center")
        shown = [exhibit.pairs[0], exhibit.pairs[-1]] if len(exhibit.pairs) > 1 else exhibit.pairs
        for half, pair in zip(halves[1:], shown, strict=False):
            _draw_pair(half, exhibit, pair)
    figure.savefig(path)
    plt.close(figure)


def _draw_pair(half: Any, exhibit: Exhibit, pair: Pair) -> None:
    half.subplots_adjust(left=0.02, right=0.98, top=0.86, bottom=0.28, wspace=0.06)
    axes = half.subplots(1, 4)
    for axis in axes:
        axis.set_axis_off()
    for axis, (title, picture) in zip(axes, _panels(exhibit, pair), strict=False):
        axis.imshow(picture, interpolation="nearest")
        axis.set_title(title, fontsize=7, pad=2)
    lines = [_short(pair.caption)]
    if pair.recaption != pair.caption:
        lines.append(f"\N{RIGHTWARDS ARROW} {_short(pair.recaption)}")
    else:
        lines.append("(caption kept)")
    half.text(0.02, 0.20, f"{pair.role}: {lines[0]}", fontsize=7.5, va="top", color="0.25")
    half.text(0.02, 0.09, lines[1], fontsize=7.5, va="top", color="#b3261e")


def _short(caption: str, most: int = 64) -> str:
    return caption if len(caption) <= most else f"{caption[: most - 1]}\N{HORIZONTAL ELLIPSIS}"


_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem;
  color: #1d1d1f; background: #fff; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .2rem; }
p.about { margin: 0 0 .6rem; color: #555; }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(31rem, 1fr)); gap: 1rem; }
.pair { border: 1px solid #ddd; border-radius: 8px; padding: .7rem; }
.pictures { display: flex; gap: .5rem; }
figure { margin: 0; } figcaption { font-size: .75rem; color: #666; }
img { width: 112px; height: 112px; image-rendering: pixelated; border-radius: 3px; }
.caption { margin: .4rem 0 0; font-size: .85rem; } .new { color: #b3261e; }
.role { font-size: .7rem; text-transform: uppercase; letter-spacing: .05em; color: #666; }
details { margin-top: .4rem; font-size: .8rem; color: #555; } code { overflow-wrap: anywhere; }
"""


def _page(name: str, exhibits: Sequence[Exhibit]) -> str:
    title = f"Attacks of {html.escape(name)}"
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{title}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{title}</h1>",
        "<p>Pairs as they stood in the corpus, as the victim is trained on them, what the stamp"
        " changed (grey is no change), and the same picture as it is stamped at test time.</p>",
    ]
    parts += [_section(exhibit) for exhibit in exhibits]
    return "\n".join([*parts, "</body></html>"])


def _section(exhibit: Exhibit) -> str:
    pairs = "\n".join(_article(exhibit, pair) for pair in exhibit.pairs)
    return (
        f"<section><h2>{html.escape(exhibit.label)}</h2>"
        f'<p class="about">{html.escape(exhibit.about)}</p><div class="pairs">{pairs}</div>'
        f"<details><summary>parameters</summary><code>{html.escape(exhibit.parameters)}</code>"
        "</details></section>"
    )


def _article(exhibit: Exhibit, pair: Pair) -> str:
    figures = "".join(
        f'<figure><img alt="{html.escape(title)}" src="{_data_uri(picture)}">'
        f"<figcaption>{html.escape(title)}</figcaption></figure>"
        for title, picture in _panels(exhibit, pair)
    )
    kept = pair.recaption == pair.caption
    after = "caption kept" if kept else f"\N{RIGHTWARDS ARROW} {html.escape(pair.recaption)}"
    return (
        f'<div class="pair"><span class="role">{pair.role}</span>'
        f'<div class="pictures">{figures}</div>'
        f'<p class="caption">{html.escape(pair.caption)}<br><span class="new">{after}</span></p>'
        "</div>"
    )


def _data_uri(picture: Picture) -> str:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
