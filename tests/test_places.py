"""Which results directory a word on the command line means."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from grid.chains import read_chains, write_parts
from grid.places import meant
from grid.registry import SOURCE_FILE, grid_source
from tests.finished import Finished
from tests.grids import call
from victims.errors import UsageError

CELL = "badnet/0.1/finetune/s0"


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of a preset under another folder's name, at home."""
    monkeypatch.setenv("GRID_HOME", str(tmp_path))
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "grid.yaml").write_text(grid_source("smoke").text)
    (folder / "source.json").write_text(json.dumps({"path": "preset smoke"}))
    return folder


def test_a_copy_of_a_run_is_itself_and_not_the_run_that_its_grid_is_called_after(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A damaged copy was reported to be complete, as the run beside it was looked at."""
    for word in ("broken", str(copied)):
        assert meant(word, None, None).out == copied
    assert meant("broken", Path("elsewhere"), None).out == Path("elsewhere")
    assert meant("smoke", None, None).out == copied.parent / "smoke"
    checked = call(capsys, "check", "broken")
    assert checked.code == 3
    assert f"smoke in {copied}: INCOMPLETE" in checked.out


def test_a_run_of_a_preset_in_a_folder_of_its_name_is_found(
    copied: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`grid run smoke --out smoke` was the last command that worked there: the folder named the
    preset, and the preset the folder, without end."""
    monkeypatch.setenv("GRID_HOME", str(copied / "elsewhere"))
    monkeypatch.chdir(copied.parent)
    copied.rename("smoke")
    found = meant("smoke", None, None)
    assert found.out == Path("smoke")
    assert found.source == grid_source("smoke")
    assert found.source.source == "preset smoke"
    assert call(capsys, "plan", "smoke").code == 0
    checked = call(capsys, "check", "smoke")
    assert checked.code == 3
    assert "smoke in smoke: INCOMPLETE" in checked.out


def test_no_word_is_no_grid(capsys: pytest.CaptureFixture[str]) -> None:
    answer = call(capsys, "check", "")
    assert answer.code == 2
    assert "no grid was named" in answer.err


def test_the_store_of_a_run_is_found_from_anywhere(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was recorded relative to where the run was started, and only found from there."""
    monkeypatch.chdir(tmp_path)
    write_parts(tmp_path, finished.grid, "runs/store", {}, [], [])
    body = json.loads((tmp_path / "chains.json").read_text())
    assert body["store"] == str(tmp_path / "runs" / "store")
    write_parts(tmp_path, finished.grid, "s3://bucket/store", {}, [], [])
    assert json.loads((tmp_path / "chains.json").read_text())["store"] == "s3://bucket/store"
    copy = finished.copy(tmp_path / "runs")
    before = json.loads((copy.out / "chains.json").read_text())
    for recorded in ("store", "runs/store", "/a/disk/that/was/elsewhere/store"):
        (copy.out / "chains.json").write_text(json.dumps({**before, "store": recorded}))
        assert Path(read_chains(copy.out).store).samefile(copy.store)


def test_an_export_names_the_runs_own_store_that_is_gone(
    finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = finished.copy(tmp_path)
    copy.store.rename(tmp_path / "elsewhere")
    told = call(capsys, "export", CELL, "--in", copy.out, "--out", tmp_path / "model")
    assert told.code == 2
    assert f"its run kept its models in '{copy.store}', and no store is there" in told.err


def test_a_preset_is_not_mixed_with_another_files_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file called as a preset is left its results beside those of no other grid."""
    monkeypatch.setenv("GRID_HOME", str(tmp_path))
    folder = tmp_path / "smoke"
    folder.mkdir()
    (folder / SOURCE_FILE).write_text(json.dumps({"path": "preset smoke"}))
    assert meant("smoke", None, None).out == folder
    (folder / SOURCE_FILE).write_text(json.dumps({"path": "/mine/smoke.yaml"}))
    with pytest.raises(UsageError, match=r"holds the run of /mine/smoke\.yaml.*--out"):
        meant("smoke", None, None)
    assert meant("smoke", tmp_path / "other", None).out == tmp_path / "other"
