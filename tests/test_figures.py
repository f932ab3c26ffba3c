"""Figures of results: what is drawn is what the frame says, and no word hides another."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from PIL import Image

from analysis import figures
from analysis.figures import NothingToDraw, Stamped, draw_all
from analysis.figures.heat import readable_on
from analysis.theme import COLUMN_INCHES, MARKERS, PAGE_INCHES, PNG_DPI, house_style, wrapped

LONG = "a-repair@lr=1e-05,epochs=10,augment=strong,unimodal=on"
DEFENSES = ("none", "finetune", LONG, *(f"defense_number_{n}" for n in range(3, 25)))
ATTACKS = ("badnet", "an_attack_with_a_very_long_name", *(f"attack_{n}" for n in range(2, 15)))
RATES = (0.0, 0.0005, 0.003)
STATUSES = ("ok", "ok", "ok", "failed_method", "skipped", "missing", "not_applicable")


@pytest.fixture(autouse=True)
def style() -> Iterator[None]:
    with house_style():
        yield


def cells(num_defenses: int, num_attacks: int, num_rates: int, num_seeds: int) -> pd.DataFrame:
    """One row per attack, rate, defense and seed."""
    rng = np.random.default_rng(0)
    names = ("attack", "rate", "defense", "seed")
    kinds = (ATTACKS[:num_attacks], RATES[-num_rates:], DEFENSES[:num_defenses], range(num_seeds))
    frame = pd.DataFrame(list(product(*kinds)), columns=list(names))
    frame["asr"] = rng.uniform(0, 1, len(frame)) * (frame["rate"] > 0)
    frame["clean"] = rng.uniform(0.5, 0.6, len(frame))
    return frame


def by_cell(num_defenses: int, num_attacks: int, num_rates: int) -> pd.DataFrame:
    """One row per attack, rate and defense, some of them without a number."""
    frame = cells(num_defenses, num_attacks, num_rates, 1)
    frame["status"] = [STATUSES[i % len(STATUSES)] for i in range(len(frame))]
    frame.loc[frame["status"] != "ok", "asr"] = math.nan
    return frame


def summary(num: int) -> pd.DataFrame:
    """One row per defense, with the columns of all figures that are about defenses."""
    rng = np.random.default_rng(1)
    frame = pd.DataFrame({"defense": DEFENSES[:num]})
    frame["clean"], frame["asr"] = rng.uniform(0.5, 0.6, num), rng.beta(1, 2, num)
    frame["clean_low"], frame["clean_high"] = frame["clean"] - 0.01, frame["clean"] + 0.01
    frame["asr_low"], frame["asr_high"] = frame["asr"] - 0.05, frame["asr"] + 0.05
    frame["on_front"] = [
        not ((frame["clean"] > clean) & (frame["asr"] < asr)).any()
        for clean, asr in zip(frame["clean"], frame["asr"], strict=True)
    ]
    frame["score"] = frame["asr"]
    rank = frame["asr"].rank()
    frame["rank_low"], frame["rank_high"] = np.maximum(1, rank - 2), np.minimum(num, rank + 1)
    frame["letters"] = [("a", "ab", "bcd")[i % 3] for i in range(num)]
    frame["needs"] = [(("victim", "clean_data"), ("suspect_data",))[i % 2] for i in range(num)]
    frame["partial"] = [i % 6 == 5 for i in range(num)]
    frame["relative_cost"] = [0.0 if i % 5 == 0 else 10.0 ** (i % 4 - 2) for i in range(num)]
    frame["lift_removed"] = 1 - frame["asr"] / frame["asr"].max()
    return frame


PUBLISHED = pd.DataFrame(
    {"label": ["CleanCLIP (paper)", "RoCLIP (paper)"], "clean": [0.55, 0.56], "asr": [0.1, 0.3]}
)


def roc(num_defenses: int, num_attacks: int) -> pd.DataFrame:
    places = np.linspace(0, 1, 6)
    rows = [
        (defense, attack, x, x ** (0.1 + 0.03 * d), 1 / (1.1 + 0.03 * d))
        for (d, defense), attack in product(
            enumerate(DEFENSES[:num_defenses]), ATTACKS[:num_attacks]
        )
        for x in places
    ]
    columns = ["defense", "attack", "false_positive", "true_positive", "auroc"]
    return pd.DataFrame(rows, columns=columns)


def epochs(num_stages: int, num_names: int) -> pd.DataFrame:
    rows = [
        (f"victim of attack number {stage}", epoch, f"number_{name}", name + stage / epoch)
        for stage, name, epoch in product(range(num_stages), range(num_names), range(1, 6))
    ]
    return pd.DataFrame(rows, columns=["stage", "epoch", "name", "value"])


def pictures(num: int) -> list[Stamped]:
    rng = np.random.default_rng(2)
    found = []
    for attack in ATTACKS[:num]:
        clean = rng.integers(0, 200, (12, 12, 3)).astype(np.uint8)
        triggered = clean.copy()
        triggered[-3:, -3:] += 20
        found.append(Stamped(attack, clean, triggered))
    return found


def features(num_models: int) -> pd.DataFrame:
    rng = np.random.default_rng(3)
    models = [*DEFENSES[1:num_models], "victim"]
    frame = pd.DataFrame(
        list(product(models, ("clean", "triggered", "target"), range(8))),
        columns=["model", "kind", "number"],
    )
    return frame.assign(x=rng.normal(size=len(frame)), y=rng.normal(size=len(frame)))


def every(num_defenses: int, num_attacks: int, num_rates: int, num_seeds: int) -> dict[str, Any]:
    """All figures of a grid of that size."""
    return {
        "heat_map": partial(figures.heat_map, by_cell(num_defenses, num_attacks, num_rates)),
        "rate_curves": partial(
            figures.rate_curves, cells(num_defenses, num_attacks, num_rates, num_seeds)
        ),
        "trade_off": partial(figures.trade_off, summary(num_defenses), PUBLISHED),
        "profile": partial(figures.profile, by_cell(num_defenses, num_attacks, num_rates)),
        "rank_plot": partial(figures.rank_plot, summary(num_defenses)),
        "cost": partial(figures.cost, summary(num_defenses)),
        "detection": partial(figures.detection, roc(num_defenses, num_attacks)),
        "training": partial(figures.training, epochs(num_defenses, min(6, num_attacks))),
        "gallery": partial(figures.gallery, pictures(num_attacks)),
        "feature_map": partial(figures.feature_map, features(min(8, num_defenses))),
    }


# --- what is looked at


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(name): value for name, value in row.items()} for row in frame.to_dict("records")]


def named(figure: Any, gid: str) -> Any:
    """The one thing in a figure that is called so."""
    found = [a for axis in figure.axes for a in axis.get_children() if a.get_gid() == gid]
    assert len(found) == 1, gid
    return found[0]


def numbers_of(axis: Any) -> dict[tuple[int, int], str]:
    """What is written in a heat map's cells, by row and column."""
    return {
        (int(text.get_position()[1]), int(text.get_position()[0])): text.get_text()
        for text in axis.texts
        if text.get_text() and not isinstance(text, mpl.text.Annotation)
    }


def hatched(figure: Any) -> dict[str, int]:
    kinds = [p.get_gid() for axis in figure.axes for p in axis.patches if p.get_hatch()]
    return {kind: kinds.count(kind) for kind in kinds}


def legend_words(figure: Any) -> list[str]:
    return [
        text.get_text().replace("\N{NO-BREAK SPACE}", " ").replace("\n", "")
        for legend in figure.legends
        for text in legend.get_texts()
    ]


def shown_texts(figure: Any) -> list[Any]:
    """Every text that is drawn: no label of a tick beyond the limits of its axis."""
    hidden: set[int] = set()
    for axis in figure.axes:
        if not axis.get_visible():
            hidden.update(map(id, axis.findobj(Text)))
        for side in (axis.xaxis, axis.yaxis):
            low, high = sorted(side.get_view_interval())
            room = 1e-9 * (high - low)
            for tick in side.get_major_ticks():
                if not low - room <= tick.get_loc() <= high + room:
                    hidden.update((id(tick.label1), id(tick.label2)))
    return [
        text
        for text in figure.findobj(Text)
        if text.get_visible() and text.get_text().strip() and id(text) not in hidden
    ]


def check_tidy(figure: Any) -> None:
    """Every word lies inside the picture and on no other word, and is large enough to read."""
    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    texts = shown_texts(figure)
    boxes = np.array([Text.get_window_extent(text, canvas.get_renderer()).extents
                      for text in texts])  # fmt: skip
    x0, y0, x1, y1 = boxes.T
    width, height = figure.bbox.size
    for text, is_out in zip(
        texts, (x0 < -1) | (y0 < -1) | (x1 > width + 1) | (y1 > height + 1), strict=True
    ):
        assert not is_out, f"{text.get_text()!r} is cut off"
    shared_x = np.minimum.outer(x1, x1) - np.maximum.outer(x0, x0) > 2
    shared_y = np.minimum.outer(y1, y1) - np.maximum.outer(y0, y0) > 2
    clashes = np.argwhere(np.triu(shared_x & shared_y, 1))
    assert [(texts[a].get_text(), texts[b].get_text()) for a, b in clashes] == []
    assert min(text.get_fontsize() for text in texts) >= 7
    assert figure.get_size_inches()[0] in (COLUMN_INCHES, PAGE_INCHES)


def _shape(size: tuple[int, ...]) -> str:
    return "x".join(map(str, size))


SIZES = (
    (1, 1, 1, 1),
    pytest.param((2, 1, 1, 1), marks=pytest.mark.exhaustive, id="2x1x1x1"),
    pytest.param((3, 3, 2, 2), marks=pytest.mark.exhaustive, id="3x3x2x2"),
    (8, 4, 3, 2),
    (12, 6, 3, 3),
    (5, 15, 1, 1),
    pytest.param((25, 15, 3, 2), marks=pytest.mark.exhaustive, id="25x15x3x2"),
)


@pytest.mark.parametrize("size", SIZES, ids=_shape)
@pytest.mark.parametrize("name", every(1, 1, 1, 1))
def test_no_word_hides_another(name: str, size: tuple[int, int, int, int]) -> None:
    check_tidy(every(*size)[name]())


def test_the_check_of_tidiness_can_fail() -> None:
    figure = figures.profile(by_cell(2, 1, 1))
    figure.text(0.5, 0.5, "one word")
    figure.text(0.5, 0.5, "another")
    with pytest.raises(AssertionError, match="another"):
        check_tidy(figure)
    figure = figures.profile(by_cell(2, 1, 1))
    figure.text(0.98, 0.5, "a word that ends outside")
    with pytest.raises(AssertionError, match="is cut off"):
        check_tidy(figure)


# --- the heat map


def test_the_heat_map_has_the_numbers_of_the_frame_and_hatches_the_rest() -> None:
    frame = by_cell(12, 4, 3)
    figure = figures.heat_map(frame)
    (axis,) = figure.axes
    shown = numbers_of(axis)
    columns = list(product(ATTACKS[:4], RATES))
    is_ok = frame["status"] == "ok"
    assert len(shown) == is_ok.sum()
    for row in records(frame[is_ok]):
        place = DEFENSES.index(row["defense"]), columns.index((row["attack"], row["rate"]))
        assert shown[place] == f"{100 * row['asr']:.1f}"
    counts = frame["status"].value_counts()
    assert hatched(figure) == {
        "failed": counts["failed_method"],
        "invalid": counts["skipped"],
        "missing": counts["missing"],
        "inapplicable": counts["not_applicable"],
    }
    assert len({p.get_hatch() for p in axis.patches}) == 4
    colours = axis.collections[0].get_array()
    assert np.ma.getmaskarray(colours).sum() == (~is_ok).sum()
    assert set(legend_words(figure)) == {
        *("failed", "invalid or skipped victim", "missing", "not applicable")
    }
    assert [t.get_text() for t in axis.get_xticklabels()] == ["0", "0.05", "0.3"] * 4


def test_a_cell_without_a_row_or_a_number_is_missing() -> None:
    frame = by_cell(2, 2, 2).assign(status="ok", asr=0.25)
    frame.loc[0, "asr"] = None
    figure = figures.heat_map(frame.drop(index=[7]))
    assert hatched(figure) == {"missing": 2}
    assert list(numbers_of(figure.axes[0]).values()) == ["25.0"] * 6
    words = ["ok", "ok", "invalid_victim", "inert", "cancelled", *["failed"] * 3]
    failed = figures.heat_map(frame.assign(status=words))
    assert hatched(failed) == {"missing": 2, "invalid": 2, "failed": 3}
    with pytest.raises(NothingToDraw, match="none of 8 cells is ok"):
        figures.heat_map(frame.assign(status="failed_infrastructure"))


def test_many_columns_are_broken_into_panels_that_lose_no_cell() -> None:
    frame = by_cell(25, 15, 3).assign(status="ok", asr=np.linspace(0, 1, 25 * 45))
    figure = figures.heat_map(frame)
    assert len(figure.axes) == 2
    assert figure.get_size_inches()[0] == PAGE_INCHES
    shown = [word for axis in figure.axes for word in numbers_of(axis).values()]
    assert sorted(shown) == sorted(f"{100 * asr:.0f}" for asr in frame["asr"])


def test_thousands_of_panels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("analysis.figures.heat.MOST_PANELS", 1)
    monkeypatch.setattr("analysis.figures.rates.MOST_ATTACKS", 3)
    with pytest.raises(NothingToDraw, match="30 attacks and rates are more than 24"):
        figures.heat_map(by_cell(2, 15, 2).assign(status="ok", asr=0.5))
    with pytest.raises(NothingToDraw, match="4 attacks are more than 3"):
        figures.rate_curves(cells(2, 4, 2, 1))


def test_a_mean_over_a_part_of_the_victims_is_marked() -> None:
    frame = by_cell(2, 2, 1).assign(status="ok", asr=[0.1, 0.9, 0.2, 0.3])
    assert not legend_words(figures.heat_map(frame.assign(is_part=False)))
    figure = figures.heat_map(frame.assign(is_part=[False, True, False, True]))
    check_tidy(figure)
    assert legend_words(figure) == ["of a part of the victims"]
    marks = [line for line in figure.axes[0].lines if str(line.get_gid()).startswith("part")]
    assert sorted(tuple(place) for mark in marks for place in mark.get_xydata()) == [
        (1, 1),
        (2, 1),
    ], "the corners of the second row"


def test_an_attack_stays_in_one_panel_if_it_fits() -> None:
    frames = [
        by_cell(2, 1, 1).assign(attack=attack, rate=rate / 1000, status="ok", asr=0.5)
        for attack, num_rates in (("few", 10), ("many", 16))
        for rate in range(num_rates)
    ]
    figure = figures.heat_map(pd.concat(frames))
    check_tidy(figure)
    assert [len(axis.get_xticks()) for axis in figure.axes] == [10, 16]


def test_targeted_poisoning_has_no_rate() -> None:
    frame = by_cell(2, 1, 2).assign(status="ok", asr=0.5, rate=[math.nan, math.nan, 0.01, 0.01])
    labels = figures.heat_map(frame).axes[0].get_xticklabels()
    assert [label.get_text() for label in labels] == ["1", "–"]


def test_seeds_must_be_averaged_before_they_are_a_heat_map() -> None:
    with pytest.raises(ValueError, match=r"badnet@0.003 x none has several rows"):
        figures.heat_map(cells(1, 1, 1, 2).assign(status="ok"))


# --- curves over rates


def test_bands_reach_from_the_least_to_the_largest_seed() -> None:
    frame = cells(3, 2, 3, 4)
    frame.loc[frame.index[5], "asr"] = math.nan
    figure = figures.rate_curves(frame)
    above = {axis.get_title(loc="left"): axis for axis in figure.axes if axis.get_title(loc="left")}
    assert [title.replace("\n", "") for title in above] == list(ATTACKS[:2])
    for attack, axis in zip(ATTACKS, above.values(), strict=False):
        for defense in DEFENSES[:3]:
            mine = frame[(frame["attack"] == attack) & (frame["defense"] == defense)]
            want: Any = 100 * mine.groupby("rate")["asr"].agg(["mean", "min", "max"])
            children = {child.get_gid(): child for child in axis.get_children()}
            line = children[f"mean {defense}"].get_xydata()
            np.testing.assert_allclose(line, np.column_stack([want.index, want["mean"]]))
            corners = children[f"band {defense}"].get_paths()[0].vertices
            for rate in RATES:
                at = corners[corners[:, 0] == rate][:, 1]
                assert min(at) == pytest.approx(want.loc[rate, "min"])
                assert max(at) == pytest.approx(want.loc[rate, "max"])


def test_the_axis_of_rates_is_logarithmic_and_has_a_zero() -> None:
    axis = figures.rate_curves(cells(2, 1, 3, 1)).axes[0]
    assert axis.get_xscale() == "symlog"
    assert axis.xaxis.get_transform().linthresh == 0.0005
    low, high = axis.get_xlim()
    assert low < 0 < 0.003 < high
    assert list(axis.get_xticks()) == list(RATES)
    assert figures.rate_curves(cells(2, 1, 2, 1)).axes[0].get_xscale() == "log"
    nought = cells(2, 1, 3, 1).query("rate == 0")
    assert list(figures.rate_curves(nought).axes[0].get_xticks()) == [0.0]


def test_close_rates_leave_out_labels_and_never_the_ends() -> None:
    rates = np.geomspace(0.001, 0.0016, 9)
    frame = pd.concat([cells(2, 1, 1, 1).assign(rate=rate) for rate in rates])
    figure = figures.rate_curves(frame)
    check_tidy(figure)
    ticks = figure.axes[0].get_xticks()
    assert (ticks[0], ticks[-1]) == (rates[0], rates[-1])
    assert len(ticks) < len(rates)


# --- points


def test_the_front_passes_its_points_and_no_other() -> None:
    frame = summary(6).assign(
        clean=[0.6, 0.5, 0.55, 0.54, 0.58, 0.52],
        asr=[0.9, 0.1, 0.3, 0.5, 0.6, 0.2],
        on_front=[True, True, True, False, True, True],
    )
    figure = figures.trade_off(frame)
    line = named(figure, "front")
    front = frame[frame["on_front"]].sort_values("clean")
    assert 1 < len(front) < 6
    np.testing.assert_allclose(line.get_xydata(), 100 * front[["clean", "asr"]])
    assert line.get_drawstyle() == "steps-pre"
    for row in records(frame):
        (point,) = named(figure, f"point {row['defense']}").get_xydata()
        np.testing.assert_allclose(point, [100 * row["clean"], 100 * row["asr"]])
        (axis,) = figure.axes
        name = [t for t in axis.texts if t.get_gid() == f"name {row['defense']}"]
        assert name[0].get_text().replace("\n", "") == row["defense"]
        assert name[0].xy == pytest.approx(tuple(point))


def test_error_bars_are_the_frames_and_infinite_ones_are_left_out() -> None:
    frame = summary(4)
    frame.loc[1, ["asr_low", "asr_high"]] = -math.inf, math.inf
    frame.loc[2, "asr_low"] = None
    frame.loc[3, "asr_low"] = -0.2
    figure = figures.trade_off(frame)
    bars = named(figure, "intervals asr").get_segments()
    drawn = {(round(a[1], 9), round(b[1], 9)) for a, b in bars}
    assert drawn == {
        (round(max(0.0, 100 * frame["asr_low"][i]), 9), round(100 * frame["asr_high"][i], 9))
        for i in (0, 3)
    }
    assert len(named(figure, "intervals clean").get_segments()) == 4


def test_many_points_are_numbered_with_a_key() -> None:
    frame = summary(25)
    figure = figures.trade_off(frame, PUBLISHED)
    (axis,) = figure.axes
    order = [*frame.sort_values("asr", kind="stable")["defense"], *PUBLISHED["label"]]
    keys = [word for word in legend_words(figure) if word[0].isdigit()]
    assert keys == [f"{number}  {name}" for number, name in enumerate(order, 1)]
    texts = {t.get_gid(): t.get_text() for t in axis.texts if t.get_text()}
    assert texts == {f"name {name}": str(number) for number, name in enumerate(order, 1)}
    cross = named(figure, "point RoCLIP (paper)")
    assert cross.get_marker() == "x"
    np.testing.assert_allclose(cross.get_xydata(), [[56, 30]])


def test_points_on_one_spot_have_names_that_can_be_read() -> None:
    frame = summary(8).assign(clean=0.55, asr=0.2, asr_low=0.1, asr_high=0.3)
    check_tidy(figures.trade_off(frame))
    check_tidy(figures.trade_off(summary(25).assign(clean=0.55, asr=0.2)))
    check_tidy(figures.cost(summary(25).assign(relative_cost=0.0, lift_removed=1.0)))


def test_a_share_of_draws_on_the_front_is_on_it_from_one_half() -> None:
    frame = summary(3).assign(on_front=[0.5, 0.49, math.nan], clean=[0.5, 0.51, 0.52])
    np.testing.assert_allclose(
        named(figures.trade_off(frame), "front").get_xydata(), [[50, 100 * frame["asr"][0]]]
    )


def test_a_defense_that_costs_nothing_stands_at_zero() -> None:
    frame = summary(7)
    frame.loc[3, "relative_cost"] = None
    figure = figures.cost(frame)
    (axis,) = figure.axes
    low, high = axis.get_xlim()
    for row in records(frame.drop(index=[3])):
        ((x, y),) = named(figure, f"point {row['defense']}").get_xydata()
        assert x == row["relative_cost"]
        assert y == pytest.approx(100 * row["lift_removed"])
        assert low < x < high
    assert axis.get_xscale() == "symlog"
    assert axis.get_title(loc="left") == "1 without a cost or a lift are left out"
    costly = figures.cost(frame[frame["relative_cost"] > 0])
    assert costly.axes[0].get_xscale() == "log"


def test_of_many_lines_the_best_have_names_and_what_is_invalid_is_said() -> None:
    """Sixteen lines in a small panel were a knot, and one without any was empty."""
    frame = cells(16, 2, 3, 1)
    figure = figures.rate_curves(frame, (), {ATTACKS[0]: [0.02, 0.05]})
    check_tidy(figure)
    words = legend_words(figure)
    assert "each of 8 others" in " ".join(words)
    assert len(words) == 9
    means = frame[frame["rate"] > 0].groupby("defense")["asr"].mean().drop("none")
    drawn = {line.get_gid() for line in figure.axes[0].lines if line.get_linewidth() >= 1}
    assert drawn == {"mean none", *(f"mean {name}" for name in means.nsmallest(7).index)}
    assert named(figure, f"invalid {ATTACKS[0]}").get_text() == "2 %, 5 %: invalid victim"
    assert len(legend_words(figures.rate_curves(cells(8, 2, 3, 1)))) == 8


def test_intervals_are_darker_than_the_grid_and_asr_begins_at_zero() -> None:
    frame = summary(4).assign(asr=[0.9, 0.0, 0.01, 0.02], asr_low=0.0)
    figure = figures.trade_off(frame)
    (axis,) = figure.axes
    bars = named(figure, "intervals asr").get_colors()[0]
    assert sum(bars[:3]) < sum(mpl.colors.to_rgb(mpl.rcParams["grid.color"])) - 0.9
    assert "interval of 95 %" in legend_words(figure)
    assert axis.get_ylim()[0] == 0
    assert not named(figure, f"point {DEFENSES[1]}").get_clip_on(), "a point at 0 is whole"


def test_the_columns_beside_ranks_are_named() -> None:
    shown = {t.get_text() for t in figures.rank_plot(summary(4), "mean ASR").axes[0].texts}
    assert {"mean ASR, %", "tier"} <= shown


# --- over all cells


def test_a_profile_rises_and_hits_exact_shares() -> None:
    """What failed on every second victim looked safer than what worked on all."""
    frame = pd.DataFrame({"defense": "d", "asr": [0.2, 0.5, 0.5, 1.0]})
    lacking = {"e": [0.0, None], "f": [None, None]}
    more = [pd.DataFrame({"defense": name, "asr": asr}) for name, asr in lacking.items()]
    figure = figures.profile(pd.concat([frame, *(part.astype({"asr": float}) for part in more)]))
    line = named(figure, "profile d")
    np.testing.assert_allclose(line.get_xydata(), [[0, 0], [20, 25], [50, 75], [100, 100]])
    np.testing.assert_allclose(named(figure, "profile e").get_xydata(), [[0, 50], [100, 50]])
    np.testing.assert_allclose(named(figure, "profile f").get_xydata(), [[0, 0], [100, 0]])
    assert line.get_drawstyle() == "steps-post"
    assert legend_words(figure) == ["e (1 of 2 cells)", "d", "f (0 of 2 cells)"]
    rng = np.random.default_rng(4)
    many = pd.DataFrame({"defense": "d", "asr": rng.uniform(0, 1, 99)})
    taus, shares = named(figures.profile(many), "profile d").get_xydata().T
    assert (np.diff(taus) > 0).all()
    assert (np.diff(shares) >= 0).all()
    for tau, share in zip(taus, shares, strict=True):
        assert share == pytest.approx(100 * (many["asr"] <= tau / 100 + 1e-12).mean())


def test_ranks_are_ordered_within_equal_needs() -> None:
    frame = summary(12)
    frame.loc[4, ["rank_low", "rank_high"]] = math.nan
    figure = figures.rank_plot(frame)
    check_tidy(figure)
    (axis,) = figure.axes
    rows = {
        label.get_text().replace("\n", ""): y
        for label, y in zip(axis.get_yticklabels(), axis.get_yticks(), strict=True)
    }
    for needs in (("victim", "clean_data"), ("suspect_data",)):
        mine = frame[[n == needs for n in frame["needs"]]]
        ranked = mine[mine["rank_low"].notna()].sort_values("score")
        last = mine[mine["rank_low"].isna()]
        places = [rows[name] for name in [*ranked["defense"], *last["defense"]]]
        assert places == sorted(places)
        assert places[-1] - places[0] < len(mine) + 1
    assert axis.yaxis_inverted()
    for row in records(frame.drop(index=[4])):
        y = rows[row["defense"]]
        line = named(figure, f"rank {row['defense']}").get_xydata()
        np.testing.assert_allclose(line, [[row["rank_low"], y], [row["rank_high"], y]])
        hollow = [li for li in axis.lines if li.get_gid() == f"hollow {row['defense']}"]
        assert len(hollow) == row["partial"]
        beside = {t.get_text() for t in axis.texts if t.xy[1] == pytest.approx(y)}
        assert beside == {row["letters"], f"{100 * row['score']:.1f}"}
    assert "no rank" in {t.get_text() for t in axis.texts}
    assert "given: suspect_data" in {t.get_text().replace("\n", "") for t in axis.texts}


def test_equal_needs_are_not_told_and_one_seed_ranks_nothing() -> None:
    figure = figures.rank_plot(summary(4).assign(needs="victim"))
    assert not any("given" in text.get_text() for text in figure.axes[0].texts)
    with pytest.raises(NothingToDraw, match="two victim seeds"):
        figures.rank_plot(summary(4).assign(rank_low=None, rank_high=None))


# --- curves


def test_roc_curves_are_the_frames_points_in_order() -> None:
    frame = roc(2, 2).iloc[::-1]
    frame.loc[frame.index[0], "true_positive"] = math.nan
    figure = figures.detection(frame)
    for axis, attack in zip(figure.axes, dict.fromkeys(frame["attack"]), strict=True):
        lines = {line.get_gid(): line.get_xydata() for line in axis.lines}
        assert set(lines) == {"chance", "roc none", "roc finetune"}
        for defense in ("none", "finetune"):
            mine = frame[(frame["attack"] == attack) & (frame["defense"] == defense)].dropna()
            want = 100 * mine[["false_positive", "true_positive"]].sort_values("false_positive")
            np.testing.assert_allclose(lines[f"roc {defense}"], want)
    frame["auroc"] = np.where(frame["attack"] == ATTACKS[0], 0.875, 0.5)
    assert "none: AUROC 0.50 to 0.88" in legend_words(figures.detection(frame))


def test_training_is_a_panel_per_number_and_a_line_per_stage() -> None:
    frame = epochs(3, 2)
    frame.loc[0, "value"] = math.inf
    figure = figures.training(frame)
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["number 0", "number 1"]
    for axis in figure.axes:
        for line in axis.lines:
            stage = line.get_gid().removeprefix("stage ")
            mine = frame[(frame["stage"] == stage) & np.isfinite(frame["value"])]
            mine = mine[mine["name"] == axis.get_title(loc="left").replace(" ", "_")]
            np.testing.assert_allclose(line.get_xydata(), mine[["epoch", "value"]])
    many = figures.training(epochs(60, 1))
    assert len(many.axes[0].lines) == 60
    assert legend_words(many) == ["each of 60 stages"]


def test_what_has_no_curve_has_no_panel_and_a_common_learning_rate_neither() -> None:
    frame = epochs(2, 1).assign(name="clip")
    rates = frame.assign(name="lr", value=0.1 / frame["epoch"])
    once = frame[frame["epoch"] == 3].assign(name="matched")
    both = pd.concat([rates, frame, once])
    titles = [axis.get_title(loc="left") for axis in figures.training(both).axes]
    assert titles == ["contrastive loss"]
    rates.loc[rates["stage"] == rates["stage"].iloc[0], "value"] *= 2
    differ = figures.training(pd.concat([rates, frame]))
    assert [a.get_title(loc="left") for a in differ.axes] == ["contrastive loss", "learning rate"]
    with pytest.raises(NothingToDraw, match="none of 2 fits recorded a second epoch"):
        figures.training(once)


def test_a_heat_map_tells_what_a_defense_costs_and_its_numbers_can_be_read() -> None:
    frame = by_cell(3, 2, 1).assign(status="ok", asr=np.linspace(0, 1, 6))
    frame["clean"] = frame["defense"].map(dict(zip(DEFENSES, (0.6, 0.58, 0.61), strict=False)))
    (axis,) = figures.heat_map(frame).axes
    notes = [t.get_text() for t in axis.texts if isinstance(t, mpl.text.Annotation)]
    assert {"0.0", "2.0", "-1.0"} < set(notes)
    assert any("CA lost" in note for note in notes)
    numbers = [text for text in axis.texts if text.get_text() == "20.0"]
    assert [text.get_color() for text in numbers] == ["black"], "on light orange"
    light = [axis.collections[0].cmap(share) for share in np.linspace(0, 1, 50)]
    assert {readable_on(ground) for ground in light} == {"black", "white"}
    assert readable_on(light[0]) == "black"
    assert readable_on(light[-1]) == "white"


def test_others_far_from_ours_are_arrows_and_many_have_no_names() -> None:
    few = PUBLISHED.assign(clean=[0.57, 0.95], asr=[0.4, 0.4])
    figure, alone = figures.trade_off(summary(4), few), figures.trade_off(summary(4))
    assert named(figure, "point RoCLIP (paper)").get_marker() == ">"
    assert named(figure, "point CleanCLIP (paper)").get_marker() == "x"
    assert figure.axes[0].get_xlim() == alone.axes[0].get_xlim()
    texts = {t.get_text() for t in figure.axes[0].texts}
    assert {"1", "2", "none", "finetune"} <= texts
    said = {word.replace(" ", "") for word in legend_words(figure)}
    assert {"1CleanCLIP(paper)", "2RoCLIP(paper)", "arrows:1faroutside"} <= said
    many = figures.trade_off(summary(4), pd.concat([PUBLISHED] * 4))
    assert "published (8 points)" in legend_words(many)
    assert not [word for word in legend_words(many) if "(paper)" in word]


# --- pictures and features


def test_planes_of_features_are_turned_to_the_victims() -> None:
    """Axes of a projection have no direction of their own: panels lay turned against each other."""
    frame = features(2).assign(image=lambda f: f["number"])
    victim = frame["model"] == "victim"
    turn = np.array([[0.0, 1.0], [1.0, 0.0]])  # mirrored, too
    frame.loc[~victim, ["x", "y"]] = frame[victim][["x", "y"]].to_numpy() @ turn + 5
    figure = figures.feature_map(frame)
    for kind in ("clean", "triggered", "target"):
        mine, other = (named(figure, f"{kind} {m}").get_offsets() for m in ("finetune", "victim"))
        np.testing.assert_allclose(mine - mine.mean(0), other - other.mean(0), atol=1e-9)


def test_a_gallery_states_how_much_it_amplifies() -> None:
    shown = pictures(2)
    same = Stamped("same", shown[0].clean, shown[0].clean)
    figure = figures.gallery([*shown, same])
    axes = np.array(figure.axes).reshape(3, 3)
    titles = [axis.get_title() for axis in axes[:, 2]]
    assert titles == ["difference × 6", "difference × 6", "no difference"]
    for (clean, triggered, difference), picture in zip(axes, shown, strict=False):
        np.testing.assert_array_equal(clean.images[0].get_array(), picture.clean)
        np.testing.assert_array_equal(triggered.images[0].get_array(), picture.triggered)
        want = 128 + 6 * (picture.triggered.astype(int) - picture.clean)
        np.testing.assert_array_equal(difference.images[0].get_array(), want)
    assert set(axes[2][2].images[0].get_array().ravel()) == {128}, "grey is no change"
    alike = figures.gallery([shown[0]._replace(words="a class of a long name"), shown[1]])
    titles = [axis.get_title() for axis in alike.axes]
    assert titles == ["clean", "triggered", "difference × 6", "", "", ""]
    assert alike.axes[0].get_xlabel() == "a class of a long…"
    bright = shown[0].clean.copy()
    bright[:] = np.where(np.arange(432).reshape(12, 12, 3) % 10, shown[0].clean + 5, bright + 10)
    bright[0, 0, 0] = shown[0].clean[0, 0, 0] + 50
    outlier = figures.gallery([shown[0]._replace(triggered=bright)])
    assert outlier.axes[2].get_title() == "difference × 12"
    assert outlier.axes[2].images[0].get_array().max() == 255
    with pytest.raises(ValueError, match="same: the clean picture is"):
        figures.gallery([same._replace(triggered=same.triggered[:-1])])


def test_features_of_the_victim_come_first() -> None:
    frame = features(3)
    frame.loc[0, "x"] = math.nan
    figure = figures.feature_map(frame)
    titles = [axis.get_title(loc="left").replace("\n", "") for axis in figure.axes]
    assert titles == ["victim", *DEFENSES[1:3]]
    for model, kind in product(titles, ("clean", "triggered", "target")):
        mine = frame[(frame["model"] == model) & (frame["kind"] == kind)].dropna()
        dots = named(figure, f"{kind} {model}").get_offsets()
        np.testing.assert_allclose(dots, mine[["x", "y"]])
    assert legend_words(figure) == ["clean", "triggered", "target class"]


# --- all of them


FRAMES: dict[str, tuple[Callable[[pd.DataFrame], Any], pd.DataFrame, Sequence[str]]] = {
    "heat_map": (figures.heat_map, by_cell(2, 1, 2), ["asr"]),
    "rate_curves": (figures.rate_curves, cells(2, 1, 2, 2), ["asr", "clean"]),
    "trade_off": (figures.trade_off, summary(3), ["asr"]),
    "profile": (figures.profile, by_cell(2, 1, 2), ["asr"]),
    "rank_plot": (figures.rank_plot, summary(3), ["rank_low", "rank_high"]),
    "cost": (figures.cost, summary(3), ["relative_cost"]),
    "detection": (figures.detection, roc(1, 1), ["true_positive"]),
    "training": (figures.training, epochs(1, 1), ["value"]),
    "feature_map": (figures.feature_map, features(2), ["x"]),
}


@pytest.mark.parametrize("name", FRAMES)
def test_what_cannot_be_drawn_says_why(name: str) -> None:
    draw, frame, numbers = FRAMES[name]
    draw(frame)
    with pytest.raises(NothingToDraw, match="there are no "):
        draw(frame.iloc[:0])
    with pytest.raises(NothingToDraw, match=f"has no column {numbers[0]}"):
        draw(frame.drop(columns=[numbers[0]]))
    with pytest.raises(NothingToDraw, match=f"none of {len(frame)} "):
        draw(frame.assign(**dict.fromkeys(numbers)))
    with pytest.raises(NothingToDraw, match=f"none of {len(frame)} "):
        draw(frame.assign(**dict.fromkeys(numbers, math.nan)))


@pytest.mark.parametrize("name", FRAMES)
def test_a_figure_leaves_its_frame_alone(name: str) -> None:
    draw, frame, _ = FRAMES[name]
    before = frame.copy(deep=True)
    draw(frame)
    pd.testing.assert_frame_equal(frame, before)


def test_one_call_draws_all_and_says_what_it_left_out(tmp_path: Path) -> None:
    before = dict(mpl.rcParams)
    wanted = {**every(3, 2, 2, 2), "heat map/b": every(2, 1, 1, 1)["heat_map"]}
    wanted["empty"] = partial(figures.gallery, [])
    drawn = draw_all(wanted, tmp_path / "a" / "figures")
    assert drawn.left_out == ["empty: there are no pictures"]
    names = [*every(1, 1, 1, 1), "heat_map_b"]
    kinds = ("png", "svg")
    assert [path.name for path in drawn.files] == [f"{n}.{k}" for n in names for k in kinds]
    for path in drawn.files[::2]:
        with Image.open(path) as picture:
            assert picture.width in (COLUMN_INCHES * PNG_DPI, PAGE_INCHES * PNG_DPI)
    again = draw_all(wanted, tmp_path / "b")
    for first, second in zip(drawn.files, again.files, strict=True):
        assert first.read_bytes() == second.read_bytes(), first.name
    assert ">finetune</text>" in (tmp_path / "b" / "rank_plot.svg").read_text()
    assert dict(mpl.rcParams) == before


def test_a_defense_has_one_look_in_all_figures_of_an_order() -> None:
    frame = cells(25, 1, 2, 1)
    some = frame[frame["defense"].isin(DEFENSES[3:6])]
    # Of many lines against rates the undefended one and the seven of least ASR have looks.
    for draw, kind, num in ((figures.rate_curves, "mean", 8), (figures.profile, "profile", 25)):
        every_look, some_looks = (
            {
                line.get_gid().split(" ", 1)[1]: (
                    line.get_color(),
                    line.get_marker(),
                    line.get_linestyle(),
                )
                for line in draw(data, order=DEFENSES).axes[0].lines
                if line.get_gid().startswith(kind)
            }
            for data in (frame, some)
        )
        told = {name: look for name, look in every_look.items() if look[0] != "0.78"}
        assert len(set(told.values())) == len(told) == num
        shared = [name for name in DEFENSES[3:6] if name in told]
        assert shared
        assert all(some_looks[name] == told[name] for name in shared)
        assert every_look["none"][:2] == ("black", "*")
        assert "*" not in MARKERS


def test_names_are_broken_behind_their_separators() -> None:
    assert wrapped("short", 10) == "short"
    assert wrapped("adaptive_blend_patch", 12) == "adaptive_\nblend_patch"
    assert wrapped("lr=1e-05,label-consistent", 11) == "lr=1e-05,\nlabel-\nconsistent"
    assert wrapped("unbreakable", 4) == "unbr\neaka\nble"
    for letters in range(1, 30):
        lines = wrapped(LONG, letters).split("\n")
        assert max(map(len, lines)) <= letters
        assert "".join(lines) == LONG
