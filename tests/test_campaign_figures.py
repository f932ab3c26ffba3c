"""Figures of campaigns: what is drawn, where it lies, and that nothing hides anything else."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from analysis import campaign_figures as figures
from analysis import importance as importances
from analysis.campaign_figures import NothingToDraw, draw_campaign, house_style
from analysis.campaigns import CampaignBoard, SearchResult, load_campaign
from analysis.importance import importance
from grid.cli import main
from grid.schema.writing import write_table
from tests.rows import trial_row
from tests.trials import NUM_EPOCHS, VICTIM_CA, write_campaign


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> CampaignBoard:
    """Two defenses x three objectives, one of them an oracle, x 12 trials."""
    folder = tmp_path_factory.mktemp("campaign")
    return load_campaign(write_campaign(folder, objectives=["tuned", "clean-only", "oracle"]))


@pytest.fixture(autouse=True)
def style(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The theme, and forests small enough to draw many."""
    monkeypatch.setattr(importances, "NUM_TREES", 30)
    monkeypatch.setattr(importances, "REPEATS", 3)
    with house_style():
        yield


def named(axis: Any, gid: str) -> Any:
    """The one thing in a panel that is called so."""
    found = [child for child in axis.get_children() if child.get_gid() == gid]
    assert len(found) == 1, gid
    return found[0]


def labelled(axis: Any, label: str) -> Any:
    handles, labels = axis.get_legend_handles_labels()
    return handles[labels.index(label)]


def check_tidy(figure: Any) -> None:
    """Every word lies inside the picture, no panel or legend lies on another, and none is empty."""
    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    inside = figure.bbox.padded(1)
    panels = [axis for axis in figure.axes if axis.get_visible()]
    boxes = [axis.get_tightbbox(renderer) for axis in panels]
    boxes += [legend.get_window_extent(renderer) for legend in figure.legends]
    for i, box in enumerate(boxes):
        assert inside.contains(box.x0, box.y0), figure
        assert inside.contains(box.x1, box.y1), figure
        assert not any(box.padded(-1).overlaps(other.padded(-1)) for other in boxes[:i])
    for axis in panels:
        assert axis.has_data()
        for ticks in (axis.get_xticklabels(), axis.get_yticklabels()):
            shown = [t.get_window_extent(renderer) for t in ticks if t.get_text()]
            assert not any(a.overlaps(b) for a, b in pairwise(shown))
    sizes = [text.get_fontsize() for text in figure.findobj(mpl.text.Text) if text.get_text()]
    assert min(sizes) >= 7


def search_of(board: CampaignBoard, defense: str, objective: str) -> SearchResult:
    return next(s for s in board.defenses[defense] if s.objective == objective)


def test_the_cloud_holds_every_epoch_the_front_and_the_choice(board: CampaignBoard) -> None:
    figure = figures.cloud_figure(board, "cleanclip")
    check_tidy(figure)
    above, below = figure.axes
    for axis, objective in ((above, "tuned"), (above, "clean-only"), (below, "oracle")):
        search = search_of(board, "cleanclip", objective)
        epochs = [(e.ca, e.worst_asr) for t in search.trials for e in t.epochs]
        dots = named(axis, f"epochs {objective}").get_offsets()
        np.testing.assert_allclose(dots, 100 * np.array(epochs))
        assert len(named(axis, f"trials {objective}").get_offsets()) == len(search.complete)
        front = [(100 * (t.ca or 0), 100 * (t.worst_asr or 0)) for t in reversed(search.front())]
        np.testing.assert_allclose(named(axis, f"front {objective}").get_xydata(), front)
        assert search.chosen is not None
        mark = labelled(axis, f"{objective}: chosen").get_offsets()[0]
        np.testing.assert_allclose(
            mark, [100 * (search.chosen.ca or 0), 100 * (search.chosen.worst_asr or 0)]
        )
    default = search_of(board, "cleanclip", "tuned").default
    assert default is not None
    (star,) = labelled(above, "default settings").get_xydata()
    np.testing.assert_allclose(star, [100 * (default.ca or 0), 100 * (default.worst_asr or 0)])
    (cross,) = labelled(above, "undefended victim").get_xydata()
    np.testing.assert_allclose(cross, [100 * VICTIM_CA, 99])
    limit = labelled(above, "limit: 2 points lost")
    assert limit.get_xdata()[0] == pytest.approx(100 * (VICTIM_CA - 0.02))
    assert "tuning attacks badnet, blended" in above.get_title(loc="left")
    assert "held-out attacks sig" in below.get_title(loc="left")


def test_a_broken_model_does_not_squeeze_the_cloud(board: CampaignBoard) -> None:
    axis = figures.cloud_figure(board, "cleanclip").axes[0]
    low, high = axis.get_xlim()
    dots = np.concatenate(
        [named(axis, f"{what} {o}").get_offsets()[:, 0] for what in ("epochs", "trials")
         for o in ("tuned", "clean-only")]
    )  # fmt: skip
    hidden = int((dots < low + 0.04 * 12).sum())
    assert hidden > 0
    assert f"{hidden} points lie further left" in axis.get_title(loc="left")
    assert high - low < 100 * 1.2 * figures.FARTHEST_LOSS


def test_a_front_is_a_stair_of_what_it_dominates(board: CampaignBoard) -> None:
    """Between two trials of a front, what can be had is the higher ASR: the step is to the left."""
    axis = figures.cloud_figure(board, "cleanclip").axes[0]
    assert named(axis, "front tuned").get_drawstyle() == "steps-pre"


def test_hypervolumes_are_a_panel_per_defense(board: CampaignBoard) -> None:
    figure = figures.hypervolume_figure(board)
    check_tidy(figure)
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["cleanclip", "finetune"]
    for axis in figure.axes:
        defense = axis.get_title(loc="left")
        for objective in board.objectives:
            line = labelled(axis, objective)
            want = search_of(board, defense, objective).hypervolumes()
            np.testing.assert_allclose(line.get_xydata(), want)
    colors = {labelled(figure.axes[0], o).get_color() for o in board.objectives}
    assert len(colors) == 3


def test_importance_has_a_bar_per_setting_and_objective(board: CampaignBoard) -> None:
    figure = figures.importance_figure(board, "cleanclip")
    check_tidy(figure)
    names = [tick.get_text() for tick in figure.axes[0].get_yticklabels()]
    for axis, target in zip(figure.axes, ("score", "ca"), strict=True):
        containers = [c for c in axis.containers if isinstance(c, mpl.container.BarContainer)]
        bars = [c for c in containers if c.errorbar is not None]
        assert len(bars) == 3
        for drawn, objective in zip(bars, board.objectives, strict=True):
            want = importance(search_of(board, "cleanclip", objective), target)
            assert [bar.get_width() for bar in drawn] == [bar.fall for bar in want.bars]
            places = [round(bar.get_y() + bar.get_height() / 2) for bar in drawn]
            assert [names[place] for place in places] == [bar.setting for bar in want.bars]
            assert drawn[0].get_alpha() == (1.0 if want.is_telling else 0.35)
    (legend,) = figure.legends
    want = importance(search_of(board, "cleanclip", "tuned"), "score")
    assert legend.get_texts()[0].get_text().startswith(f"tuned: {want.words} (score), ")


def test_curves_end_where_trials_were_stopped(board: CampaignBoard) -> None:
    figure = figures.curves_figure(board, "cleanclip")
    check_tidy(figure)
    for axis, objective in zip(figure.axes[:3], board.objectives, strict=True):
        search = search_of(board, "cleanclip", objective)
        for trial in search.trials:
            line = named(axis, f"trial {trial.number}")
            want = [(e.epoch, 100 * (e.worst_asr or 0)) for e in trial.epochs]
            np.testing.assert_allclose(line.get_xydata(), want)
            last = {"ok": NUM_EPOCHS, "stopped": 3, "failed": 2}[trial.status]
            assert line.get_xdata()[-1] == last
        ends = [line for line in axis.lines if line.get_label() == "stopped"]
        assert [line.get_xdata()[0] for line in ends] == [3, 3]
        assert search.chosen is not None
        thick = named(axis, f"trial {search.chosen.number}")
        assert thick.get_label() == f"{objective}: chosen"
        assert thick.get_linewidth() == max(line.get_linewidth() for line in axis.lines)
        ticks = list(axis.get_xticks())
        assert ticks == [round(tick) for tick in ticks]


def test_what_cannot_be_drawn_is_said_in_words(tmp_path: Path) -> None:
    """Three trials of a repair that fits nothing, of which none ended with an ASR."""
    numbers: dict[str, Any] = {"ca": 0.6, "ca_loss": 0.01, "score": 0.1}
    write_table(tmp_path, "trials", [trial_row(n, **numbers) for n in range(3)])
    board = load_campaign(tmp_path)
    with pytest.raises(NothingToDraw, match="write `curves: true`"):
        figures.curves_figure(board, "cleanclip")
    with pytest.raises(NothingToDraw, match="2 complete trials, 8 needed"):
        figures.importance_figure(board, "cleanclip")
    with pytest.raises(NothingToDraw, match="no trial of cleanclip has ended"):
        figures.cloud_figure(board, "cleanclip")
    failed = trial_row(0, status="failed", reason="loss is not finite", search="s", defense="d")
    write_table(tmp_path / "failed", "trials", [failed])
    drawn = draw_campaign(load_campaign(tmp_path / "failed"), tmp_path / "figures")
    assert drawn.files == []
    assert [words.partition(":")[0] for words in drawn.left_out] == [
        *("hypervolume", "cloud-d", "curves-d", "importance-d")
    ]


def test_long_names_and_many_objectives_stay_inside(tmp_path: Path) -> None:
    names = ["tuned-on-the-worst-attack", "clean-only", "simulated-by-the-defender", "oracle"]
    folder = write_campaign(tmp_path, ["cleanclip", "finetune"], names, 14)
    board = load_campaign(folder)
    for figure in (
        figures.hypervolume_figure(board),
        *(draw(board, "cleanclip") for draw in (
            figures.cloud_figure, figures.curves_figure, figures.importance_figure
        )),
    ):  # fmt: skip
        check_tidy(figure)


def test_one_command_draws_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_campaign(tmp_path / "demo", ["cleanclip"], ["tuned"], 5)
    before = dict(mpl.rcParams)
    with pytest.raises(SystemExit) as ended:
        main(["leaderboard", "--campaign", str(folder), "--figures", str(tmp_path / "figures")])
    assert ended.value.code == 0
    shown = capsys.readouterr()
    assert "cleanclip@tune-demo" in shown.out
    assert "not drawn: importance-cleanclip: tuned: 3 complete trials, 8 needed" in shown.err
    files = sorted(path.name for path in (tmp_path / "figures").iterdir())
    drawn = ("cloud-cleanclip", "curves-cleanclip", "hypervolume")
    assert files == [f"{name}.{kind}" for name in drawn for kind in ("png", "svg")]
    for name in drawn:
        assert f"{tmp_path / 'figures' / name}.png" in shown.err
        with Image.open(tmp_path / "figures" / f"{name}.png") as picture:
            assert picture.width == figures.COLUMN_INCHES * figures.PNG_DPI
    assert ">default settings</text>" in (tmp_path / "figures" / "cloud-cleanclip.svg").read_text()
    assert dict(mpl.rcParams) == before
