"""Results in notebooks: the objects, and the guided tour, executed."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analysis import Results
from analysis.inference import Mean
from grid.schema.errors import ResultsError
from tests.boards import N, steady, write_board, write_exhibits

TOUR = Path(__file__).parent.parent / "analysis" / "leaderboard.ipynb"
ATTACKS = ("badnet", "blended", "sig", "wanet", "trojvqa", "badclip")
ASR = {
    "none": steady(0.95, 0.01),
    "finetune": steady(0.4, 0.03),
    "cleanclip": steady(0.3, 0.03),
    "roclip": steady(0.1, 0.03),
}


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("board")
    write_board(folder, ASR, attacks=ATTACKS, rates=("0", "0.01", "0.03"))
    return write_exhibits(folder, {name: f"badnet-0.03-{name}-0-0" for name in ASR})


def test_tables_are_frames(board: Path) -> None:
    view = Results(board).board()
    assert repr(view) == "Board(made, report: 72 lines)"
    tiers = view.tiers()
    assert tiers["defense"].iloc[0] == "roclip"
    assert len(view.lines()) == 72
    cells = view.cells()
    assert len(cells) == 4 * 6 * 2 * 3, "poisoned cells, one a victim and defense"
    mean = cells[cells["defense"] == "roclip"]["asr"].mean()
    assert tiers.set_index("defense").loc["roclip", "asr"] == pytest.approx(mean)
    assert any("Over 12 strata" in note for note in view.notes())
    html = view._repr_html_()
    assert "<table>" in html
    assert "roclip" in html
    assert not (cells["asr"] * N % 1).round(6).any()


def test_sql_is_a_frame(board: Path) -> None:
    found = Results(board).sql("SELECT attack, count(*) AS n FROM cells GROUP BY 1 ORDER BY 1")
    assert found["attack"].to_list() == sorted(ATTACKS)
    assert set(found["n"]) == {36}
    asked = "SELECT attack, count(*) AS n FROM cells GROUP BY 1 ORDER BY 1"
    assert Results(board).board().sql(asked).equals(found)
    with pytest.raises(ResultsError, match="refused"):
        Results(board).sql("SELECT * FROM read_csv('/etc/passwd')")


def test_what_cannot_be_read_is_said_and_names_are_no_markup(tmp_path: Path) -> None:
    evil = "<script>1</script>"
    write_board(tmp_path, {"none": steady(0.9), "ours": steady(0.1)}, name=evil)
    (tmp_path / "rows" / "<b>.parquet").write_bytes(b"PAR1")
    with pytest.warns(UserWarning, match=r"<b>.parquet: skipped, cannot be read"):
        assert len(Results(tmp_path).sql("SELECT DISTINCT defense FROM cells")) == 2
    shown = Results(tmp_path).board()._repr_html_()
    assert "&lt;b&gt;.parquet: skipped" in shown
    assert "<b>" not in shown
    invalid = {("none", a, "0.01", s): "invalid_victim" for a in ("badnet", "blended")
               for s in range(3)}  # fmt: skip
    write_board(tmp_path / "bad", {"none": steady(0.3)}, status=invalid, name=evil)
    none = Results(tmp_path / "bad").board()._repr_html_()
    assert "no sound victim has numbers yet" in none
    assert evil not in none


def test_comparisons_are_shown_and_have_their_numbers(board: Path) -> None:
    found = Results(board).board().compare("roclip", "finetune")
    assert isinstance(found.found.asr, Mean)
    assert repr(found).startswith("roclip leaves the smaller ASR over strata.")
    assert "<p>roclip leaves" in found._repr_html_()
    assert len(found.cells()) == 36


DRAWN = [
    pytest.param(name, marks=() if name in ("heatmap", "ranks") else pytest.mark.exhaustive)
    for name in ("heatmap", "curves", "pareto", "profile", "ranks", "cost")
]


@pytest.mark.parametrize("name", DRAWN)
def test_figures_are_pictures(name: str, board: Path, tmp_path: Path) -> None:
    drawing = getattr(Results(board).board(), name)()
    assert drawing._repr_png_().startswith(b"\x89PNG")
    assert drawing.save(tmp_path / "x.svg").read_text().startswith("<?xml")


def test_options_are_those_of_the_board(board: Path) -> None:
    view = Results(board).board(group="needs", at_ca_loss=2)
    assert len(set(view.tiers()["needs"])) > 1
    with pytest.raises(ResultsError, match="no group 'x'"):
        Results(board).board(group="x")
    with pytest.raises(ResultsError, match="there is no such directory"):
        Results(board / "nowhere")


def test_the_tour_runs_and_shows_something_at_every_step(
    board: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.setenv("GRID_RESULTS", str(board))
    tour = nbformat.read(TOUR, as_version=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the kernel's own libraries
        nbclient.NotebookClient(tour, timeout=120, kernel_name="python3").execute()
    steps = [cell for cell in tour.cells if cell.cell_type == "code"]
    assert all(cell.outputs for cell in steps)
    kinds = [set(output.get("data", ())) for cell in steps for output in cell.outputs]
    assert sum("image/png" in kind for kind in kinds) == 8
    assert sum("text/html" in kind for kind in kinds) >= 6
    loud = [o for cell in steps for o in cell.outputs if o.get("name") == "stderr"]
    assert loud == []


def test_the_tour_is_kept_without_its_outputs() -> None:
    """What it shows depends on the results that it is run on."""
    nbformat: Any = pytest.importorskip("nbformat")
    tour = nbformat.read(TOUR, as_version=4)
    nbformat.validate(tour)
    assert all(not cell.get("outputs") for cell in tour.cells)
    assert np.all([cell.get("execution_count") is None for cell in tour.cells])
