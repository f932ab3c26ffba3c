"""From results to what figures are given: nothing is averaged over, and no cell is lost."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from analysis import exhibits
from analysis.drawing import figures_of
from analysis.leaderboard import Asked
from analysis.reader import read_tables
from grid.schema.writing import write_grid, write_rows
from tests.boards import steady, write_board, write_exhibits
from tests.rows import cell_columns, cell_rows

ATTACKS = ("badnet", "blended", "sig", "wanet")


def given(figures: Mapping[str, Any], name: str) -> Any:
    """The frame that a figure is drawn from."""
    return figures[name].args[0].args[0]


def mixed(folder: Path, kinds: Mapping[str, tuple[dict[str, str], float]]) -> Path:
    """One attack on several kinds of victims, each with an ASR of its own after a defense."""
    rows, cells = [], []
    for kind, (columns, asr) in kinds.items():
        for seed in (0, 1):
            for defense, number in (("none", 0.95), ("ours", asr)):
                about: dict[str, Any] = {"cell": f"{kind}-{defense}-{seed}", **columns}
                cells.append(cell_columns("badnet", "0.01", defense, seed, **about))
                rows += cell_rows("badnet", "0.01", defense, seed, asr=number, **about)
    write_rows(folder, rows)
    write_grid(folder, "mixed", "0", cells)
    return folder


@pytest.mark.parametrize(
    ("first", "second", "names"),
    [
        (
            {"target": "apple", "model": "ViT-B-32-224"},
            {"target": "banana", "model": "RN50"},
            {"badnet (apple, ViT-B-32-224)": 0.0, "badnet (banana, RN50)": 1.0},
        ),
        ({"target": "apple"}, {"target": "kiwi"}, {"badnet (apple)": 0.0, "badnet (kiwi)": 1.0}),
        ({"regime": "F"}, {"regime": "S"}, {"badnet (F)": 0.0, "badnet (S)": 1.0}),
        ({"track": "a"}, {"track": "b"}, {"badnet (a)": 0.0, "badnet (b)": 1.0}),
    ],
)
def test_kinds_of_victims_are_not_averaged_over(
    first: dict[str, str],
    second: dict[str, str],
    names: dict[str, float],
    tmp_path: Path,
) -> None:
    drawn = figures_of(mixed(tmp_path, {"one": (first, 0.0), "two": (second, 1.0)}), Asked())
    for name in ("heat_map", "rate_curves", "profile"):
        frame = given(drawn, name)
        ours = frame[frame["defense"] == "ours"]
        found = set(zip(ours["attack"], ours["asr"], strict=True))
        assert found == set(names.items()), name


def test_a_board_of_one_kind_has_plain_names(tmp_path: Path) -> None:
    write_board(tmp_path, {"none": steady(0.9)}, attacks=ATTACKS)
    drawn = figures_of(tmp_path, Asked())
    assert set(given(drawn, "heat_map")["attack"]) == {*ATTACKS}


def test_the_profile_counts_what_failed_and_no_victim_that_is_unsound(tmp_path: Path) -> None:
    ended = {
        **{("bad", a, "0.01", s): "failed_method" for a in ATTACKS[2:] for s in range(3)},
        ("bad", "badnet", "0.01", 0): "missing",
        **{("off", a, "0.01", s): "not_applicable" for a in ATTACKS[1:] for s in range(3)},
        ("none", "blended", "0.01", 1): "invalid_victim",
        ("bad", "blended", "0.01", 1): "skipped",
        ("good", "blended", "0.01", 1): "skipped",
    }
    asr = {"none": steady(0.95), "bad": steady(0.05), "good": steady(0.1), "off": steady(0.2)}
    write_board(tmp_path, asr, attacks=ATTACKS, status=ended)
    drawn = figures_of(tmp_path, Asked())
    frame = given(drawn, "profile")
    counts = frame.groupby("defense")["asr"].agg(["size", "count"])
    assert counts.loc["bad"].to_list() == [11, 4]
    assert counts.loc["good"].to_list() == [11, 11]
    assert counts.loc["off"].to_list() == [3, 3]
    figure = drawn["profile"]()
    words = [t.get_text() for legend in figure.legends for t in legend.get_texts()]
    said = {" ".join(word.replace("\N{NO-BREAK SPACE}", " ").split()) for word in words}
    assert said == {"none", "good", "off", "bad (4 of 11 cells)"}


def test_failures_remove_no_lift_and_leave_marks(tmp_path: Path) -> None:
    """A defense that worked on one of three victims was drawn as if it had on all."""
    ended = {("flaky", a, "0.01", s): "failed_method" for a in ATTACKS for s in (1, 2)}
    asr = {"none": steady(0.92), "flaky": steady(0.02), "whole": steady(0.02)}
    write_board(tmp_path, asr, attacks=ATTACKS, status=ended)
    drawn = figures_of(tmp_path, Asked())
    removed = given(drawn, "cost").set_index("defense")["lift_removed"]
    assert removed["whole"] == pytest.approx(1.0)
    assert removed["flaky (8 of 12 failed)"] == pytest.approx(1 / 3)
    parts = given(drawn, "heat_map").groupby("defense")["is_part"].all()
    assert parts.to_dict() == {"none": False, "flaky": True, "whole": False}
    scores = given(drawn, "rank_plot").set_index("defense")["score"]
    assert list(scores[scores.isna()].index) == ["flaky"], "no mean of what did not fail alone"


def test_a_rate_whose_victims_are_invalid_is_named(tmp_path: Path) -> None:
    ended = {("none", "badnet", "0.02", s): "invalid_victim" for s in range(3)}
    ended |= {("none", "sig", "0.02", 0): "invalid_victim"}
    asr = {"none": steady(0.9)}
    write_board(tmp_path, asr, attacks=ATTACKS, rates=("0.01", "0.02"), status=ended)
    drawn: Any = figures_of(tmp_path, Asked())["rate_curves"]
    assert drawn.args[0].args[2] == {"badnet": [0.02]}


def test_exhibits_of_an_invalid_victim_say_so(tmp_path: Path) -> None:
    for folder, ended in ((tmp_path / "bad", "invalid_victim"), (tmp_path / "good", "ok")):
        status = {("none", "badnet", "0.01", 0): ended}
        write_board(folder, {"none": steady(0.2)}, attacks=["badnet"], seeds=[0], status=status)
        write_exhibits(folder, {"none": "badnet-0.01-none-0-0"})
        (said,) = read_tables(folder, exhibits.victims).values()
        assert said.endswith("invalid: it failed its gate") == (ended != "ok")
