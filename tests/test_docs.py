"""The documents: links lead somewhere, and a board in them is as a run left it."""

from __future__ import annotations

import json
import re
import shutil
import socket
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import benchmarks.__main__ as command
from benchmarks.common import Figure
from docs import scale_tables, tables
from docs.recipe_table import recipe_fields
from docs.tables import ROOT
from grid.gridfile import load_grid
from grid.schema.writing import write_grid, write_rows, write_table
from tests.rows import EPOCH, cell_columns, cell_rows
from victims.recipe import ClassifierRecipe, Recipe

DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"!?\[[^\]]*\]\(<?([^)\s>]+)[^)]*\)|(?:src|href)=\"([^\"]+)\"")
FENCE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)


def links(text: str) -> list[str]:
    """Every relative link and picture of a document, without the place in the file."""
    found = [first or second for first, second in LINK.findall(FENCE.sub("", text))]
    relative = [link for link in found if not re.match(r"[a-z]+:|#", link)]
    return [link.partition("#")[0] for link in relative]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_relative_link_and_picture_is_there(document: Path) -> None:
    text = tables.filled(document.read_text(), document.name)
    assert [link for link in links(text) if not (document.parent / link).exists()] == []
    assert links(text) or document.name != "README.md"


def test_every_key_of_a_grid_file_is_told() -> None:
    from dataclasses import fields

    from grid.evaluate import Evaluate
    from grid.execution import Execution
    from grid.gate import Gate
    from grid.gridfile import _File

    text = (ROOT / "docs" / "grid-files.md").read_text()
    written = tables.MARK.sub("", text)  # the fields of a recipe are told below, by themselves
    rows = [line for line in written.splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert named == {field.name for field in fields(_File)}
    for kind in (Gate, Evaluate, Execution):
        assert [f.name for f in fields(kind) if f.name not in text] == []


SQL = re.compile(r'grid sql "([^"]+)"|\.sql\("([^"]+)"\)')


def test_every_sql_in_the_documents_runs_and_leaves_invalid_victims_out(tmp_path: Path) -> None:
    from analysis.query import run_sql
    from tests.boards import steady, write_board

    failed = {("none", "sig", "0.01", s): "invalid_victim" for s in (0, 1, 2)}
    asr = {"none": lambda attack, *_: 0.1 if attack == "sig" else 0.9, "finetune": steady(0.4)}
    write_board(tmp_path, asr, attacks=("badnet", "sig"), rates=("0.01",), status=failed)
    texts = {path.name: path.read_text() for path in DOCUMENTS}
    queries = {
        (name, first or second)
        for name, text in texts.items()
        for first, second in SQL.findall(text)
        if "..." not in first
    }
    assert "boards.md" in {name for name, _ in queries}
    for _, query in queries:
        assert run_sql(tmp_path, query)[0].rows
    (means,) = [query for name, query in queries if name == "boards.md"]
    assert dict(run_sql(tmp_path, means)[0].rows)["none"] == pytest.approx(0.9)


def test_links_are_found() -> None:
    text = '[a](b.md#c) ![p](d/e.png "t") [x](https://x.y) [h](#h)\n```\n[no](no)\n```\n'
    assert links(text) == ["b.md", "d/e.png"]


@pytest.mark.parametrize("where", [ROOT, ROOT / "docs", Path("/")])
def test_a_file_is_linked_from_the_root_wherever_one_stands(
    where: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(where)
    assert "[badnet.py](attacks/badnet.py)" in tables.attacks()
    assert "[controls.py](defenses/controls.py)" in tables.defenses()


# Boards.


def results(folder: Path, host: str = "", **more: Any) -> Path:
    """Results of preset smoke, as far as a board of it goes."""
    made = {"commit": "abc1234", "versions": '{"torch": "2.9.1"}', "device": "cpu", **more}
    for defense in ("none", "finetune"):
        write_rows(folder, cell_rows(defense=defense, **made))
    plan = [cell_columns(), cell_columns(defense="finetune")]
    write_grid(folder, "smoke", load_grid("smoke").identity_hash, plan)
    stage = {"key": "k", "kind": "train", "name": "v", "inputs": [], "seconds": 1.0}
    stage |= {"started_at": EPOCH, "ended_at": EPOCH, "reused": False}
    write_table(folder, "stages", [{**stage, "host": host or socket.gethostname()}])
    return folder


@pytest.fixture
def docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A documents folder of our own with the board of preset smoke, written by the command."""
    folder = tmp_path / "docs"
    folder.mkdir()
    monkeypatch.setattr(tables, "DOCS", folder)
    monkeypatch.setattr(tables, "BOARD", folder / "smoke-board.json")
    assert tables.main(["--board", "smoke", str(results(tmp_path / "run"))]) == 0
    return folder


def test_a_board_says_what_made_it(docs: Path) -> None:
    board = json.loads((docs / "smoke-board.json").read_text())
    made = board["made"]
    assert (made["commit"], made["torch"], made["device"]) == ("abc1234", "2.9.1", "cpu")
    assert made["processor"]
    assert [row["defense"] for row in board["rows"]] == ["none", "finetune"]
    assert tables.check_board(docs / "smoke-board.json") is None
    said = tables.parts()["smoke-made"]()
    assert "depend on the processor" in said
    for word in ("abc1234", "2.9.1", made["processor"]):
        assert word in said
    assert "| badnet | 1 % | finetune | 95.0 [" in tables.parts()["smoke-short"]()


@pytest.mark.parametrize("place", ["rows", "made", "grid", "completeness"])
def test_a_board_edited_by_hand_is_noticed(docs: Path, place: str) -> None:
    path = docs / "smoke-board.json"
    board = json.loads(path.read_text())
    if place == "rows":
        board["rows"][1]["asr_top1"] = 0.001
    elif place == "made":
        board["made"]["processor"] = "another"
    elif place == "completeness":
        board["completeness"]["ok"] = 3
    else:
        board["grid"]["name"] = "other"
    path.write_text(json.dumps(board))
    assert "was edited after it was written" in (tables.check_board(path) or "")


def test_a_board_of_another_grid_or_of_no_record_is_noticed(docs: Path) -> None:
    path = docs / "smoke-board.json"
    board = json.loads(path.read_text())
    board["grid"]["hash"] = "0"
    board["digest"] = tables.digest_of(board)
    path.write_text(json.dumps(board))
    assert "is of grid 0, the preset is now" in (tables.check_board(path) or "")
    del board["made"]
    path.write_text(json.dumps(board))
    assert "does not say what made it" in (tables.check_board(path) or "")
    assert "--board smoke" in (tables.check_board(path) or "")


def test_a_board_from_elsewhere_or_half_done_is_refused(docs: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="was made on farm-7: run this command there"):
        tables.write_board("smoke", results(tmp_path / "far", host="farm-7"))
    half = results(tmp_path / "half")
    write_grid(half, "smoke", "0", [cell_columns(), cell_columns(defense="roclip")])
    with pytest.raises(SystemExit, match="some cells have no outcome"):
        tables.write_board("smoke", half)
    tables.write_board("smoke", half, partial=True)
    assert "**Not all of the grid:** 1 of 2 cells have run." in tables.parts()["smoke-made"]()


def test_a_picture_of_another_board_is_noticed(docs: Path, tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    picture = docs / "smoke.png"
    assert "run make docs" in (tables.check_picture(picture) or "")
    Figure().savefig(picture, metadata={"Inputs": tables.picture_inputs(picture)})
    assert tables.check_picture(picture) is None
    path = docs / "smoke-board.json"
    path.write_text(path.read_text().replace("abc1234", "abc1235"))
    assert "was drawn from another board" in (tables.check_picture(picture) or "")


def test_attacks_that_stamp_nothing_have_a_column_of_their_own(docs: Path, tmp_path: Path) -> None:
    assert "hit@1" not in tables.parts()["smoke-board"]()
    run = tmp_path / "hits"
    write_rows(run, cell_rows("planted", rate=None, hit="psr_top1", asr=0.4, clean_victim=0.0))
    write_grid(run, "hits", "0", [cell_columns("planted", rate=None, count=40)])
    tables.write_board("hits", run)
    text = tables.parts()["hits-board"]()
    assert "hit@1 %" in text
    assert "| planted | 40 rows | none | 95.0 [" in text
    assert "| 40.0 [" in text


def test_precision_stands_beside_its_bound_where_the_board_has_it(docs: Path) -> None:
    path = docs / "smoke-board.json"
    board = json.loads(path.read_text())
    judged = board["rows"][1]
    assert judged["found_precision_bound"] is None
    judged |= {"found_auroc": 0.9852, "found_recall": 0.98, "found_precision": 0.0503}
    judged["found_precision_bound"] = 0.0513
    path.write_text(json.dumps(board))
    text = tables.parts()["smoke-findings"]()
    assert "| finetune | 0.985; 98.0 / 5.0 of 5.1 |" in text
    assert text.endswith(
        "\nAfter `of`: the highest precision that so many flagged rows can have.\n"
    )
    for row in board["rows"]:
        del row["found_precision_bound"]
    path.write_text(json.dumps(board))
    text = tables.parts()["smoke-findings"]()
    assert text.endswith("| finetune | 0.985; 98.0 / 5.0 |\n"), "a board of before there was one"


def test_what_stages_found_is_averaged_over_seeds(tmp_path: Path) -> None:
    """Of poisoned cells, the stages alone: neither the final judgement nor readings with covers."""
    areas = {0: 0.9, 1: 0.7}
    told = ("found_judge_auroc", "found_auroc", "found_with_cover_judge_auroc")
    cells, rows = list[dict[str, Any]](), list[dict[str, Any]]()
    for seed, area in areas.items():
        cells.append(cell_columns(seed=seed, defense="cgd"))
        own = cell_rows(seed=seed, defense="cgd")
        rows += own
        rows += [
            {**own[0], "metric": name, "eval_set": "suspect", "value": area, "n": 99}
            for name in told
        ]
    write_grid(tmp_path, "demo", "0123456789abcdef", cells)
    write_rows(tmp_path, rows)
    (found,) = tables._stages(tmp_path)
    assert (found["defense"], found["stage"], found["attack"]) == ("cgd", "judge", "badnet")
    assert found["value"] == pytest.approx(0.8)


def test_the_picture_keeps_what_it_was_drawn_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from docs import picture

    black = np.zeros((4, 4, 3), dtype=np.uint8)
    monkeypatch.setattr(
        picture, "pairs", lambda grid: [(name, black, black) for name in ("badnet", "sig")]
    )
    for drawn, name in ((picture.draw, "demo"), (picture.draw_papers, "papers")):
        path = tmp_path / f"{name}.png"
        shutil.copy(tables.DOCS / f"{name}-board.json", tmp_path)
        drawn(path)
        with Image.open(path) as image:
            assert image.info["Inputs"] == tables.picture_inputs(path)
        assert tables.check_picture(path) is None


# Figures of benchmarks.


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a benchmark, as ``--record`` leaves it."""
    found = {
        "stages": Figure(value=13036, unit="stages"),
        "grid plan": Figure(value=21.456, unit="s", at_most=20),
        "8 lanes: makespan / bound": Figure(value=1.0004, unit="x", at_most=1.05),
        "32 lanes: makespan / bound": Figure(value=1.25, unit="x", at_most=1.05),
        "8 lanes: makespan / bound, as listed": Figure(value=2.0, unit="x"),
        "32 lanes: makespan / bound, as listed": Figure(value=123.456, unit="x"),
    }
    monkeypatch.setattr(tables, "DOCS", tmp_path)
    monkeypatch.setattr(command, "FIGURES", tmp_path / "figures")
    monkeypatch.setattr(command, "main_of", lambda name, quick: lambda: found)
    assert command.main(["scale", "--record", "--json", str(tmp_path / "all.json")]) == 0
    return tmp_path / "figures" / "scale.json"


def test_figures_become_tables_that_say_what_they_hold_for(recorded: Path) -> None:
    (name, part), *_ = scale_tables.parts().items()
    made = scale_tables.read_figures(recorded)["made"]
    assert name == "scale-figures"
    *lines, said = part().splitlines()
    assert lines == [
        "| what | figure | aim |",
        "| --- | --- | --- |",
        "| stages | 13,036 stages |  |",
        "| grid plan | 21.46 s | <= 20: **missed** |",
        "",
        "| lanes | 8 | 32 | aim |",
        "| --- | --- | --- | --- |",
        "| makespan / bound | 1.000 x | 1.250 x | <= 1.05: **missed** |",
        "| makespan / bound, as listed | 2.000 x | 123.5 x |  |",
        "",
    ]
    assert said.startswith(f"{made['time'][:10]}, commit `{made['commit']}`, {made['processor']}, ")
    assert scale_tables.problems() == []


def test_figures_edited_by_hand_are_noticed(recorded: Path) -> None:
    recorded.write_text(recorded.read_text().replace("21.456", "11.456"))
    (problem,) = scale_tables.problems()
    assert "figures/scale.json was edited" in problem
    assert "python -m benchmarks scale --record" in problem


def test_rough_figures_are_not_kept(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["scale", "--record", "--quick"])
    assert "those of --quick are none" in capsys.readouterr().err


def test_every_field_of_a_recipe_is_told() -> None:
    told = re.findall(r"^\| `(\w+)` \| (\S+)", recipe_fields(), re.MULTILINE)
    both = [*fields(Recipe), *fields(ClassifierRecipe)]
    assert {name for name, _ in told} == {field.name for field in both}
    assert ("warmup_steps", "`50`") in told
    assert ("warmup_steps", "`0`") in told, "an image classifier's"
    assert ("lr", "needed") in told


def test_every_section_of_scale_has_figures_of_the_command_that_it_names() -> None:
    text = (ROOT / "docs" / "scale.md").read_text()
    line = next(line for line in text.splitlines() if line.startswith("python -m benchmarks "))
    names = line.removesuffix(" --record").split()[3:]
    assert re.findall(r"<!-- generated: ([\w-]+) -->", text) == [f"{n}-figures" for n in names]
    assert len(re.findall(r"^## ", text, re.MULTILINE)) == len(names)
    every = "\n".join(path.read_text() for path in tables.documents())
    shown = re.findall(r"<!-- generated: (\w+)-figures -->", every)
    assert set(names) < set(shown)
    assert {path.stem for path in scale_tables.files()} == set(shown), "records without a table"
