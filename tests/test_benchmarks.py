"""Every benchmark runs at a tiny size and gives the figures that it promises."""

from __future__ import annotations

import contextlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import benchmarks.__main__ as command
from benchmarks import (
    board,
    campaign,
    choices,
    heads,
    objectives,
    overhead,
    pipeline,
    plan,
    stamps,
    training,
)
from benchmarks.common import (
    Figure,
    Figures,
    Process,
    Seconds,
    Session,
    interleaved,
    lines,
    median,
    ratio,
)
from grid.cli import main as grid_main
from grid.kit_base import Kit
from grid.measure import MeasureStage
from tests.grids import write_grid_file
from tests.test_distributed import all_objectives
from victims.corpora import Reader, Rows
from victims.models import Clip
from victims.picture_files import fit, open_picture
from victims.store import Store
from victims.training import Fit, Objective

# Objectives that no figure is for, each with why.
UNMEASURED = {
    "PlainClip": "the unit of the figures",
    "CrossEntropy": "the unit of the figures of image classifiers",
    "Adversarial": "fits a surrogate of an attack; no defense pays for it",
}
# Plans that train by plain objectives, if they train.
PLAIN = ("finetune", "local_outlier", "spectral_signatures", "anp")
# Variants that bring no objective, but another path of one.
PATHS = ("abd, pgd", "cgd, bank", "cgd, both sides")


def in_process(*arguments: str, expect: tuple[int, ...] = (0,)) -> Process:
    """The command ``grid`` without the seconds that another process needs for its imports."""
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as ended,
    ):
        grid_main(arguments)
    code = ended.value.code or 0
    assert code in expect, err.getvalue()
    return Process(Seconds(0.1, 0.1), int(code), out.getvalue(), err.getvalue())


def with_aims(figures: Figures) -> set[str]:
    assert all(np.isfinite(figure.value) for figure in figures.values())
    return {what for what, figure in figures.items() if figure.aim}


def test_an_aim_is_a_bound_that_a_figure_keeps_or_misses() -> None:
    fast, slow = (Figure(value=v, unit="x", at_least=2.2) for v in (2.2, 2.19))
    assert (fast.reached, slow.reached, fast.aim) == (True, False, ">= 2.2")
    soon, late = (Figure(value=v, unit="s", at_most=5) for v in (5.0, 5.1))
    assert (soon.reached, late.reached, soon.aim) == (True, False, "<= 5")
    assert Figure(value=1, unit="s").reached is None
    shown = lines("name", {"fast": fast, "slow": slow})
    assert shown[1].endswith("ok")
    assert shown[2].endswith("MISSED")


def test_a_ratio_compares_neighbours_and_shows_their_median() -> None:
    slow = [Seconds(9, 2), Seconds(9, 30), Seconds(9, 8)]
    fast = [Seconds(3, 1), Seconds(3, 10), Seconds(1, 4)]
    assert ratio(slow, fast) == 2  # of 2, 3 and 2, whatever a loaded round took
    assert ratio(slow, fast, "wall") == 3
    assert (median(slow), median(slow, "wall")) == (8, 9)


def test_contenders_take_turns_and_the_first_round_does_not_count() -> None:
    seen: list[str] = []
    found = interleaved({n: lambda n=n: lambda: seen.append(n) for n in ("a", "b")}, 2)  # type: ignore[misc]
    assert "".join(seen) == "baabba"
    assert {name: len(seconds) for name, seconds in found.items()} == {"a": 2, "b": 2}


def test_an_objective_is_held_against_what_its_passes_cost() -> None:
    shares = {"image_forward": 0.3, "image_both": 0.7, "text_forward": 0.05, "text_both": 0.2}
    shares["image_pixels"] = 0.4
    plain = objectives.Passes(1, 1, 1, 1)
    assert objectives.explained(plain, 0.0, shares) == 1
    twice = objectives.Passes(2, 2, 2, 2)
    assert objectives.explained(twice, 0.1, shares) == pytest.approx(1 + 0.7 + 0.2 + 0.1)
    frozen = objectives.Passes(2, 1, 1, 0)
    assert objectives.explained(frozen, 0.0, shares) == pytest.approx(1 + 0.3 - 0.2 + 0.05)
    pixels = objectives.Passes(4, 3, 1, 1, 2)
    assert objectives.explained(pixels, 0.0, shares) == pytest.approx(1 + 2 * 0.4 + 0.3)
    steps = [objectives.Step(16, frozen, whole, 0.0, 0.01) for whole in (1.0, 2.3, 9.0)]
    figures = objectives.figures_of("x", "Y", steps, lambda rows: shares)
    assert figures["x, Y: / explained"].value == pytest.approx(2.3 / 1.15)
    assert not figures["x, Y: / explained"].reached
    assert figures["x, Y: samples/s"].value == pytest.approx(1600)  # of the fit's own 16 rows


def test_an_objective_without_a_figure_is_an_error() -> None:
    plain = objectives.Passes(1, 1, 1, 1)
    two = [objectives.Step(16, plain, 1.0, 0.0, 0.01)] * 2
    for steps in ([], two, [*two, objectives.Step(8, plain, 1.0, 0.0, 0.01)]):
        with pytest.raises(RuntimeError, match=f"x: the fits of Y made {len(steps)} steps"):
            objectives.figures_of("x", "Y", steps, lambda rows: {})


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Kit:
    return Kit(tmp_path_factory.mktemp("kit"))


@pytest.mark.exhaustive
def test_objectives_follow_every_fit_of_a_plan(world: Kit) -> None:
    figures = objectives.main(quick=True, titles=("par",), kit=world)
    assert with_aims(figures) == {"par, Away: / explained"}
    assert 1 < figures["par, Away: explained"].value < 2


@pytest.mark.exhaustive
def test_passes_of_views_are_explained_once(world: Kit) -> None:
    steps = objectives.steps_of("abd, pgd", world, 1)["PatchedPairs"]
    assert {step.passes for step in steps} == {objectives.Passes(12, 11, 2, 1, 10)}
    assert {(step.rows, step.views) for step in steps} == {(64, 0.0)}


class OneStep(Fit):
    """A fit that ends after its first step."""

    def _choose_rows(self) -> Rows:
        rows = super()._choose_rows()[: self.recipe.batch_size]
        return rows[:0] if self.epoch else rows


@pytest.mark.exhaustive
def test_every_objective_of_the_defenses_is_measured(world: Kit) -> None:
    """A plan measures all objectives of its fits or fails: which these are needs no timing."""
    found: set[str] = set()

    def fit(model: Clip, view: Any, objective: Objective, *rest: Any, **more: Any) -> Fit:
        found.add(type(objective).__name__)
        return OneStep(model, view, objective, *rest, **more)

    for title in objectives.plans():
        if title not in PATHS:
            objectives.applied_with(fit, title, world, 1)
    known = {cls.__name__ for cls in all_objectives()}
    assert found - set(UNMEASURED) == known - set(UNMEASURED)


@pytest.mark.exhaustive
@pytest.mark.parametrize("title", objectives.plans())
def test_every_plan_has_its_figures(world: Kit, title: str) -> None:
    found = objectives.steps_of(title, world, 4)
    shares = dict.fromkeys(("image_both", "image_forward", "image_pixels"), 0.3)
    shares |= dict.fromkeys(("text_both", "text_forward"), 0.1)
    for kind, steps in found.items():
        assert objectives.figures_of(title, kind, steps, lambda rows: shares)
    assert found or title in PLAIN


def test_heads_are_compared_where_they_are_kept() -> None:
    found = heads.main(num_classes=26, rounds=1)
    assert with_aims(found) == {"class by class / in batches", "in batches / found in the store"}
    assert found["prompts"].value == 26 * 80
    with pytest.raises(ValueError, match="too few to be kept"):
        heads.main(num_classes=25)


def test_training_names_its_ratios() -> None:
    found = training.main(num_rows=64, epochs=1, rounds=1, pairs=2)
    assert with_aims(found) == {"ours / open_clip_train", "ours / bare step"}
    assert {f"{name} samples/s" for name in ("ours", "theirs", "lean", "decoded", "bare")} <= set(
        found
    )


@pytest.mark.exhaustive
def test_pipelines_read_the_same_files(monkeypatch: pytest.MonkeyPatch) -> None:
    found = pipeline.main(num_rows=128, rounds=1)
    assert with_aims(found) == {"ours / webdataset", "ours / csv"}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found = pipeline.main(num_rows=64, rounds=1)
    assert with_aims(found) == {"ours / csv"}
    assert "webdataset: left out, it is not installed" in found


def test_tars_and_table_hold_the_pairs_that_we_ingest(tmp_path: Path) -> None:
    files = pipeline.Files(tmp_path, 8)
    files.write()
    files.ingest()
    rows = [line.split("\t") for line in (tmp_path / "pairs.csv").read_text().splitlines()[1:]]
    assert [caption for _, caption in rows] == list(files.corpus.captions)
    packed: dict[str, bytes] = {}
    for shard in tmp_path.glob("*.tar"):
        with tarfile.open(shard) as tar:
            packed |= {m.name: tar.extractfile(m).read() for m in tar.getmembers()}  # type: ignore[union-attr]
    for row, (path, caption) in enumerate(rows):
        assert packed[f"{row:06d}.jpg"] == Path(path).read_bytes()
        assert packed[f"{row:06d}.txt"].decode() == caption
        assert np.array_equal(files.mapped[row], fit(open_picture(Path(path)), pipeline.SIZE))
    assert 10_000 < len(packed["000000.jpg"]) < 80_000, "about as large as a photograph"


def test_open_clip_train_reads_the_same_pairs() -> None:
    with training.arena(64, 1) as place:
        rows = [line.split("\t") for line in place.table.read_text().splitlines()]
        assert rows[0] == ["filepath", "title"]
        assert [caption for _, caption in rows[1:]] == list(place.corpus.captions)
        for row in (0, 63):
            image_HWC = np.asarray(Image.open(rows[1 + row][0]))
            assert np.array_equal(image_HWC.transpose(2, 0, 1), place.corpus.images_NCHW[row])


@pytest.mark.exhaustive
@pytest.mark.timeout(300)
def test_a_campaign_s_figures_have_their_aims() -> None:
    found = campaign.main(quick=True)
    assert with_aims(found) == {
        "all found in the store",
        "the same command again",
        "growth per 1,000 trials",
    }
    assert found["trials"].value == 6
    # No stage runs twice: what is left are the driver's own start and its searches' processes.
    assert found["all found in the store"].value < found["from nothing"].value


def test_overhead_names_its_ratio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overhead, "grid", in_process)
    found = overhead.main(name=str(write_grid_file(tmp_path)), executor="serial")
    assert with_aims(found) == {"the same command again"}
    assert found["stages run"].value > 5
    assert found["wall / lower bound"].value >= 1
    assert found["wall / lower bound"].value == pytest.approx(
        found["wall without Ray's start"].value / found["lower bound"].value
    )


def test_plan_counts_the_cells_it_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "grid", in_process)
    found = plan.main(attacks=2, rates=2, seeds=1, defenses=3, calls=1)
    assert found["cells"].value == 12
    assert found["rows"].value == 12 * 27
    assert with_aims(found) == {"grid run, finished"}


def test_a_grid_that_is_not_finished_is_no_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unfinished(*arguments: str, expect: tuple[int, ...] = (0,)) -> Process:
        return Process(Seconds(1, 1), 0, "", "all stages ran")

    monkeypatch.setattr(plan, "grid", unfinished)
    file = tmp_path / "some.yaml"
    file.write_text(plan.grid_text(1, 1, 1, 2))
    with pytest.raises(RuntimeError, match="did not find the grid finished"):
        plan._again(file, tmp_path, "run")


def test_board_reads_what_was_made_up_for_it() -> None:
    found = board.main(num_cells=30, calls=1)
    assert found["heavy modules imported"].value == 0
    assert found["rows, many rows"].value == 4 * found["rows, many cells"].value == 4 * 30 * 27
    assert with_aims(found) == {
        "heavy modules imported",
        "grid leaderboard, a small grid",
        "board in process, many cells",
        "board in process, many rows",
        "tiers, 10,000 draws, many cells",
        "tiers, 10,000 draws, many rows",
    }


def test_a_benchmark_that_breaks_is_named_and_the_others_run(tmp_path: Path) -> None:
    def broken() -> Figures:
        raise KeyError("nothing")

    session = Session()
    session.run("broken", broken)
    session.run("fine", lambda: {"some": Figure(value=3.0, unit="x", at_least=2)})
    session.write(tmp_path / "runs" / "found.json")
    body = json.loads((tmp_path / "runs" / "found.json").read_text())
    assert body["failures"] == {"broken": "KeyError: 'nothing'"}
    assert body["figures"]["fine"]["some"] == {
        "value": 3.0,
        "unit": "x",
        "aim": ">= 2",
        "ok": True,
    }
    assert {"processor", "cores", "versions", "commit"} <= set(body["machine"])


def test_the_command_runs_what_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("benchmarks.augment.main", lambda: {"a/s": 5.0, "a over loop": 2.0})
    path = tmp_path / "found.json"
    assert command.main(["augment", "--json", str(path)]) == 0
    found = json.loads(path.read_text())["figures"]
    assert {what: f["unit"] for what, f in found["augment"].items()} == {
        "a/s": "/s",
        "a over loop": "x",
    }
    assert "augment (load " in capsys.readouterr().out
    with pytest.raises(SystemExit):
        command.main(["speed"])
    assert "no benchmark called 'speed'" in capsys.readouterr().err


def test_choices_read_clean_accuracy_of_the_tuning_split_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """No trigger's success and no report picture is in sight; the victim is not poisoned."""
    made: list[Any] = []

    class Metrics:
        def __getitem__(self, name: str) -> dict[str, float]:
            assert name == "clean_top1"
            return {"value": 0.9, "n": 100}

    def read(store: Store, stage: MeasureStage) -> dict[str, Any]:
        return {"sets": {"tuning": {"metrics": Metrics()}}}

    monkeypatch.setattr(choices, "_make", lambda store, stage: made.append(stage))
    monkeypatch.setattr(choices, "read_measure", read)
    chosen = choices.main("demo", str(tmp_path))
    assert set(chosen) == {"finetune", "cleanclip", "roclip"}
    assert len(made) == sum(map(len, choices.candidates().values()))
    assert {stage.reader for stage in made} == {Reader.TUNING}
    assert {stage.defended.poisoned for stage in made} == {None}


def test_poisoning_copies_nothing_of_the_corpus() -> None:
    found = stamps.poisoning(20_000)
    assert found["poisoning 20,000 rows"].value > 0
    assert found["poisoning 20,000 rows: memory over the corpus"].at_most == 0.1


@pytest.mark.exhaustive
def test_every_stamp_is_timed_against_its_own_slow_form() -> None:
    forms = stamps.slow_forms()
    found = stamps.stamps(2, 1)
    names = {name.split()[0] for name in found}
    assert {"badnet", "wanet", "ssba", "badclip", "adaptive_patch"} <= names
    assert {"patch", "mix", "wave", "warp", "stripes", "glaze", "tiles", "marks"} <= set(forms)
    assert "ssba 224px over itself, one by one" in found
    assert "wanet 224px over numpy, one by one" in found
