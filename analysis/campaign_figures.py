"""Figures of a campaign, for a paper's column: PNG and SVG, and one command draws them all.

An objective has one colour, marker and line everywhere, from a palette that colour-blind readers
can tell apart; settings that were chosen are large, the default is a black star.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from analysis.campaigns import CampaignBoard, SearchResult, Trial
from analysis.importance import Importance, importance
from analysis.theme import (
    COLUMN_INCHES,
    GREY,
    LETTER_INCHES,
    PAGE_INCHES,
    PNG_DPI,
    Drawn,
    Look,
    NothingToDraw,
    draw_all,
    house_style,
    legend,
    looks_of,
    new_figure,
    whole_ticks,
)

__all__ = [
    "COLUMN_INCHES",
    "FARTHEST_LOSS",
    "PNG_DPI",
    "Drawn",
    "NothingToDraw",
    "cloud_figure",
    "curves_figure",
    "draw_campaign",
    "house_style",
    "hypervolume_figure",
    "importance_figure",
]

TITLE_LETTERS = 46
FARTHEST_LOSS = 0.12
"""Figures show models that lose up to so much clean accuracy: broken ones would hide the rest."""
MOST_MARKS = 12
SCORE_WORDS = {"score": "score", "ca": "clean accuracy"}


def draw_campaign(board: CampaignBoard, folder: Path) -> Drawn:
    """Draw every figure of a campaign into a folder, each as PNG and SVG."""
    return draw_all(_figures(board), folder)


def _figures(board: CampaignBoard) -> Mapping[str, Callable[[], Any]]:
    """Every figure by its file's name."""
    found: dict[str, Callable[[], Any]] = {"hypervolume": partial(hypervolume_figure, board)}
    for defense in board.defenses:
        found |= {
            f"cloud-{defense}": partial(cloud_figure, board, defense),
            f"curves-{defense}": partial(curves_figure, board, defense),
            f"importance-{defense}": partial(importance_figure, board, defense),
        }
    return found


# --- accuracy against ASR


def cloud_figure(board: CampaignBoard, defense: str) -> Any:
    """Clean accuracy against worst ASR: epochs as dots, trials as marks, the front as a line.

    One panel for every kind of victims that searches were measured on.
    """
    scenes = {
        scene: [s for s in searches if s.defense == defense and s.front()]
        for scene, searches in board.scenes().items()
    }
    scenes = {scene: searches for scene, searches in scenes.items() if searches}
    if not scenes:
        raise NothingToDraw(f"no trial of {defense} has ended with CA and ASR")
    figure = new_figure(COLUMN_INCHES, 2.3 * len(scenes))
    axes = figure.subplots(len(scenes), 1, squeeze=False)[:, 0]
    looks = looks_of(board.objectives)
    for axis, searches in zip(axes, scenes.values(), strict=True):
        for search in searches:
            _cloud(axis, search, looks[search.objective])
        _landmarks(axis, searches)
        _cloud_frame(axis, searches, defense)
    axes[-1].set_xlabel("clean accuracy, %")
    legend(figure, axes)
    return figure


def _cloud(axis: Any, search: SearchResult, look: Look) -> None:
    """A search's epochs, trials, front and choice; the front ends each step where a trial lies."""
    epochs = [e for trial in search.trials for e in trial.epochs if e.worst_asr is not None]
    axis.scatter(
        [100 * e.ca for e in epochs],
        [100 * (e.worst_asr or 0.0) for e in epochs],
        s=4,
        color=look.color,
        alpha=0.4,
        linewidths=0,
        zorder=2,
        gid=f"epochs {search.objective}",
    )
    ended = [trial for trial in search.complete if trial.point is not None]
    _marks(axis, ended, look, s=14, zorder=4, gid=f"trials {search.objective}")
    front = search.front()[::-1]
    axis.plot(
        *_percents(front),
        look.dash,
        drawstyle="steps-pre",
        marker=look.marker,
        ms=3.5,
        color=look.color,
        zorder=3,
        label=f"{search.label}: front",
        gid=f"front {search.objective}",
    )
    if (chosen := search.chosen) is not None and chosen.point is not None:
        label = f"{search.label}: {_choice_word(search)}"
        _marks(axis, [chosen], look, s=42, zorder=6, edgecolors="black", label=label)


def _choice_word(search: SearchResult) -> str:
    return "chosen" if search.is_final else "best so far"


def _percents(trials: Sequence[Trial]) -> tuple[list[float], list[float]]:
    """Clean accuracies and worst ASRs of complete trials."""
    points = [trial.point for trial in trials if trial.point is not None]
    return [100 * point.x for point in points], [100 * (1 - point.y) for point in points]


def _marks(axis: Any, trials: Sequence[Trial], look: Look, **more: Any) -> None:
    style = {"linewidths": 0.8, "edgecolors": "white", **more}
    axis.scatter(*_percents(trials), marker=look.marker, color=look.color, **style)


def _landmarks(axis: Any, searches: Sequence[SearchResult]) -> None:
    """The default, the undefended victim and the limits of clean accuracy."""
    axis.scatter([], [], s=6, color="0.5", linewidths=0, label="after an epoch")
    mark = {"ls": "", "mew": 0.5, "mec": "white", "zorder": 7, "color": "black"}
    default = next((s.default for s in searches if s.default and s.default.point), None)
    if default is not None:
        axis.plot(*_percents([default]), marker="*", ms=8, label="default settings", **mark)
    undefended = searches[0].undefended
    if undefended is None:
        return
    if undefended.worst_asr is not None:
        at = ([100 * undefended.ca], [100 * undefended.worst_asr])
        axis.plot(*at, marker="X", ms=6, label="undefended victim", **mark)
    for limit in sorted({s.ca_loss_limit for s in searches if s.ca_loss_limit is not None}):
        label = f"limit: {100 * limit:g} points lost"
        axis.axvline(100 * (undefended.ca - limit), color="0.3", ls=":", lw=0.9, label=label)


def _cloud_frame(axis: Any, searches: Sequence[SearchResult], defense: str) -> None:
    """Limits that leave out the far end of broken models, and say how many points are there."""
    xs = [100 * e.ca for s in searches for t in s.trials for e in t.epochs]
    xs += [100 * trial.ca for s in searches for trial in s.complete if trial.ca is not None]
    undefended = searches[0].undefended
    top = max([*xs, *([100 * undefended.ca] if undefended else [])])
    low = max(min(xs), top - 100 * FARTHEST_LOSS)
    room = 0.04 * max(top - low, 1.0)
    axis.set(xlim=(low - room, top + 2 * room), ylim=(-4, 104), ylabel="worst ASR, %")
    hidden = sum(x < low for x in xs)
    beyond = f"{hidden} points lie further left" if hidden else ""
    words = textwrap.wrap(f"{defense}: {searches[0].scene_words}", TITLE_LETTERS)
    axis.set_title("\n".join([*words, beyond] if beyond else words))


# --- hypervolume against trials


def hypervolume_figure(board: CampaignBoard) -> Any:
    """What the trials so far dominate, against their number: a panel per defense."""
    import math

    known = {
        defense: [s for s in searches if s.front() and s.hypervolumes()]
        for defense, searches in board.defenses.items()
    }
    known = {defense: searches for defense, searches in known.items() if searches}
    if not known:
        raise NothingToDraw("no trial of any search has ended with CA and ASR")
    columns = min(2, len(known))
    rows = math.ceil(len(known) / columns)
    figure = new_figure(COLUMN_INCHES, 0.55 + 1.2 * rows)
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    looks = looks_of(board.objectives)
    for axis, (defense, searches) in zip(axes.flat, known.items(), strict=False):
        for search in searches:
            _growth(axis, search, looks[search.objective])
        axis.set_title(defense)
        axis.set_ylim(-0.03, 1.03)
        whole_ticks(axis)
    for axis in axes.flat[len(known) :]:
        axis.set_visible(False)
    for axis in axes.flat[len(known) - columns : len(known)]:
        axis.tick_params(labelbottom=True)
        axis.set_xlabel("trials")
    for axis in axes[:, 0]:
        axis.set_ylabel("hypervolume")
    legend(figure, axes.flat[: len(known)])
    return figure


def _growth(axis: Any, search: SearchResult, look: Look) -> None:
    found = search.hypervolumes()
    axis.step(
        [place for place, _ in found],
        [share for _, share in found],
        look.dash,
        where="post",
        marker=look.marker,
        markevery=max(1, len(found) // MOST_MARKS),
        ms=3,
        color=look.color,
        label=search.label,
    )


# --- importance of settings


def importance_figure(board: CampaignBoard, defense: str) -> Any:
    """Bars per setting and objective: for the score, and for clean accuracy."""
    searches = board.defenses[defense]
    found = {t: [(s, importance(s, t)) for s in searches] for t in SCORE_WORDS}
    names = list(dict.fromkeys(bar.setting for t in found for _, i in found[t] for bar in i.bars))
    if not names:
        refused = dict.fromkeys(
            f"{s.objective}: {i.refusal}" for pairs in found.values() for s, i in pairs
        )
        raise NothingToDraw("; ".join(refused))
    figure = new_figure(COLUMN_INCHES, 0.95 + 0.12 * len(names) * (len(searches) + 1))
    axes = figure.subplots(1, len(found), sharey=True)
    looks = looks_of(board.objectives)
    for axis, (target, pairs) in zip(axes, found.items(), strict=True):
        for place, (search, result) in enumerate(pairs):
            _bars(axis, names, result, looks[search.objective], (place, len(pairs)))
        axis.set_title(SCORE_WORDS[target])
        axis.set_xlabel("fall of R²")
        axis.grid(axis="y", visible=False)
        axis.axvline(0, color="0.3", lw=0.8)
        axis.margins(x=0.08)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    for search in searches:
        words = _fit_words({t: dict(_by_objective(found[t]))[search.objective] for t in found})
        label = f"{search.label}: {words}"
        axes[0].barh(0, 0, height=0, color=looks[search.objective].color, label=label)
    figure.suptitle(f"{defense}: what settings matter", x=0.02, ha="left", fontsize=8)
    legend(figure, axes[:1], title="forest's out-of-bag R²; pale bars say little")
    return figure


def _by_objective(
    pairs: Sequence[tuple[SearchResult, Importance]],
) -> Iterator[tuple[str, Importance]]:
    return ((search.objective, result) for search, result in pairs)


def _fit_words(by_target: Mapping[str, Importance]) -> str:
    """How well the forests of a search fit, or why there are none."""
    refusals = {result.refusal for result in by_target.values()}
    if len(refusals) == 1 and None not in refusals:
        return str(refusals.pop())
    return ", ".join(f"{result.words} ({target})" for target, result in by_target.items())


def _bars(
    axis: Any,
    names: Sequence[str],
    result: Importance,
    look: Look,
    place: tuple[int, int],
) -> None:
    """One search's bars beside those of the others; pale where the forest says little."""
    height = 0.8 / place[1]
    offset = (place[0] - (place[1] - 1) / 2) * height
    axis.barh(
        [names.index(bar.setting) + offset for bar in result.bars],
        [bar.fall for bar in result.bars],
        height=0.9 * height,
        xerr=[bar.deviation for bar in result.bars],
        color=look.color,
        alpha=1.0 if result.is_telling else 0.35,
        error_kw={"lw": 0.8, "ecolor": "0.25"},
    )


# --- learning curves


def curves_figure(board: CampaignBoard, defense: str) -> Any:
    """Worst ASR and clean accuracy after every epoch, a line per trial, a column per objective.

    A stopped trial's line ends in a cross where it was stopped; it is a mean over the cells that
    it had begun. Lines of models that break leave the panel of clean accuracy below.
    """
    searches = [s for s in board.defenses[defense] if any(t.epochs for t in s.trials)]
    if not searches:
        raise NothingToDraw(
            f"no trial of {defense} recorded an epoch: write `curves: true` in the campaign's file"
        )
    width = COLUMN_INCHES if len(searches) <= 2 else PAGE_INCHES
    figure = new_figure(width, 3.1)
    axes = figure.subplots(2, len(searches), sharex=True, sharey="row", squeeze=False)
    looks = looks_of(board.objectives)
    for (above, below), search in zip(axes.T, searches, strict=True):
        for trial in sorted(search.trials, key=lambda t: _weight(search, t)):
            _curve(above, below, search, trial, looks[search.objective])
        letters = int(width / len(searches) / LETTER_INCHES) - 4
        above.set_title("\n".join(textwrap.wrap(search.label, letters)))
        below.set_xlabel("epoch")
        whole_ticks(below)
    axes[0][0].set_ylabel("worst ASR, %")
    axes[0][0].set_ylim(-4, 104)
    axes[1][0].set_ylabel("clean acc., %")
    low, high = axes[1][0].get_ylim()
    axes[1][0].set_ylim(max(low, high - 100 * FARTHEST_LOSS), high)
    figure.suptitle(defense, x=0.02, ha="left", fontsize=8)
    legend(figure, axes.flat)
    return figure


def _weight(search: SearchResult, trial: Trial) -> int:
    """What is drawn over what: the choice over the default over the rest."""
    chosen = search.chosen
    return 2 if chosen is not None and trial.key == chosen.key else 1 if trial.is_default else 0


def _curve(above: Any, below: Any, search: SearchResult, trial: Trial, look: Look) -> None:
    """One trial's two lines."""
    weight = _weight(search, trial)
    color = (GREY, "black", look.color)[weight]
    chosen = f"{search.label}: {_choice_word(search)}"
    word = ("other trials", "default settings", chosen)[weight]
    ends = {"stopped": "x", "failed": "+"}.get(trial.status)
    epochs = [e.epoch for e in trial.epochs]
    rows = (
        (above, [None if e.worst_asr is None else 100 * e.worst_asr for e in trial.epochs]),
        (below, [100 * e.ca for e in trial.epochs]),
    )
    for axis, values in rows:
        if not values or None in values:
            continue
        style = {"lw": (0.7, 1.4, 1.8)[weight], "zorder": 2 + weight}
        dash = ("-", "--", "-")[weight]
        (line,) = axis.plot(epochs, values, dash, color=color, label=word, **style)
        line.set_gid(f"trial {trial.number}")
        if ends is not None:
            shade = "0.25" if weight == 0 else color
            label = f"{trial.status}"
            axis.plot(epochs[-1], values[-1], ends, color=shade, ms=5, ls="", label=label)
