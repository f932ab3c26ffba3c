"""The command line: what a wrong command or file says, and that it then writes nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from grid import cli
from grid.planning import make_plan
from grid.registry import grid_source
from grid.run_report import RunReport
from grid.schema.writing import write_rows
from grid.spec import Grid
from tests.grids import (
    RECIPE,
    Answer,
    call,
    numbers,
    outcomes,
    records,
    run_serial,
    tiny_grid,
    write_grid_file,
)
from victims.manifests import FORMAT
from victims.store import Store

BADNET = {"patch": 6, "cell": 2, "levels": 2, "place": "corner"}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Grid, Path]:
    """A finished run in ``out`` and ``store``; tests change only copies of it."""
    folder = tmp_path_factory.mktemp("ran")
    grid = tiny_grid(folder)
    run_serial(grid, folder / "out", folder / "store")
    return grid, folder


def places(folder: Path) -> tuple[object, ...]:
    return ("--out", folder / "out", "--store", folder / "store")


def one_message(answer: Answer) -> str:
    """The message, which is all that was said."""
    assert answer.out == ""
    assert "Traceback" not in answer.err
    lines = answer.err.strip().splitlines()
    assert lines[0].startswith("grid: ") or "Usage:" in lines[0]
    return answer.err


def nothing_in(folder: Path) -> bool:
    return not (folder / "out").exists() and not (folder / "store").exists()


# What cannot be meant: exit 2, one message, nothing written.


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("rnu", "demo"), "no command called 'rnu'. Did you mean 'run'?"),
        (("run", "smok"), "no grid file and no preset called 'smok'. Did you mean 'smoke'?"),
        (("plan", "nowhere.yaml"), "no grid file and no preset called 'nowhere.yaml'"),
        (("run", "smoke", "--exectuor", "serial"), "No such option: --exectuor"),
        (
            ("run", "smoke", "--executor", "slurm"),
            "no choice is called 'slurm'. There are: ray, serial",
        ),
        (("run",), "Missing argument"),
        (("ls", "atacks"), "Did you mean 'attacks'?"),
        (("run", "smoke", "--only", "atack=badnet"), "Did you mean 'attack'?"),
        (("run", "smoke", "--only", ""), "is no condition"),
        (("run", "smoke", "--only", "attack=badnut"), "Did you mean 'badnet'?"),
        (("run", "smoke", "--only", "attack=sig,cell=badnet*"), "meets all conditions together"),
        (("explain", "badnet/0.05/cleanclp/s0", "--grid", "smoke"), "badnet/0.05/cleanclip/s0"),
        (("leaderboard", "--in", "mine"), "are an argument here: grid leaderboard mine."),
        (("report", "--in=mine"), "are an argument here: grid report mine."),
        (("verify", "a", "--in", "mine"), "named with --grid here: --grid mine."),
        (("leaderboard", "runs/nosuch"), "No results at runs/nosuch: there is no such directory"),
        (("status", "runs/nosuch"), "grid: runs/nosuch: no run of a grid is there"),
    ],
)
def test_wrong_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], says: str
) -> None:
    where = places(tmp_path) if words[0] in ("run", "explain") else ()
    answer = call(capsys, *words, *where)
    assert answer.code == 2
    assert says in one_message(answer)
    assert nothing_in(tmp_path)


def test_an_empty_folder_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "emptydir").mkdir()
    monkeypatch.chdir(tmp_path)
    says = {
        "check": "emptydir: a folder, not a grid file, and no results of a run are in it",
        "status": "emptydir: no run of a grid is there (no grid.json)",
        "leaderboard": "No results in emptydir: neither grid.json nor rows",
    }
    for command, words in says.items():
        answer = call(capsys, command, "emptydir")
        assert answer.code == 2
        assert answer.err.startswith(f"grid: {words}")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rates": [0.001]}, "less than one row"),
        ({"target": "hexagon_"}, "hexagon"),
        ({"target": 10_000}, "target"),
        ({"attacks": ["badnut"]}, "Did you mean 'badnet'?"),
        ({"attacks": [{"badnet": {**BADNET, "pach": 3}}]}, "Did you mean 'patch'?"),
        ({"data": {"wrld": {}}}, "no corpus kind called 'wrld'. Did you mean 'world'?"),
        ({"model": "tinny"}, "Did you mean 'tiny'?"),
        ({"recipes": {"victim": RECIPE, "repair": RECIPE}}, "missing key 'reference'"),
        ({"execution": {"resources": {"modle": {"cpus": 2}}}}, "Did you mean 'model'?"),
    ],
)
def test_a_wrong_grid_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], says: str
) -> None:
    file = write_grid_file(tmp_path, **changes)
    answer = call(capsys, "run", file, "--executor", "serial", *places(tmp_path))
    assert answer.code == 2
    message = one_message(answer)
    assert says in message
    assert str(file) in message  # and the place in it
    assert nothing_in(tmp_path)


def test_a_store_of_a_newer_version(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = tmp_path / "store"
    store.mkdir()
    (store / "store.json").write_text(json.dumps({"format": FORMAT + 1}))
    file = write_grid_file(tmp_path)
    answer = call(capsys, "run", file, "--executor", "serial", *places(tmp_path))
    assert answer.code == 2
    assert "newer version of this tool" in one_message(answer)
    assert not (tmp_path / "out").exists()
    assert [path.name for path in store.iterdir()] == ["store.json"]


@pytest.mark.parametrize("which", ["out", "store"])
def test_a_place_that_is_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], which: str
) -> None:
    (tmp_path / which).write_text("hello")
    file = write_grid_file(tmp_path)
    answer = call(capsys, "run", file, "--executor", "serial", *places(tmp_path))
    assert answer.code == 2
    assert f"--{which} {tmp_path / which}" in one_message(answer)
    assert (tmp_path / which).read_text() == "hello"


def test_a_device_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every cell once became a failed method, which no later run tries again."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has the device")
    file = write_grid_file(tmp_path, execution={"device": "cuda"})
    answer = call(capsys, "run", file, "--executor", "serial", *places(tmp_path))
    assert answer.code == 1
    assert "execution.device is cuda, and torch finds no such device here" in one_message(answer)
    assert records(tmp_path / "out", "rows") == []
    # Nothing stands in the way of the corrected file.
    write_grid_file(tmp_path)
    assert call(capsys, "run", file, "--executor", "serial", *places(tmp_path)).code == 0


def test_a_checkpoint_of_another_model(
    ran: tuple[Grid, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights of another shape under a victim's key, with a manifest that fits them."""
    grid, folder = ran
    shutil.copytree(folder / "store", tmp_path / "store")
    victim = make_plan(grid).cells[-1].measure.defended.victim.key
    store = Store(tmp_path / "store")
    spec = dict(store.need(victim).meta["model"])
    name = tmp_path / "store" / "manifests" / "model" / f"{victim}.json"
    body = json.loads(name.read_text())
    body["meta"]["model"] = {**spec, "size": 64}
    name.write_text(json.dumps(body))
    file = write_grid_file(
        tmp_path, defenses=["none", {"finetune": {"as": "anew", "recipe": {"lr": 1e-3}}}]
    )
    answer = call(capsys, "run", file, "--executor", "serial", *places(tmp_path))
    assert answer.code == 3
    assert "Traceback" not in answer.err
    detail = outcomes(tmp_path / "out")["badnet/0.1/anew/s0"]["detail"]
    assert f"{victim}: these weights belong to another model than tiny" in detail
    assert "Check `model` in the grid file" in detail


# Help and lists.


def test_every_command_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    answer = call(capsys, "--help")
    assert answer.code == 0
    for name in cli._known_commands():
        assert name in answer.out
        assert call(capsys, name, "--help").code == 0


def test_presets_are_listed_and_decode(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those for corpora of the user's say which variable is to name them."""
    monkeypatch.delenv("CC3M", raising=False)
    found = json.loads(call(capsys, "ls", "presets", "--json").out)
    assert {"demo", "smoke", "rn50-cc3m"} <= set(found)
    for name, preset in found.items():
        assert preset["file"] == f"grid/presets/{name}.yaml"
        planned = call(capsys, "plan", name, "--json", "--out", "/nowhere", "--store", "/nowhere")
        if "$CC3M" in grid_source(name).text:
            assert (planned.code, "export CC3M=FOLDER" in planned.err) == (2, True)
        else:
            assert json.loads(planned.out)["grid"] == name


def test_lists_say_what_is_what_and_where(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attacks = call(capsys, "ls", "attacks").out.splitlines()
    assert next(line for line in attacks if line.startswith("badnet ")).split(maxsplit=1)[1] == (
        "gate: strong"
    )
    assert "grid/presets/smoke.yaml" in call(capsys, "ls", "presets").out
    monkeypatch.chdir(tmp_path)
    shown = call(capsys, "ls", "presets").out
    assert Path(next(w for w in shown.split() if w.endswith("smoke.yaml"))).is_file()


# Completeness: `grid check` and the board say the same of the same cells.


@pytest.mark.parametrize(
    ("status", "complete", "code"),
    [
        ("failed_method", True, 3),
        ("failed_infrastructure", False, 3),
        ("missing", False, 3),
        pytest.param("cancelled", False, 3, marks=pytest.mark.exhaustive),
        pytest.param("requeued", False, 3, marks=pytest.mark.exhaustive),
    ],
)
def test_check_and_board_agree_on_what_is_complete(
    ran: tuple[Grid, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    status: str,
    complete: bool,
    code: int,
) -> None:
    _, folder = ran
    shutil.copytree(folder / "out", tmp_path / "out")
    file = write_grid_file(tmp_path)
    rows = [row for row in records(tmp_path / "out", "rows") if row["metric"] == "cell"]
    last = max(rows, key=lambda row: str(row["cell"]))
    if status == "missing":
        for path in (tmp_path / "out" / "rows").iterdir():
            path.unlink()
        write_rows(tmp_path / "out", [row for row in rows if row is not last])
    else:
        del last["written_at"]
        write_rows(tmp_path / "out", [{**last, "status": status, "detail": "boom"}])
    check = call(capsys, "check", file, *places(tmp_path))
    board = call(capsys, "leaderboard", tmp_path / "out").out
    words = check.out.splitlines()[0].removeprefix(f"tiny in {tmp_path / 'out'}: ")
    assert words.startswith("Complete: 4 planned cells: 3 ok, 1 " if complete else "INCOMPLETE: 4 ")
    assert words in board
    assert check.code == code
    listed = check.out.splitlines()[1:]
    assert len(listed) == 1
    assert f"{last['label']}: {status}: " in listed[0]
    found = json.loads(call(capsys, "check", file, *places(tmp_path), "--json").out)
    on_board = json.loads(call(capsys, "leaderboard", tmp_path / "out", "--format", "json").out)
    assert found["complete"] is on_board["completeness"]["complete"] is complete
    where = "failed" if complete else "incomplete"
    assert [cell["label"] for cell in found[where]] == [last["label"]]


# Codes.


@pytest.mark.parametrize(
    ("counts", "rest", "code"),
    [
        ({"ok": 3, "inert": 1, "not_applicable": 1}, {}, 0),
        ({"ok": 3, "failed_method": 1, "invalid_victim": 1}, {}, 3),
        ({"ok": 3, "failed_infrastructure": 1}, {}, 3),
        ({"ok": 3, "missing": 1}, {"remaining": ["a"]}, 3),
        ({"ok": 3, "invalid_victim": 1, "skipped": 2}, {}, 4),
        ({"ok": 3, "missing": 1}, {"remaining": ["a"], "problem": "no space"}, 1),
    ],
)
def test_exit_codes(counts: dict[str, int], rest: dict[str, Any], code: int) -> None:
    report = RunReport("g", 4, counts, 0, 0, 0, 0, 0, 0.0, 0.0, 0.0, 1, 0, **rest)
    assert report.code == code


# Explain.


def test_explain_before_during_and_after_a_run(
    ran: tuple[Grid, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid, folder = ran
    file = write_grid_file(tmp_path)
    words = ("explain", "badnet/0.1/finetune/s0", "--grid", file, "--json")
    before = json.loads(call(capsys, *words, *places(tmp_path)).out)
    assert before["status"] == "missing"
    assert before["gate"]["detail"] == "not judged yet"
    assert {stage["state"] for stage in before["stages"]} == {"to run"}
    assert nothing_in(tmp_path)

    shutil.copytree(folder / "store", tmp_path / "store")
    cell = next(c for c in make_plan(grid).cells if c.cell.label == "badnet/0.1/finetune/s0")
    Store(tmp_path / "store").discard(cell.measure.key, "as if it were still to come")
    during = json.loads(call(capsys, *words, *places(tmp_path)).out)
    assert {s["key"] for s in during["stages"] if s["state"] == "to run"} == {cell.measure.key}
    assert during["gate"]["status"] == "ok"

    after = json.loads(call(capsys, *words, *places(folder)).out)
    assert (after["status"], after["cell"]) == ("ok", cell.key)
    assert after["configuration"]["recipes"]["repair"]["lr"] == RECIPE["lr"]
    assert after["configuration"]["victim_seed"] == 0
    ran_rows = {row["key"]: row for row in records(folder / "out", "stages")}
    for stage in after["stages"]:
        row = ran_rows[stage["key"]]
        assert (stage["state"], stage["pid"], stage["host"]) == (
            "finished",
            row["pid"],
            row["host"],
        )
        assert stage["seconds"] == row["seconds"] > 0
        assert Path(stage["log"]).read_text()
    shared = {stage["key"]: stage["other_cells"] for stage in after["stages"]}
    assert shared[cell.measure.key] == 0
    assert shared[cell.measure.defended.victim.key] == 1  # the undefended cell
    assert shared[cell.measure.trigger.key] == 3
    measured = {(m["eval_set"], m["metric"]): m["value"] for m in after["metrics"]}
    expected = {
        (split, metric): row["value"]
        for (key, split, metric), row in numbers(folder / "out").items()
        if key == cell.key and metric != "cell"
    }
    assert measured == expected

    by_key = call(capsys, "explain", cell.key, "--grid", file, *places(folder))
    assert by_key.out.startswith("badnet/0.1/finetune/s0")
    for stage in after["stages"]:
        assert stage["key"] in by_key.out


def test_labels_tell_targets_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_grid_file(tmp_path)
    file.write_text(file.read_text().replace("target: circle", "targets: [circle, star]"))
    where = places(tmp_path)
    found = json.loads(call(capsys, "check", file, *where, "--json").out)
    labels = [cell["label"] for cell in found["incomplete"]]
    assert len(labels) == len(set(labels)) == 8
    words = ("--grid", file, *where)
    refused = call(capsys, "explain", "badnet/0.1/finetune/s0", *words)
    assert refused.code == 2
    message = one_message(refused)
    assert "means 2 cells" in message
    for index, target in ((0, "circle"), (3, "star")):
        label = f"badnet/0.1/finetune/s0/t{index}"
        assert label in message
        cell = json.loads(call(capsys, "explain", label, *words, "--json").out)
        assert (cell["label"], cell["configuration"]["target"]) == (label, target)
        assert call(capsys, "explain", cell["cell"], *words).out.startswith(f"{label} ")


def test_explain_names_what_failed_and_what_cannot_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = {**RECIPE, "batch_size": 32}
    file = write_grid_file(
        tmp_path,
        regime="S",
        recipes={"victim": recipe, "repair": recipe},
        defenses=["none", "clean_model", {"random_filter": {"fraction": 0.9}}],
    )
    assert call(capsys, "run", file, "--executor", "serial", *places(tmp_path)).code == 3
    words = ("--grid", file, *places(tmp_path))
    failed = call(capsys, "explain", "badnet/0.1/random_filter/s0", *words).out
    assert "status: failed_method: defended:random_filter" in failed
    assert ": failed" in failed
    refused = json.loads(call(capsys, "explain", "badnet/0.1/clean_model/s0", *words, "--json").out)
    assert refused["status"] == "not_applicable"
    assert "regime S has none" in refused["detail"]
    assert refused["stages"] == []
