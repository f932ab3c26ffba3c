"""Campaigns: what is read from their records, the numbers that follow, and the table."""

from __future__ import annotations

import csv
import io
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.campaign_render import CampaignLine, campaign_lines, notes, render_campaign
from analysis.campaigns import CampaignBoard, SearchResult, load_campaign
from analysis.importance import encode, forest_importance, importance
from analysis.reader import Tables
from analysis.stats import Point, hypervolume, pareto_front
from grid.cli import main
from grid.schema.errors import ResultsError, SchemaError
from grid.schema.writing import write_table
from tests.rows import EPOCH, trial_row
from tests.trials import VICTIM_CA, campaign_file, search_records, write_campaign

POINTS = st.lists(st.builds(Point, st.floats(0, 1), st.floats(0, 1)), max_size=12)
BOX = (Point(0.0, 0.0), Point(1.0, 1.0))


def finished(number: int = 0, **more: Any) -> dict[str, Any]:
    """The end of a trial that went well."""
    numbers = {"ca": 0.6, "ca_loss": 0.01, "worst_asr": 0.4, "score": 0.4, "is_feasible": True}
    return trial_row(number, **{**numbers, "device_seconds": 2.0, **more})


def square(number: int, cell: int, attack: str, **more: Any) -> dict[str, Any]:
    """The end of one cell of a trial."""
    victim = {"victim_clean": 0.61, "victim_asr": 0.99, "clean_top1": 0.6, "asr_top1": 0.4}
    about = {"cell": cell, "attack": attack, "rate_text": "0.01", "seed": 0}
    return trial_row(number, "cell", **{**about, **victim, "device_seconds": 1.0, **more})


def board_of(
    folder: Path, records: Sequence[dict[str, Any]], file: dict[str, Any] | None = None
) -> CampaignBoard:
    write_table(folder, "trials", records)
    if file is not None:
        (folder / "campaign.json").write_text(json.dumps(file))
    return load_campaign(folder)


def only(searches: Sequence[SearchResult]) -> SearchResult:
    assert len(searches) == 1
    return searches[0]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two defenses x two objectives x 12 trials; nothing in here changes it."""
    return write_campaign(tmp_path_factory.mktemp("campaign") / "tune-demo")


# Pure functions.


def test_a_front_by_hand() -> None:
    points = [Point(1, 5), Point(3, 3), Point(2, 2), Point(5, 1), Point(3, 2), Point(3, 3)]
    assert pareto_front(points) == [3, 1, 5, 0]
    assert pareto_front([]) == []


@given(POINTS)
def test_a_front_holds_what_nothing_dominates(points: list[Point]) -> None:
    def dominates(a: Point, b: Point) -> bool:
        return a.x >= b.x and a.y >= b.y and a != b

    front = pareto_front(points)
    free = {i for i, p in enumerate(points) if not any(dominates(q, p) for q in points)}
    assert set(front) == free
    assert len(front) == len(free)
    xs = [points[i].x for i in front]
    assert xs == sorted(xs, reverse=True)


def test_hypervolume_by_hand() -> None:
    """CA of 60 undefended: 3 points x 0.9 and 1.5 more x 0.5, of a box of 5 x 1."""
    box = Point(55, 0), Point(60, 1)
    assert hypervolume([Point(58, 0.9), Point(59.5, 0.5)], *box) == pytest.approx(3.45 / 5)
    assert hypervolume([Point(50, 0.9), Point(58, 0)], *box) == 0
    assert hypervolume([Point(61, 1)], *box) == 1
    with pytest.raises(ValueError, match="best above reference"):
        hypervolume([], Point(60, 0), Point(60, 1))


@given(POINTS)
@settings(max_examples=50, deadline=None)
def test_hypervolume_is_the_area_below_the_points(points: list[Point]) -> None:
    """The sum over the strips between neighbouring x of the highest y that reaches there."""
    xs = sorted({0.0, *(p.x for p in points)})
    area = math.fsum(
        (right - left) * max((p.y for p in points if p.x >= right), default=0.0)
        for left, right in pairwise(xs)
    )
    assert hypervolume(points, *BOX) == pytest.approx(area, abs=1e-12)


@given(POINTS, st.builds(Point, st.floats(-1, 2), st.floats(-1, 2)))
def test_one_trial_more_never_shrinks_the_hypervolume(points: list[Point], more: Point) -> None:
    before, after = hypervolume(points, *BOX), hypervolume([*points, more], *BOX)
    assert 0 <= before <= after + 1e-12
    assert after <= 1 + 1e-12


def test_settings_are_encoded_by_their_order() -> None:
    names, table = encode(
        [
            {"lr": 1e-3, "schedule": "cosine", "same": 1, "late": True},
            {"lr": 1e-5, "schedule": "constant", "same": 1, "late": False, "layers": [2, 1]},
            {"lr": 3e-2, "schedule": None, "same": 1, "late": True, "layers": [1]},
        ]
    )
    assert names == ["lr", "schedule", "late", "layers"]
    assert table == [[1, 2, 1, 0], [0, 1, 0, 2], [2, 0, 1, 1]]


def test_importance_finds_the_setting_that_matters() -> None:
    given_ = [{"lr": i, "noise": (7 * i) % 5, "fixed": 3} for i in range(24)]
    found = forest_importance(given_, [0.1 * i for i in range(24)], "score")
    assert [bar.setting for bar in found.bars] == ["lr", "noise"]
    assert found.bars[0].fall > 5 * abs(found.bars[1].fall)
    assert found.fit_r2 is not None
    assert found.fit_r2 > 0.8
    assert found.is_telling
    assert forest_importance(given_, [0.1 * i for i in range(24)], "score") == found


@pytest.mark.parametrize(
    ("settings_", "values", "why"),
    [
        ([{"lr": i} for i in range(7)], [float(i) for i in range(7)], "7 complete trials, 8 neede"),
        ([{"lr": 1}] * 9, [float(i) for i in range(9)], "no setting varied"),
        ([{"lr": i} for i in range(9)], [0.5] * 9, "ca is the same in all trials"),
        ([], [], "0 complete trials"),
    ],
)
def test_importance_is_refused_in_words(
    settings_: list[dict[str, Any]], values: list[float], why: str
) -> None:
    found = forest_importance(settings_, values, "ca")
    assert found.bars == []
    assert why in found.words
    assert not found.is_telling


def test_a_forest_that_learnt_nothing_says_so() -> None:
    noise = [((37 * i) % 11) / 11 for i in range(12)]
    found = forest_importance([{"lr": i} for i in range(12)], noise, "score")
    assert found.fit_r2 is not None
    assert not found.is_telling


# What is read.


def test_the_newest_record_of_a_trial_counts(tmp_path: Path) -> None:
    late = EPOCH + timedelta(minutes=5)
    epoch = trial_row(1, "epoch", cell=0, epoch=1, attack="badnet")
    board = board_of(
        tmp_path,
        [
            finished(0, worst_asr=0.9),
            finished(1, worst_asr=0.2, written_at=late),
            finished(1, worst_asr=0.7),
            {**epoch, "clean_top1": 0.5, "asr_top1": 0.5},
            {**epoch, "clean_top1": 0.6, "asr_top1": 0.3, "written_at": late},
        ],
    )
    search = only(board.searches)
    assert [trial.worst_asr for trial in search.trials] == [0.9, 0.2]
    assert search.trials[1].epochs == [(1, 0.6, 0.3, 1)]


def test_a_trial_without_an_end_is_running_and_costs_what_its_cells_did(tmp_path: Path) -> None:
    board = board_of(tmp_path, [finished(0), square(1, 0, "badnet"), square(1, 1, "blended")])
    search = only(board.searches)
    assert (search.num_trials, search.num_running) == (1, 1), "the default settings are no trial"
    assert search.trials[1].ca is None
    assert search.device_seconds == 2.0
    assert [place for place, _ in search.hypervolumes()] == [0]
    assert search.hypervolumes()[0][1] == pytest.approx(0.8 * 0.6)


def test_a_curve_is_over_the_cells_that_a_trial_began(tmp_path: Path) -> None:
    """Two seeds of one attack and one of another: means inside an attack, then the worst."""

    def epoch(cell: int, attack: str, epoch: int, clean: float, asr: float) -> dict[str, Any]:
        about = {"cell": cell, "attack": attack, "epoch": epoch}
        return trial_row(0, "epoch", **about, clean_top1=clean, asr_top1=asr)

    records = [
        *(epoch(0, "badnet", e, 0.6, 0.8) for e in (1, 2, 3)),
        *(epoch(1, "badnet", e, 0.5, 0.4) for e in (1, 2)),
        *(epoch(2, "blended", e, 0.7, 0.5 + 0.2 * (e - 1)) for e in (1, 2)),
    ]
    (trial,) = only(board_of(tmp_path, records).searches).trials
    assert [(e.epoch, e.num_cells) for e in trial.epochs] == [(1, 3), (2, 3)]
    assert [e.ca for e in trial.epochs] == pytest.approx([0.6, 0.6])
    assert [e.worst_asr for e in trial.epochs] == pytest.approx([0.6, 0.7])


def test_default_choice_counts_and_seconds(demo: Path) -> None:
    board = load_campaign(demo)
    assert list(board.defenses) == ["cleanclip", "finetune"]
    assert board.objectives == ["tuned", "clean-only"]
    assert board.warnings == []
    file = json.loads((demo / "campaign.json").read_text())
    for search, told in zip(board.searches, file["searches"], strict=True):
        assert search.default is not None
        assert search.default.number == 0
        assert search.is_final
        assert search.chosen is not None
        assert search.chosen.key == told["chosen"]
        assert (search.num_trials, search.num_stopped, search.num_failed) == (12, 2, 1)
        assert search.device_seconds == pytest.approx(told["device_seconds"])
        assert len(search.complete) == 9
        assert search.undefended is not None
        assert search.undefended == pytest.approx((VICTIM_CA, 0.99))
        assert len(search.trials[3].epochs) == 3
        assert search.trials[3].reason == "below the median after 3 epochs"
        shares = [share for _, share in search.hypervolumes()]
        assert shares == sorted(shares)
        assert len(shares) == 12


def test_a_stopped_trial_is_on_no_front(tmp_path: Path) -> None:
    stopped = finished(1, status="stopped", ca=0.7, worst_asr=0.0, score=0.0)
    search = only(board_of(tmp_path, [finished(0), stopped]).searches)
    assert [trial.number for trial in search.front()] == [0]
    assert search.chosen is not None
    assert search.chosen.number == 0


def test_before_the_end_the_best_so_far_stands_for_the_choice(tmp_path: Path) -> None:
    records = [
        finished(0, score=0.4),
        finished(1, score=2.2, is_feasible=False),
        finished(2, score=0.3, worst_asr=0.3),
    ]
    board = board_of(tmp_path, records)
    assert "not there, so what was chosen" in board.warnings[0]
    line = campaign_lines(board)[1]
    assert (line.number, line.chosen_as, line.sees) == (2, "best so far", None)
    assert "tuned, best so far" in render_campaign(board)
    nothing = {**campaign_file([], 8), "searches": [{"search": "search-0", "chosen": None}]}
    line = campaign_lines(board_of(tmp_path, [finished(3, score=0.1)], nothing))[1]
    assert (line.number, line.ca) == (None, None), "it ended without a choice"


def test_a_score_that_is_no_number_is_not_chosen(tmp_path: Path) -> None:
    board = board_of(tmp_path, [finished(0, score=float("nan")), finished(1, score=0.3)])
    assert campaign_lines(board)[1].number == 1
    trials = json.loads(render_campaign(board, "json"))["searches"][0]["trials"]
    assert [trial["score"] for trial in trials] == [None, 0.3]


def test_the_command_of_the_held_out_grid_is_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    board = board_of(tmp_path / "runs" / "tune", [finished(0)])
    monkeypatch.chdir(tmp_path)
    assert "`grid run runs/tune/held-out.yaml`" in notes(board)[1]


def test_before_any_trial_the_defaults_are_the_best_so_far(tmp_path: Path) -> None:
    board = board_of(tmp_path, [finished(0, is_feasible=False)])
    default, tuned = campaign_lines(board)
    assert (default.is_feasible, default.ca) == (False, 0.6)
    assert (tuned.chosen_as, tuned.ca, tuned.num_trials) == ("best so far", 0.6, 0)


def test_an_older_search_for_the_same_is_left_out_aloud(tmp_path: Path) -> None:
    late = EPOCH + timedelta(hours=1)
    records = [finished(1, search="old"), finished(1, search="new", written_at=late, ca=0.5)]
    board = board_of(tmp_path, records)
    assert only(board.searches).key == "new"
    assert "cleanclip, tuned: 1 trials of an earlier search (old) left out" in board.warnings[1]
    told = [{"search": "old", "defense": "cleanclip", "objective": "tuned", "chosen": "trial-0"}]
    board = board_of(tmp_path, records, campaign_file(told, 1))
    assert only(board.searches).key == "old"


def test_a_search_that_the_file_does_not_know_yet_comes_last(tmp_path: Path) -> None:
    known, fresh = (search_records("cleanclip", o, 4, 0) for o in ("tuned", "clean-only"))
    board = board_of(tmp_path, fresh.records + known.records, campaign_file([known.told], 4))
    assert board.objectives == ["tuned", "clean-only"]
    assert [search.is_final for search in board.searches] == [True, False]


def test_settings_tried_twice_are_counted_as_the_search_counted_them(tmp_path: Path) -> None:
    told = {"search": "search-0", "defense": "cleanclip", "objective": "tuned", "trials": 3}
    board = board_of(tmp_path, [finished(0), finished(1)], campaign_file([told], 3))
    assert only(board.searches).num_trials == 3


# The table.


def lines_of(folder: Path) -> dict[tuple[str, str], CampaignLine]:
    return {(n.defense, n.objective): n for n in campaign_lines(load_campaign(folder))}


def test_the_table_has_the_default_then_each_choice(demo: Path) -> None:
    text = render_campaign(load_campaign(demo), "table", 100)
    assert max(map(len, text.splitlines())) <= 100
    body = text[text.index("cleanclip") :].splitlines()[:8]
    first = [line.split()[0] for line in body]
    searches = ["default", "tuned", "clean-only"]
    assert first == ["cleanclip", *searches, "finetune", *searches]
    tuned = lines_of(demo)["cleanclip", "tuned"]
    assert tuned.worst_asr is not None
    shown = next(line for line in text.splitlines() if line.startswith("  tuned"))
    assert f"{100 * tuned.worst_asr:.1f}" in shown.split()
    assert "12 (2, 1)" in shown
    assert "yes" in shown.split()
    words = " ".join(text.split())
    assert "These are numbers of the tuning split" in words
    assert f"grid run {demo.resolve()}/held-out.yaml" in "".join(words.replace("` ", "`"))
    assert "Budget of every search: 12 trials. Equal: each has tried 12." in words
    assert "undefended: CA 60.2 %, worst ASR 99.0 %" in words
    assert "Settings of cleanclip@tune-demo (tuned, trial" in words
    assert "Named" not in text
    assert "Named" in render_campaign(load_campaign(demo), "table", 130)
    assert "\x1b" not in text
    assert "\x1b[" in render_campaign(load_campaign(demo), "table", 100, color=True)


def test_an_oracle_is_marked_and_stands_apart(tmp_path: Path) -> None:
    folder = write_campaign(tmp_path, ["cleanclip"], ["tuned", "oracle"], 4)
    board = load_campaign(folder)
    text = render_campaign(board, "table", 100)
    row = next(line for line in text.splitlines() if "oracle (ORACLE)" in line)
    assert row.split()[-4:] == ["4", "(1,", "0)", "8.1"]
    assert "oracle (ORACLE)" in text
    assert "default, on held-out attacks" in text
    assert "! oracle is an oracle" in text
    assert "measured on held-out attacks sig" in " ".join(text.split())
    assert [line.is_oracle for line in campaign_lines(board)] == [False, False, False, True]
    assert board.searches[1].label == "oracle"


def test_unequal_budgets_are_said(tmp_path: Path) -> None:
    few, many = (
        search_records("cleanclip", "tuned", 4, 0),
        search_records("finetune", "tuned", 5, 0),
    )
    records, told = few.records + many.records, [few.told, many.told]
    board = board_of(tmp_path, records, campaign_file(told, 5))
    said = "SHORT of it, and NOT EQUAL in what they could find: they have tried 4 to 5 (cleanclip"
    assert any(said in note for note in notes(board))
    file = {**campaign_file(told, 5), "budget": {"device_hours": 0.5}}
    board = board_of(tmp_path, records, file)
    budget = next(n for n in notes(board) if n.startswith("Budget"))
    assert budget == (
        "Budget of every search: 0.5 device hours. Within it they have tried 4 to 5 settings."
    )


def test_markdown_csv_and_json_hold_every_line(demo: Path) -> None:
    board = load_campaign(demo)
    assert render_campaign(board, "md").count("\n| cleanclip |") == 3
    table = list(csv.DictReader(io.StringIO(render_campaign(board, "csv"))))
    assert len(table) == 6
    assert json.loads(table[1]["settings"])["recipe.lr"] > 0
    assert table[0]["num_trials"] == ""
    document = json.loads(render_campaign(board, "json"))
    assert [line["objective"] for line in document["lines"][:3]] == [
        *("default", "tuned", "clean-only")
    ]
    tuned = document["searches"][0]
    assert len(tuned["trials"]) == len(tuned["hypervolumes"]) == 12
    assert tuned["undefended"]["ca"] == pytest.approx(VICTIM_CA)
    assert tuned["trials"][0]["epochs"][0]["epoch"] == 1
    with pytest.raises(ResultsError, match="There are: table, md, csv, json"):
        render_campaign(board, "pdf")


# Directories in trouble.


def test_no_trials_say_what_to_do(tmp_path: Path, demo: Path) -> None:
    with pytest.raises(ResultsError, match=r"there is no such directory.*grid tune"):
        load_campaign(tmp_path / "nowhere")
    with pytest.raises(ResultsError, match=r"no trials/\*.parquet"):
        load_campaign(tmp_path)
    (tmp_path / "campaign.json").write_text("{}")
    with pytest.raises(ResultsError, match="none has been recorded yet"):
        load_campaign(tmp_path)
    with pytest.raises(ResultsError, match="Campaigns beside it: tune-demo"):
        load_campaign(demo.parent / "tune")
    with pytest.raises(ResultsError, match="grid leaderboard --campaign"):
        Tables(demo)


def test_broken_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "trials").mkdir()
    (tmp_path / "trials" / "cut.parquet").write_bytes(b"PAR1")
    with pytest.raises(ResultsError, match=r"hold none that can be read.*cut.parquet: skipped"):
        load_campaign(tmp_path)
    write_table(tmp_path, "trials", [finished(0)])
    (tmp_path / "campaign.json").write_text("{")
    assert "campaign.json: skipped, cannot be read" in load_campaign(tmp_path).warnings[1]
    (tmp_path / "campaign.json").write_text('{"schema_version": 2}')
    with pytest.raises(SchemaError, match="results schema 2"):
        load_campaign(tmp_path)


def test_sql_reads_trials_and_curves(demo: Path) -> None:
    results = Tables(demo, of="trials")
    sql = "SELECT count(*) FROM newest_trials WHERE record = 'trial' AND status = 'stopped'"
    assert results.sql(sql).rows == [(8,)]
    assert results.sql("SELECT count(*) FROM curves WHERE epoch = 1").rows == [(48,)]


# The command.


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert isinstance(ended.value.code, int)
    return ended.value.code, captured.out, captured.err


def test_the_command_takes_a_folder_or_a_name(
    demo: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, _ = call(capsys, "leaderboard", "--campaign", demo, "--format", "json")
    assert code == 0
    assert len(json.loads(out)["lines"]) == 6
    monkeypatch.setenv("GRID_HOME", str(demo.parent))
    code, out, _ = call(capsys, "leaderboard", demo.name, "--campaign")
    assert code == 0
    assert "cleanclip@tune-demo" in out
    code, _, err = call(capsys, "leaderboard", "--campaign")
    assert code == 2
    assert f"In {demo.parent}: tune-demo" in err


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        (["--campaign", "--published"], "leave out --set and --published"),
        (["--campaign", "--set", "shifted"], "leave out --set and --published"),
    ],
)
def test_options_that_mean_nothing_together(
    demo: Path, capsys: pytest.CaptureFixture[str], extra: list[str], says: str
) -> None:
    code, _, err = call(capsys, "leaderboard", demo, *extra)
    assert code == 2
    assert says in err


def test_a_campaigns_board_imports_nothing_heavy(demo: Path) -> None:
    code = (
        "import sys\nfrom grid.cli import main\n"
        "try:\n    main(['leaderboard', '--campaign', sys.argv[1]])\n"
        "finally:\n    print('HEAVY', sorted({'torch', 'ray', 'sklearn', 'seaborn', 'numpy'}"
        " & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(demo)], capture_output=True, text=True, check=False
    )
    assert done.stdout.endswith("HEAVY []\n"), done.stderr
    assert "cleanclip@tune-demo" in done.stdout


def test_importance_of_a_search_leaves_out_what_has_no_number(demo: Path) -> None:
    search = load_campaign(demo).searches[0]
    assert importance(search, "ca").num_trials == 8, "without the defaults, which were not drawn"
    bare = SearchResult(defense="d", objective="o", key="k", sees=None)
    assert importance(bare, "score").refusal == "0 complete trials, 8 needed"
