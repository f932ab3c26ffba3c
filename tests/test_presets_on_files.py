"""Presets for real corpora, limited, on made files: from shards and tables to a board, through the
commands that a user types."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import yaml
from PIL import Image

from defenses.par import Par
from grid.gridfile import load_grid
from grid.init_file import limited, written
from grid.registry import grid_source
from grid.spec import Grid
from tests.grids import call, outcomes
from tests.pairs import encoded, world_pairs, write_csv, write_pictures, write_shards
from victims.errors import UsageError
from victims.models import ModelSpec, fresh, save_weights
from victims.world import CLASSES, World, render

SIZE, ROWS = 64, 64
WNIDS = [f"n{number:08d}" for number in range(len(CLASSES))]
REAL = ("rn50-cc3m", "rn50-scratch", "vit-b32")


class Files(NamedTuple):
    """What a user has: shards or a table of pairs, a set like ImageNet, weights."""

    shards: Path
    table: Path
    imagenet: Path
    weights: Path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("files")
    pairs = world_pairs(260, SIZE)
    shards = write_shards(folder / "shards", pairs, 100)
    write_pictures(folder / "table", pairs)
    rows = [("image", "caption"), *((pair.name, pair.caption) for pair in pairs)]
    table = write_csv(folder / "table" / "pairs.csv", rows)
    imagenet = folder / "imagenet"
    for part, split, count in (("train", "tuning", 150), ("val", "report", 150)):
        drawn = render(World(size=SIZE), split, count)
        for n, (image, label) in enumerate(zip(drawn.image_BCHW, drawn.labels, strict=True)):
            path = imagenet / part / WNIDS[label] / f"{n:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(Image.fromarray(np.moveaxis(image, 0, -1))))
    names = dict(zip(WNIDS, CLASSES, strict=True))
    (imagenet / "classes.json").write_text(json.dumps(names))
    weights = folder / "small.safetensors"
    save_weights(fresh(ModelSpec(arch="small", size=SIZE), 0), weights)
    return Files(shards, table, imagenet, weights)


def smoke_form(preset: str, files: Files, out: Path, **more: str) -> Path:
    """The limited form of a preset, with a small network in the place of the real one."""
    changes = {"model.arch": "small", "model.size": str(SIZE), "target": "circle", **more}
    if preset != "rn50-scratch":  # random weights answer by chance
        changes |= {"model.pretrained": str(files.weights), "gate.reference": "0"}
    source = grid_source(preset)
    text = written(source, [f"{key}={value}" for key, value in changes.items()], ROWS)
    out.write_text(text)
    return out


def run_preset(
    preset: str,
    files: Files,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    **more: str,
) -> dict[str, str]:
    """Ingest, plan, run and read the board; what became of each cell."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    source = files.shards if preset == "rn50-cc3m" else files.table
    ingest = ("ingest", source, "--out", folder / "pairs", "--size", SIZE, "--workers", 1)
    assert call(capsys, *ingest).code == 0
    monkeypatch.setenv("CC3M", str(folder / "pairs"))
    monkeypatch.setenv("IMAGENET", str(files.imagenet))
    grid = smoke_form(preset, files, folder / "smoke.yaml", **more)
    places = ("--out", folder / "out", "--store", folder / "store")
    planned = call(capsys, "plan", grid, *places)
    assert planned.code == 0, planned.err
    done = call(capsys, "run", grid, *places, "--executor", "serial")
    assert done.code == 0, done.err
    board = call(capsys, "leaderboard", folder / "out", "--format", "md")
    assert board.code == 0
    assert f"{preset}-limit{ROWS}" in board.out
    return {label: str(row["status"]) for label, row in outcomes(folder / "out").items()}


def test_a_preset_runs_small_on_files(
    files: Files,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    few = {"attacks": "[badnet]", "defenses": "[none, cleanclip, clean_model]"}
    found = run_preset("rn50-cc3m", files, tmp_path, monkeypatch, capsys, **few)
    assert list(found.values()) == ["ok"] * 6


@pytest.mark.exhaustive
@pytest.mark.parametrize("preset", REAL)
def test_all_of_a_preset_runs_small_on_files(
    preset: str,
    files: Files,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = run_preset(preset, files, tmp_path, monkeypatch, capsys)
    assert {label: status for label, status in found.items() if status != "ok"} == {}
    assert set(found.values()) <= {"ok", "not_applicable"}


# What a method is without its idea, beside the augmentation and the recipe that it shares.
CONTROLS: dict[str, list[tuple[str, dict[str, object]]]] = {
    "cleanclip": [("augment_only", {"like": "cleanclip"})],
    "roclip": [("roclip", {"variant": "augment_only"})],
    "par": [("par", {"variant": "augment_only"})],
    "abd": [("abd", {"variant": "noise"})],
    "safeclip": [("safeclip", {"variant": "augment_only"})],
}
PLAIN: tuple[str, dict[str, object]] = ("roclip", {"every": None, "augment": "none"})
PAPER_RATE = Par.variants["paper_rate"]["lr_start"]


@pytest.mark.parametrize("preset", REAL)
def test_what_augments_stands_beside_its_controls_under_the_same_recipe(preset: str) -> None:
    """Without them a preset credits a method with what its augmentation does, and SafeCLIP from
    scratch with what 32 epochs at ten times the rate do."""
    document = yaml.safe_load(grid_source(preset).text)
    entries = [
        next(iter(e.items())) if isinstance(e, dict) else (e, {}) for e in document["defenses"]
    ]
    for name, wanted in CONTROLS.items():
        own = next((given for of, given in entries if of == name and "as" not in given), None)
        if own is None:
            continue
        twins = [PLAIN] if name == "safeclip" and document.get("regime") == "S" else []
        recipe = own.get("recipe", {})
        for control, fields in [*wanted, *twins]:
            assert any(
                of == control and {**given, **fields} == given and given.get("recipe", {}) == recipe
                for of, given in entries
            ), (preset, name, control, fields)
    rates = {given.get("variant"): given.get("lr_start") for of, given in entries if of == "par"}
    assert rates.get("augment_only") == (PAPER_RATE if rates else None)


# --- the file


def test_an_unchanged_preset_is_copied_to_the_byte(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mine.yaml"
    assert call(capsys, "init", "demo", "--out", out).code == 0
    assert out.read_text() == grid_source("demo").text
    again = call(capsys, "init", "demo", "--out", out)
    assert (again.code, "is there already" in again.err) == (2, True)
    assert call(capsys, "init", "demo").out == out.read_text()


def test_changes_are_told_and_meant(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "mine.yaml"
    asked = ("--set", "seeds=[3, 4]", "--set", "recipes.victim.lr=1.0e-3", "--set", "name=mine")
    assert call(capsys, "init", "demo", "--out", out, *asked).code == 0
    grid = load_grid(str(out))
    assert (grid.name, grid.seeds, grid.victim.lr) == ("mine", (3, 4), 1e-3)
    assert "# --set seeds=[3, 4]" in out.read_text()
    # What was not changed stands as it was written, comments and all.
    kept = grid_source("demo").text.split("attacks:")[1].split("recipes:")[0]
    assert kept in out.read_text()
    assert "seeds: [3, 4]\n" in out.read_text()
    for wrong, meant in (("attaks=[badnet]", "attacks"), ("recipes.victim.lrate=1", "lr")):
        refused = call(capsys, "init", "demo", "--set", wrong)
        assert (refused.code, f"Did you mean '{meant}'?" in refused.err) == (2, True)
    for wrong, meant in (
        *(("model.arc=RN101", "arch"), ("data.corpus.suspekt=9", "suspect")),
        ("data.corpus.judged_by.templats=label", "templates"),
    ):
        refused = call(capsys, "init", "rn50-cc3m", "--set", wrong)
        assert (refused.code, f"Did you mean '{meant}'?" in refused.err) == (2, True), wrong
    refused = call(capsys, "init", "demo", "--set", "data.world.sizes=9")
    assert (refused.code, "Did you mean 'size'?" in refused.err) == (2, True)
    # Whether the files that a grid names are there is asked when it is planned.
    assert call(capsys, "init", "rn50-cc3m", "--set", "seeds=[0]").code == 0
    for wrong in ("seeds", "=1", "target.name=x"):
        refused = call(capsys, "init", "demo", "--set", wrong)
        assert (refused.code, f"--set {wrong}" in refused.err) == (2, True)


def test_a_limited_file_is_small_and_still_poisons(tmp_path: Path) -> None:
    out = tmp_path / "small.yaml"
    out.write_text(written(grid_source("papers"), (), 64))
    grid = load_grid(str(out))
    assert grid.name == "papers-limit64"
    assert grid.data.suspect == 64
    assert {count for a in grid.attacks for count in grid.levels(a).values()} == {0, 8}
    bare = tmp_path / "bare.yaml"
    bare.write_text(grid_source("demo").text)
    document = yaml.safe_load(bare.read_text())
    document["data"]["world"] = {"size": 32, "suspect": 5000}
    bare.write_text(yaml.safe_dump(document))
    bare.write_text(written(grid_source(str(bare)), (), 64))
    data = load_grid(str(bare)).data
    splits = ("public", "suspect", "clean", "tuning", "report", "shifted")
    assert [data.rows(split) for split in splits] == [64, 64, 32, 64, 64, 64], "defaults as well"
    assert grid.victim.epochs == grid.repair.epochs == 1
    assert len(grid.seeds) == 1
    assert "label_consistent" not in written(grid_source("rn50-cc3m"), (), 64)
    targets = written(grid_source("attacks"), (), 64)
    assert load_grid_text(targets, tmp_path).seeds == (0,)
    with pytest.raises(UsageError, match="at least 32 rows"):
        limited(yaml.safe_load(grid_source("demo").text), "demo", 8)


def load_grid_text(text: str, folder: Path) -> Grid:
    path = folder / "other.yaml"
    path.write_text(text)
    return load_grid(str(path))
