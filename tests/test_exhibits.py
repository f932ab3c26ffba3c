"""Exhibits: what a measurement keeps to be looked at, from the store to figures and the report."""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from analysis import NothingToDraw, Results
from analysis.drawing import attack_figures, figures_of
from analysis.exhibits import features, fits, pictures, rocs
from analysis.leaderboard import Asked
from analysis.reader import Answer, Tables, read_tables
from analysis.report import write_report
from grid.schema.errors import ResultsError
from tests.finished import Finished
from tests.grids import OPEN_GATE, environment, run_serial, tiny_grid
from victims.errors import UsageError
from victims.exhibits import Exhibits, Projection, chosen_rows, png, project, roc
from victims.measuring import separation
from victims.world import CLASSES

ATTACKS = [
    {"badnet": {"patch": 6, "cell": 2, "levels": 2, "place": "corner"}},
    {"sig": {"delta": 40, "cycles": 4}},
]
KINDS = ("pictures", "features", "rocs", "fits")


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two attacks that kept exhibits."""
    folder = tmp_path_factory.mktemp("shown")
    grid = tiny_grid(
        folder,
        attacks=ATTACKS,
        defenses=["none", "finetune", "local_outlier", "clean_model"],
        gate={"strong": OPEN_GATE, "medium": OPEN_GATE, "init_loss": 1},
        evaluate={"exhibits": {"rows": 12, "pictures": 2}},
    )
    run_serial(grid, folder / "out", folder / "store")
    return folder / "out"


def test_nothing_is_kept_unasked_and_no_number_changes(shown: Path, finished: Finished) -> None:
    asked = Results(shown).sql(
        "SELECT rate, defense, metric, value FROM newest WHERE attack = 'badnet'"
        " AND defense IN ('none', 'finetune') AND value IS NOT NULL ORDER BY ALL"
    )
    plain = Results(finished.out).sql(
        "SELECT rate, defense, metric, value FROM newest WHERE value IS NOT NULL ORDER BY ALL"
    )
    assert len(plain) > 20
    assert asked.equals(plain)
    for kind in KINDS:
        assert Results(finished.out).sql(f"SELECT count(*) AS n FROM {kind}")["n"][0] == 0  # noqa: S608
    with pytest.raises(ResultsError, match=r"evaluate: \{exhibits: true\}"):
        Results(finished.out).board().features("badnet")
    with pytest.raises(ResultsError, match=r"evaluate: \{exhibits: true\}"):
        Results(finished.out).board().detection()


def test_of_every_attack_one_victim_is_shown(shown: Path) -> None:
    found = read_tables(shown, features)
    assert set(found["model"]) == {"victim", "finetune", "local_outlier", "clean_model"}
    kinds = found[(found["attack"] == "sig") & (found["model"] == "victim")]["kind"]
    assert list(kinds).count("clean") == list(kinds).count("triggered") == 12
    assert "target" in set(kinds)
    stamped = read_tables(shown, pictures)
    assert [picture.attack for picture in stamped] == ["badnet", "badnet", "sig", "sig"]
    assert all(picture.words in CLASSES for picture in stamped)
    for picture in stamped:
        assert picture.clean.shape == picture.triggered.shape == (32, 32, 3)
        assert (picture.clean != picture.triggered).any()
    corner = stamped[0].clean != stamped[0].triggered
    assert not corner[:26].any(), "the patch of six pixels is in the lower right corner alone"
    assert not corner[:, :26].any()


def test_curves_are_those_of_the_store_and_of_the_board(shown: Path) -> None:
    found = read_tables(shown, fits)
    assert set(found["stage"]) == {"victim", "finetune", "local_outlier"}, "clean_model fits none"
    assert set(found["name"]) >= {"clip", "lr", "scale"}
    curve = read_tables(shown, rocs)
    assert set(curve["defense"]) == {"local_outlier"}
    told = Results(shown).sql(
        "SELECT attack, value FROM newest WHERE metric = 'found_auroc' AND rate > 0"
        " AND defense = 'local_outlier'"
    )
    areas = dict(zip(told["attack"], told["value"], strict=True))
    for attack, points in curve.groupby("attack"):
        assert set(points["auroc"]) == {areas[attack]}
        x, y = points["false_positive"].to_numpy(), points["true_positive"].to_numpy()
        area = float(((x[1:] - x[:-1]) * (y[1:] + y[:-1]) / 2).sum())
        assert area == pytest.approx(areas[attack])


def test_they_are_drawn(shown: Path, tmp_path: Path) -> None:
    board = Results(shown).board()
    for drawing in (
        board.pictures("sig"),
        board.features("sig"),
        board.detection(),
    ):
        assert drawing._repr_png_().startswith(b"\x89PNG")
    with pytest.raises(NothingToDraw, match="none of 3 fits recorded a second epoch"):
        board.training("sig")
    with pytest.raises(UsageError, match=r"no attack with exhibits called 'sg'.*'sig'"):
        board.pictures("sg")
    page = write_report(shown, tmp_path / "report.html", Asked()).read_text()
    for words in (
        "badnet: Pictures of",
        "sig: Image features",
        "Telling",
    ):
        assert f'alt="{words}' in page
    assert "evaluate: {exhibits" not in page


def test_rows_are_the_same_for_every_model_and_leave_out_the_target() -> None:
    labels = np.arange(400) % 20
    others, own = chosen_rows(labels, 3, 40)
    assert not (labels[others] == 3).any()
    assert (labels[own] == 3).all()
    assert len(others) == len(set(others.tolist())) == 40
    assert len(own) == 10
    assert len(set(labels[others].tolist())) > 10, "not the first classes of a sorted set"


def test_two_coordinates_are_the_first_two_of_a_principal_component_analysis() -> None:
    feature_ND = np.random.default_rng(0).normal(size=(50, 8)) * np.arange(8, 0, -1)
    found_N2 = project(feature_ND, Projection.PCA)
    values, vectors = np.linalg.eigh(np.cov(feature_ND.T))
    for place in (0, 1):
        axis = vectors[:, np.argsort(values)[-1 - place]]
        expected = (feature_ND - feature_ND.mean(0)) @ (axis * np.sign(axis[np.abs(axis).argmax()]))
        assert found_N2[:, place] == pytest.approx(expected)
    neighbours_N2 = project(feature_ND, Projection.TSNE)
    assert neighbours_N2.shape == (50, 2)
    assert np.isfinite(neighbours_N2).all()
    assert (project(feature_ND[:3, :1], Projection.PCA)[:, 1] == 0).all(), "one dimension"


def test_a_roc_keeps_its_area_when_it_is_thinned() -> None:
    random = np.random.default_rng(1)
    poisoned = random.random(20_000) < 0.01
    suspicion = random.normal(size=20_000) + 2 * poisoned
    suspicion[:50] = np.nan
    curve = roc(suspicion, poisoned)
    assert curve is not None
    assert len(curve.false_positive) <= 205
    assert (curve.false_positive[0], curve.true_positive[0]) == (0, 0)
    assert (curve.false_positive[-1], curve.true_positive[-1]) == (1, 1)
    area = float(np.trapezoid(curve.true_positive, curve.false_positive))
    expected = separation(suspicion, poisoned)["auroc"].as_dict()["value"]
    assert area == pytest.approx(expected, abs=2e-3)
    assert roc(suspicion, np.zeros_like(poisoned)) is None


def test_ties_pass_a_threshold_together() -> None:
    curve = roc(np.array([1.0, 1.0, 0.0, 0.0]), np.array([True, False, True, False]))
    assert curve is not None
    assert curve.false_positive.tolist() == [0, 0.5, 1]
    assert curve.true_positive.tolist() == [0, 0.5, 1]


def test_pictures_are_kept_to_the_byte() -> None:
    image: Tensor = torch.arange(3 * 8 * 8).reshape(3, 8, 8).to(torch.uint8)
    with Image.open(io.BytesIO(png(image.numpy()))) as opened:
        assert (np.asarray(opened).transpose(2, 0, 1) == image.numpy()).all()


@pytest.mark.parametrize(("field", "value"), [("rows", 2), ("pictures", -1)])
def test_too_few_are_refused(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=field):
        Exhibits(**{field: value})  # type: ignore[arg-type]


def test_sql_can_ask_about_pictures(shown: Path) -> None:
    def ask(tables: Tables) -> Answer:
        return tables.sql("SELECT octet_length(clean) AS n FROM pictures LIMIT 1")

    assert read_tables(shown, ask).rows[0][0] > 100


@pytest.mark.exhaustive
def test_the_example_of_the_documents_runs(shown: Path, tmp_path: Path) -> None:
    text = (Path(__file__).parent.parent / "docs" / "boards.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    code = code.replace("cleanclip", "local_outlier")
    # Fits of one epoch have no curve, and attacks that took in none have no lift to remove.
    for none in (', board.training("badnet")', ", board.cost()"):
        assert none in code
        code = code.replace(none, "")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo").symlink_to(shown)
    ended = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment(),
        check=True,
        capture_output=True,
        text=True,
    )
    assert "that takes two victim seeds" in ended.stdout


def test_nothing_to_draw_has_one_cause(shown: Path, tmp_path: Path, finished: Finished) -> None:
    """A run that kept exhibits, none of them scores, is not told to keep exhibits."""
    with pytest.raises(NothingToDraw, match=r"evaluate: \{exhibits: true\}") as none:
        Results(finished.out).board().detection()
    shutil.copytree(shown, tmp_path / "without")
    shutil.rmtree(tmp_path / "without" / "rocs")
    with pytest.raises(NothingToDraw, match="No defense of this board") as no_scores:
        Results(tmp_path / "without").board().detection()
    with pytest.raises(NothingToDraw, match="two victim seeds"):
        Results(shown).board().ranks()
    assert "gives the rows" not in str(none.value)
    assert "exhibits" not in str(no_scores.value)


def test_figures_say_what_they_show(shown: Path) -> None:
    by_attack = read_tables(shown, attack_figures)
    name = "badnet, 10 % (6 rows), target circle"
    for kind in ("gallery", "feature_map"):
        said = by_attack["badnet"][kind]().get_suptitle()
        assert name in said
        assert said.endswith("victim seed 0")
    board = figures_of(shown, Asked())
    assert board["heat_map"]().get_suptitle().endswith("report set, 1 victim seed")
    assert board["detection"]().get_suptitle().endswith("report set, one victim an attack")
