"""Others' numbers beside ours: shown apart, and in nothing that is counted or compared."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from analysis import Results
from analysis.drawing import figures_of
from analysis.imports import imported_in
from analysis.imports.points import beside
from analysis.leaderboard import Asked, load, text
from analysis.reader import Tables
from analysis.report import write_report
from grid.schema.errors import ResultsError
from tests.boards import steady, write_board
from tests.grids import call
from tests.imports import numbers, table, take

NAMES = ("badnet", "blended", "sig", "wanet", "ssba", "bpp")
OURS = {
    "none": steady(0.95, 0.01),
    "finetune": steady(0.4, 0.03),
    "anp": steady(0.2, 0.03),
}
# Better than anything of ours, and of everything on the board.
BEST = [
    {"attack": a, "defense": d, "rate": "0.01", "metric": m, "variant": v, "value": x}
    for a in NAMES
    for d in OURS
    for m, v, x in (("clean_top1", "top-1", "99.9"), ("asr_top1", "non-target images", "0"))
]


@pytest.fixture(scope="module")
def boards(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A board, and the same with others' numbers in it."""
    plain = tmp_path_factory.mktemp("boards") / "plain"
    write_board(plain, OURS, attacks=NAMES, rates=("0", "0.01"))
    both = plain.parent / "both"
    shutil.copytree(plain, both)
    take(both, table(*BEST), name="best")
    return plain, both


def test_nothing_that_is_counted_compared_or_ranked_knows_them(
    boards: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    plain, both = boards
    asked = Asked(part="lines")
    assert text(load(plain, asked), asked, "html") == text(load(both, asked), asked, "html")
    first, second = (Results(folder).board() for folder in boards)
    for frame in ("lines", "tiers", "cells"):
        # A mean of several threads may differ in its last digit from one reading to the next.
        pd.testing.assert_frame_equal(getattr(first, frame)(), getattr(second, frame)(), rtol=1e-9)
    assert repr(first.compare("anp", "finetune")) == repr(second.compare("anp", "finetune"))
    for view in ("rows", "newest", "cells", "board", "completeness", "samples"):
        counted = [len(Results(folder).sql(f"FROM {view}")) for folder in boards]
        assert counted[0] == counted[1]
    assert call(capsys, "compact", both).code == 0
    assert len(numbers(both)) == len(BEST)


def test_a_board_ends_with_them_in_grey(boards: tuple[Path, Path]) -> None:
    asked = Asked(part="lines")
    plain, both = (text(load(f, asked), asked, "table", 300, color=True) for f in boards)
    assert both.startswith(plain)
    added = both.removeprefix(plain).splitlines()
    assert added[1].startswith("\x1b[90mImported (other models, data and victims; not comparable")
    assert all(line.startswith("\x1b[90m") for line in added[1:])
    line = "badnet, anp (rate 1 %): CA 99.9 % (geometry: not stated), ASR 0.0 % (counted over: non-"
    assert line in both
    assert "- badnet, anp (rate 1 %): CA 99.9 %" in text(load(boards[1], asked), asked, "md")


def test_a_board_tells_imports_apart_and_has_r_acc(tmp_path: Path) -> None:
    """Two imports of the same cell were one line, with the numbers of the second."""
    folder = write_board(tmp_path / "two", OURS, attacks=["badnet"])
    r_acc = {"metric": "r_acc", "variant": "non-target images"}
    for name, value in (("first", "60"), ("second", "70")):
        take(folder, table({"value": value, **r_acc}), name=name)
    lines = text(load(folder, Asked(part="lines")), Asked(part="lines"), "md")
    for name, value in (("first", "60.0"), ("second", "70.0")):
        assert re.search(rf"R-Acc {value} %.*import {name}\]", lines)


def test_they_have_a_frame_and_a_key_of_their_own(boards: tuple[Path, Path]) -> None:
    plain, both = boards
    asked = Asked(part="lines")
    bodies = [json.loads(text(load(folder, asked), asked, "json")) for folder in boards]
    assert "imported" not in bodies[0]
    assert len(bodies[1].pop("imported")) == len(BEST)
    first, second = (pd.DataFrame(body.pop("rows")) for body in bodies)
    pd.testing.assert_frame_equal(first, second, rtol=1e-9)
    assert bodies[0] == bodies[1]
    frame = Results(both).published()
    assert set(frame["provenance"]) == {"imported"}
    assert len(frame) == len(BEST)
    assert len(Results(plain).published()) == 0
    everything = Results(both).published(bundled=True)
    assert set(everything["provenance"]) == {"imported", "bundled"}
    assert not everything[["metric", "variant", "value"]].isna().any().any()
    assert Results(both).sql("SELECT count(*) AS n FROM published")["n"][0] == len(BEST)


def test_a_file_in_the_wrong_folder_is_read_by_nobody(
    boards: tuple[Path, Path], tmp_path: Path
) -> None:
    """Somebody moves files about: what others measured does not become ours, nor the reverse."""
    plain, both = boards
    folder = tmp_path / "moved"
    shutil.copytree(plain, folder)
    for file in (both / "imported").glob("*.parquet"):
        shutil.copy(file, folder / "rows")
    (folder / "imported").mkdir()
    for file in (plain / "rows").glob("*.parquet"):
        shutil.copy(file, folder / "imported")
    with closing(Tables(folder)) as tables, closing(Tables(plain)) as before:
        assert imported_in(tables) == []
        count = "SELECT count(*) FROM rows"
        assert tables.query(count).rows == before.query(count).rows
        assert sum("skipped, not a" in warning for warning in tables.warnings) == 2


# --- in figures


def drawn(folder: Path, eval_set: str = "report") -> Any:
    figure = figures_of(folder, Asked(eval_set=eval_set))["trade_off"]()
    figure.canvas.draw()
    return figure


def marks(figure: Any, gid: str) -> list[Any]:
    return [line for line in figure.axes[0].lines if line.get_gid() == gid]


def words(figure: Any) -> list[str]:
    return [t.get_text().replace("\n", " ") for t in figure.legends[0].get_texts()]


def test_the_front_is_ours_alone(boards: tuple[Path, Path]) -> None:
    plain, both = (drawn(folder) for folder in boards)
    (front,), (same) = marks(plain, "front"), marks(both, "front")
    np.testing.assert_array_equal(front.get_xydata(), same[0].get_xydata())
    # Far from ours, they are arrows at the edge, and no axis is wider for them.
    arrows = [p for p in both.axes[0].lines if p.get_marker() == ">" and len(p.get_xdata())]
    assert len(arrows) == len(BEST) // 2
    assert {p.get_color() for p in arrows} == {"0.62"}
    edge = both.axes[0].get_xlim()[1]
    assert {tuple(*p.get_xydata().tolist()) for p in arrows} == {(edge, 0.0)}
    assert edge == plain.axes[0].get_xlim()[1] < 70
    # Many are not named one by one; ours are.
    assert not [word for word in words(both) if "(badnet)" in word]
    assert {*OURS} <= {t.get_text() for t in both.axes[0].texts}
    source = "best: Wu et al., CIFAR-10, PreAct-ResNet18, rate 1\N{NO-BREAK SPACE}%"
    assert f"{source} (18 points)" in words(both)
    note = "grey: one attack each, ours are means; arrows: 18 far outside"
    assert note in " ".join(words(both))
    assert not [word for word in words(plain) if "best" in word or "grey" in word]


def test_only_what_is_counted_as_ours_is_drawn(boards: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "in"
    shutil.copytree(boards[0], folder)
    clean = {"metric": "clean_top1", "variant": "top-1", "value": "62.5"}
    take(
        folder,
        table(
            *({**c, "setting": "fair"} for c in ({}, clean)),
            # All images; a bound; no clean accuracy; not on this board; a name of its own.
            *({**c, "setting": "all"} for c in ({"variant": "all images"}, clean)),
            {"setting": "alone"},
            *({**c, "attack": "trojannn"} for c in ({}, clean)),
            *({**c, "attack": "sig", "as_written": "attack"} for c in ({}, clean)),
        ),
        name="mine",
    )
    figure = drawn(folder)
    crosses = [p for p in figure.axes[0].lines if p.get_marker() == "x" and len(p.get_xdata())]
    assert [tuple(map(float, *p.get_xydata().tolist())) for p in crosses] == [(62.5, 0.73)]
    assert {*OURS, "1"} <= {t.get_text() for t in figure.axes[0].texts}, "others have numbers"
    assert "1\N{NO-BREAK SPACE}\N{NO-BREAK SPACE}anp (badnet)" in words(figure)
    note = "grey: one attack each, ours are means; 7 of 9 imported numbers left out"
    assert note in " ".join(words(figure))
    with closing(Tables(folder)) as tables:
        records = imported_in(tables)
    shifted = beside(records, set(NAMES), set(OURS), "shifted")
    assert (len(shifted.points), shifted.note) == (0, "9 of 9 imported numbers left out")


def test_every_source_has_a_mark_of_its_own(boards: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "in"
    shutil.copytree(boards[0], folder)
    for name, value in (("one", "61"), ("two", "59")):
        rows = [{}, {"metric": "clean_top1", "variant": "top-1", "value": value}]
        # No formula, nor markup.
        hostile = {"paper": "Wu $\\x$ <b>", "model": "m_1"}
        take(folder, table(*({**row, **hostile} for row in rows)), name=name)
    figure = drawn(folder)
    assert [p.get_marker() for p in marks(figure, "point anp (badnet)")] == ["x", "+"]
    assert [w.split(":")[0] for w in words(figure) if "Wu" in w] == ["one", "two"]


def test_the_report_has_them_in_a_section_of_their_own(
    boards: tuple[Path, Path], tmp_path: Path
) -> None:
    page = write_report(boards[1], tmp_path / "x.html", Asked()).read_text().replace("&#x27;", "'")
    assert ">Others' numbers</h2>" in page
    assert "Nothing here is in a mean, a rank, a tier, a comparison or a front" in page
    assert hashlib.sha256(table(*BEST).encode()).hexdigest()[:12] in page


def test_imports_alone_are_no_board(tmp_path: Path) -> None:
    take(tmp_path / "in", table())
    assert len(Results(tmp_path / "in").published()) == 1
    with pytest.raises(ResultsError, match="No results in"):
        load(tmp_path / "in", Asked())
