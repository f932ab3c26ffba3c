"""Grids of image classifiers: what their files mean, whom they share, and one that is run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from defenses.base import Regime
from grid.data import FilesData, LabelledWorldData
from grid.gridfile import load_grid
from grid.planning import make_plan
from grid.score_maps import box_of, score_maps
from grid.spec import Grid
from grid.stages import Bench, FileModelStage, ModelStage
from tests.grids import OPEN_GATE, RECIPE, TINY, call, records, run_serial, write_grid_file
from victims.classifiers import ClassifierSpec
from victims.errors import GridError, UsageError
from victims.keys import file_sha256
from victims.lab import Ledger, ModelRef
from victims.models import ModelSpec, fresh
from victims.recipe import ClassifierRecipe, Recipe, Runtime
from victims.store import Store
from victims.world import CLASSES

FIT = {"epochs": 1, "batch_size": 32, "lr": 0.02}
CGD = {"batch_size": 16, "epochs": 1, "early_epochs": 1, "early_runs": 1, "early_batch_size": 32}
LABELLED: dict[str, Any] = {
    "track": "supervised",
    "recipes": {"reference": RECIPE, "victim": FIT, "repair": FIT},
    "defenses": ["none", "finetune", {"cgd_classifier": {**CGD, "balance": "none", "as": "cgd"}}],
    "gate": {"strong": OPEN_GATE, "medium": OPEN_GATE, "weak": OPEN_GATE, "init_loss": 1},
    "evaluate": {"sets": ["report"], "ks": [1]},
}


def write(folder: Path, **changes: Any) -> Path:
    return write_grid_file(folder, **{**LABELLED, "name": "labelled", **changes})


def load(folder: Path, **changes: Any) -> Grid:
    return load_grid(str(write(folder, **changes)))


def refusal(folder: Path, **changes: Any) -> str:
    with pytest.raises(UsageError) as caught:
        load(folder, **changes)
    return str(caught.value)


# --- what a file means


def test_a_labelled_grid_means_what_it_says(tmp_path: Path) -> None:
    found = load(tmp_path, guides={"public": {}, "weak": {"recipe": {"epochs": 2}}})
    assert found.regime is Regime.S
    assert isinstance(found.data, LabelledWorldData)
    assert found.model == ClassifierSpec(classes=CLASSES)
    assert isinstance(found.victim, ClassifierRecipe)
    assert type(found.reference) is Recipe
    assert [entry.label for entry in found.defenses] == ["none", "finetune", "cgd", "cgd@weak"]
    first, second = (found.defenses[index].guide for index in (2, 3))
    assert first is not None
    assert second is not None
    assert (first.recipe, first.model) == (found.reference, ModelSpec())
    assert second.recipe == Recipe(**{**RECIPE, "epochs": 2})  # type: ignore[arg-type]
    assert all(cell.not_applicable is None for cell in found.cells())
    # A classifier has no towers to choose between.
    towers = load(tmp_path, defenses=["none", {"finetune": {"trainable": "image"}}])
    refused = {cell.defense.label: cell.not_applicable for cell in towers.cells()}
    assert refused["none"] is None
    assert str(refused["finetune"]).startswith("finetune, as it is configured, is defined on")
    # The captions of a labelled set are the names of its classes.
    spec = found.data.corpus("tuning")
    (chunk,) = spec.chunks()
    assert chunk.captions == [CLASSES[label] for label in chunk.labels]
    assert tuple(spec.templates) == ("{}",)


def test_without_guides_the_reference_judges(tmp_path: Path) -> None:
    found = load(tmp_path)
    assert [entry.label for entry in found.defenses] == ["none", "finetune", "cgd"]
    assert found.defenses[2].guide is not None
    assert found.defenses[1].guide is None
    # Without a recipe there is no guide, and who asks one cannot run.
    alone = load(tmp_path, recipes={"victim": FIT, "repair": FIT})
    reasons = {cell.defense.label: why for cell, why in make_plan(alone).refused}
    assert reasons == {"cgd": "cgd asks a judge: give `guides`, or recipes.reference"}


def test_a_defense_may_ask_some_of_the_guides(tmp_path: Path) -> None:
    guides = {"public": {}, "b": {"recipe": {"epochs": 2}}, "c": {"recipe": {"epochs": 3}}}
    defenses = [{"cgd_classifier": {**CGD, "guides": ["c", "public"], "as": "cgd"}}]
    found = load(tmp_path, guides=guides, defenses=defenses)
    assert [entry.label for entry in found.defenses] == ["none", "cgd", "cgd@public"]


REFUSED = [
    ({"regime": "F"}, "trained from scratch: leave `regime` out"),
    ({"model": "tiny"}, "'tiny'"),
    ({"model": {"arch": "preact_tiny", "size": 64}}, "64 px, but the pictures of `data` have 32"),
    ({"guides": {}}, "no guide is named"),
    ({"guides": {"a": {"cell": "x"}}}, "give both"),
    (
        {"guides": {"a": {"weights": "nowhere.safetensors"}}},
        "nowhere.safetensors. Give a",
    ),
    ({"guides": {"a": {"recpie": {}}}}, "unknown key 'recpie'. Did you mean 'recipe'"),
    (
        {"guides": {"a": {"cell": "no/such", "of": "smoke"}}},
        "no victim called 'no/such' in gri",
    ),
    (
        {"guides": {"a": {"cell": "badnet/0.05/finetune/s0", "of": "smoke"}}},
        "It is a cell of the undefended victim",
    ),
    ({"guides": {"a": {"cell": "x", "of": "smoke", "weights": "z"}}}, "leave weights out"),
    ({"guides": {"a/b": {}}}, "'a/b' cannot name a guide"),
    ({"guides": {"a": {"recipe": {"lr": {"rates": [0.1, 1]}}}}}, "only repairs choose"),
    ({"guides": {"a": {"recipe": {"batch_size": 4096}}}}, "a batch of 4096 is larger than its da"),
    ({"guides": {"a": {"recipe": {"seed": -1}}}}, "a seed is a whole number from 0"),
    (
        {"defenses": [{"cgd_classifier": {"guides": ["public", "public"]}}]},
        "public is given twice",
    ),
    ({"guides": {"weak": {}}}, "nothing tells how weak differs from the public model"),
    ({"defenses": [{"cgd_classifier": {"guides": []}}]}, "the list is empty"),
    ({"defenses": [{"cgd_classifier": {"prompt": "a {} {x}"}}]}, "prompt must be a text with one"),
    ({"defenses": [{"finetune": {"recipe": {"lr": {}}}}]}, "are a CLIP's"),
    (
        {
            "attacks": ["trojannn"],
            "recipes": {**LABELLED["recipes"], "victim": {**FIT, "batch_size": 64}},
            "data": {"world": {**TINY["data"]["world"], "public": 32}},
        },
        "give `public` at least one batch of 64 rows",
    ),
    ({"guides": {"a": {"cell": "x", "of": "supervised-demo"}}}, "its victims are no CLIPs"),
    ({"defenses": [{"cgd_classifier": {"guides": ["b"]}}]}, "no guide called"),
    ({"defenses": [{"finetune": {"guides": ["public"]}}]}, "finetune asks no judge"),
    ({"evaluate": {"probe": True}}, "probe is measured on CLIPs"),
    ({"recipes": {**LABELLED["recipes"], "victim": {**FIT, "momentum": 1.0}}}, "momentum must lie"),
    ({"data": {"cifar1": {"root": "."}}}, "Did you mean 'cifar10'"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[words for _, words in REFUSED])
def test_what_cannot_be_meant_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    said = refusal(tmp_path, **changes)
    assert message in said
    assert "tiny.yaml" in said or "smoke" in said


def test_guides_are_for_classifiers(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="guides judge the data of image classifiers"):
        load_grid(str(write_grid_file(tmp_path, guides={"public": {}})))


def test_an_attack_that_keeps_labels_may_not_take_more_than_half_of_a_class(tmp_path: Path) -> None:
    world = {**TINY["data"]["world"], "suspect": 2000}
    attacks = [{"sig": {"variant": "clean_label", "rates": [0, 0.02, 0.03]}}]
    plan = make_plan(load(tmp_path, data={"world": world}, attacks=attacks))
    ((cell, reason),) = [(c, r) for c, r in plan.refused if c.defense.label == "none"]
    assert cell.rate == "0.03"
    assert "60 are more than half of the about 100" in reason
    assert "Poison at most 50 rows, a rate of 0.025" in reason


# --- who shares what


def test_another_guide_changes_only_what_it_judged(tmp_path: Path) -> None:
    guides = {"public": {}, "weak": {"recipe": {"epochs": 2}}}
    both = make_plan(load(tmp_path, guides=guides))
    cells = {cell.cell.label: cell for cell in both.cells}
    one, other = (cells[f"badnet/0.1/{name}/s0"].measure.defended for name in ("cgd", "cgd@weak"))
    assert one.victim is other.victim
    assert [a == b for a, b in zip(one.inputs, other.inputs, strict=True)].count(False) == 1
    assert one.inputs[-1] != other.inputs[-1]
    # The same defenses under one guide have the keys that they have here.
    alone = {c.cell.label: c for c in make_plan(load(tmp_path, guides={"public": {}})).cells}
    for label, cell in alone.items():
        assert cell.measure.key == cells[label].measure.key
    swapped = make_plan(load(tmp_path, guides={"public": {"recipe": {"epochs": 2}}}))
    moved = {
        c.cell.label for c in swapped.cells if c.measure.key != cells[c.cell.label].measure.key
    }
    assert moved == {label for label in alone if "/cgd/" in label}
    assert load(tmp_path, guides=guides).identity_hash != load(tmp_path).identity_hash


def test_a_backdoored_guide_is_the_victim_of_another_grid(tmp_path: Path) -> None:
    clip = write_grid_file(tmp_path / "clip")
    cells = make_plan(load_grid(str(clip))).cells
    victim = next(c.victim for c in cells if c.cell.label == "badnet/0.1/none/s0")
    guides = {"public": {}, "badnet": {"cell": "badnet/0.1/none/s0", "of": str(clip)}}
    plan = make_plan(load(tmp_path, guides=guides))
    stages = [c.measure.defended.guide for c in plan.cells if c.cell.defense.label == "cgd@badnet"]
    assert {stage.key for stage in stages if stage} == {victim.key}
    assert victim.key in plan.stages
    # What else that grid holds is no part of this one's identity.
    more = write_grid_file(tmp_path / "clip", defenses=["none", "cleanclip"], seeds=[0, 1])
    guides["badnet"]["of"] = str(more)
    assert load(tmp_path, guides=guides).identity_hash == plan.grid.identity_hash
    other = write_grid_file(tmp_path / "clip", attacks=[{"badnet": {"patch": 4}}])
    guides["badnet"]["of"] = str(other)
    assert load(tmp_path, guides=guides).identity_hash != plan.grid.identity_hash


def test_weights_of_a_file_judge_by_what_they_are(tmp_path: Path) -> None:
    # Under the names that open_clip gives them.
    found = fresh(ModelSpec(size=64), 0).net.state_dict()
    state = {name: tensor.contiguous() for name, tensor in found.items()}
    paths = [tmp_path / "a.safetensors", tmp_path / "elsewhere.safetensors"]
    keys = []
    bench = Bench(Store(tmp_path / "store"), Runtime(), lambda line: None, Ledger())
    for path in paths:
        save_file(state, path)
        guides = {"own": {"weights": str(path), "model": {"arch": "tiny", "size": 64}}}
        plan = make_plan(load(tmp_path, guides=guides))
        (stage,) = {s for s in plan.stages.values() if isinstance(s, FileModelStage)}
        assert stage.weights.sha256 == file_sha256(path)
        stage.run(bench)
        loaded = bench.lab(stage.model).load(ModelRef(stage.key)).state_dict()
        assert all(torch.equal(tensor, loaded[f"net.{name}"]) for name, tensor in state.items())
        keys.append((stage.key, plan.grid.identity_hash))
    assert keys[0] == keys[1]
    assert bench.ledger.made == [keys[0][0]]
    paths[1].write_bytes(b"other weights")
    with pytest.raises(GridError, match="has changed since the grid file was read"):
        stage.run(replace(bench, store=Store(tmp_path / "other")))


# --- pictures on disk


def picture_folder(root: Path, names: tuple[str, ...], rows: int) -> None:
    rng = np.random.default_rng(0)
    for part, count in (("train", rows), ("test", rows // 2)):
        for index, name in enumerate(names):
            folder = root / part / name
            folder.mkdir(parents=True)
            for row in range(count):
                level = np.full((32, 32, 3), 60 * index, dtype=np.uint8)
                level[rng.integers(0, 20) :, :, index % 3] += 40
                Image.fromarray(level).save(folder / f"{row}.png")


def test_a_grid_runs_on_ones_own_folders(tmp_path: Path) -> None:
    root = tmp_path / "pictures"
    picture_folder(root, ("red_fox", "owl", "hare"), 30)
    data = {"image_folder": {"root": str(root), "clean": 9, "tuning": 18, "public": 6}}
    changes: dict[str, Any] = {
        "data": data,
        "target": "owl",
        "defenses": ["none", "finetune"],
        "evaluate": {},
        "recipes": {
            "victim": {**FIT, "batch_size": 8, "epochs": 2},
            "repair": {**FIT, "batch_size": 8},
        },
    }
    found = load(tmp_path, **changes)
    assert isinstance(found.data, FilesData)
    assert found.evaluate.sets == ("report",)
    assert sorted(found.data.classes) == ["hare", "owl", "red fox"]
    assert found.data.suspect == 90 - 9 - 18 - 6
    run_serial(found, tmp_path / "out", tmp_path / "store")
    rows = [r for r in records(tmp_path / "out", "rows") if r["metric"] == "clean_top1"]
    assert {row["n"] for row in rows} == {45}
    assert "have no 'shifted' split" in refusal(
        tmp_path, **{**changes, "evaluate": {"sets": ["shifted"]}}
    )
    assert "clean needs rows" in refusal(
        tmp_path, **{**changes, "data": {"image_folder": {"root": str(root), "clean": 0}}}
    )
    recipes = {**changes["recipes"], "reference": {**RECIPE, "batch_size": 2}}
    assert "these have labels alone" in refusal(tmp_path, **{**changes, "recipes": recipes})


# --- one that is run


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two grids with one store: a CLIP's, whose victim then judges a classifier's data."""
    folder = tmp_path_factory.mktemp("ran")
    clip = write_grid_file(folder / "clip", defenses=["none"])
    run_serial(load_grid(str(clip)), folder / "out" / "clip", folder / "store")
    guides = {"public": {}, "badnet": {"cell": "badnet/0.1/none/s0", "of": str(clip)}}
    path = write(folder, guides=guides)
    run_serial(load_grid(str(path)), folder / "out" / "labelled", folder / "store")
    return folder


def test_its_rows_say_what_was_attacked_and_who_judged(ran: Path) -> None:
    rows = records(ran / "out" / "labelled", "rows")
    assert {row["track"] for row in rows} == {"supervised"}
    assert {row["model"] for row in rows} == {"preact_tiny-32"}
    cells = {row["label"]: row["status"] for row in rows if row["metric"] == "cell"}
    assert set(cells) == {
        f"badnet/{rate}/{defense}/s0"
        for rate in ("0", "0.1")
        for defense in ("none", "finetune", "cgd", "cgd@badnet")
    }
    assert set(cells.values()) == {"ok"}
    found = {(row["label"], row["metric"]) for row in rows}
    assert ("badnet/0.1/cgd@badnet/s0", "found_judge_auroc") in found
    assert ("badnet/0.1/cgd/s0", "found_not_clean_contamination") in found
    judged = {
        row["label"]: row["value"]
        for row in rows
        if row["metric"] == "found_judge_auroc" and row["eval_set"] != "shifted"
    }
    assert judged["badnet/0.1/cgd/s0"] != judged["badnet/0.1/cgd@badnet/s0"]


def test_a_guide_that_the_store_holds_is_not_trained_again(ran: Path) -> None:
    plan = make_plan(load_grid(str(ran / "tiny.yaml")))
    clips = {s.key for s in plan.stages.values() if isinstance(s, ModelStage) and s.init}
    assert len(clips) == 1
    made = {row["key"] for row in records(ran / "out" / "labelled", "stages") if not row["reused"]}
    assert not clips & made


def test_score_maps_show_both_ranks_and_the_split(
    ran: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = make_plan(load_grid(str(ran / "tiny.yaml")))
    maps = score_maps(plan, Store(ran / "store"), None)
    assert [(m.attack, m.defense) for m in maps] == [
        (f"badnet {rate}", defense) for rate in ("0", "0.1") for defense in ("cgd", "cgd@badnet")
    ]
    for found in maps:
        assert found.names == ("early", "judge")
        assert len(found.roles_N) == len(found.x_N) == 64
        kept = box_of(found, found.kept_N)
        assert kept is not None
        assert kept[1] <= 0.8
    assert box_of(maps[0], np.arange(64) % 7 == 0) is None
    answer = call(
        capsys,
        *("scores", ran / "tiny.yaml", "--out", ran / "drawn", "--store", ran / "store"),
        *("--only", "rate=0.1"),
    )
    assert answer.code == 0, answer.err
    picture = ran / "drawn" / "scores.png"
    assert answer.out.strip() == str(picture)
    with Image.open(picture) as drawn:
        assert min(drawn.size) > 300
    empty = call(
        capsys,
        *("scores", ran / "tiny.yaml", "--store", ran / "store", "--only", "defense=finetune"),
    )
    told = "2 of 2 cells are finished, and their defenses give rows so many scores: finetune no"
    assert told in empty.err, "it said to run the grid, which had run"
    absent = call(capsys, "scores", ran / "tiny.yaml", "--store", tmp_path / "none")
    assert "cells is finished. Run the grid first." in absent.err


def test_rows_show_who_judged_and_no_rate_that_was_not_used(ran: Path) -> None:
    rows = [r for r in records(ran / "out" / "labelled", "rows") if r["metric"] == "cell"]
    shown = {r["label"].split("/")[2]: (json.loads(r["defense_params"]), r["lr"]) for r in rows}
    assert shown["cgd"][0]["guide"] == "public"
    assert shown["cgd@badnet"][0]["guide"] == "badnet"
    assert "guide" not in shown["finetune"][0]
    assert (shown["cgd"][1], shown["finetune"][1]) == (None, 0.02)


def test_a_recipe_that_a_defense_does_not_train_by_is_not_in_its_key(tmp_path: Path) -> None:
    repair = {**FIT, "lr": 0.07}
    plain = make_plan(load(tmp_path / "plain"))
    other = make_plan(load(tmp_path, recipes={**LABELLED["recipes"], "repair": repair}))
    keys = {cell.cell.label: cell.measure.key for cell in other.cells}
    moved = {c.cell.label for c in plain.cells if keys[c.cell.label] != c.measure.key}
    assert moved == {"badnet/0/finetune/s0", "badnet/0.1/finetune/s0"}


def test_a_grid_does_not_read_itself(tmp_path: Path) -> None:
    own = str(write(tmp_path))
    assert "its victims are no CLIPs" in refusal(tmp_path, guides={"a": {"cell": "x", "of": own}})


def test_a_finished_grid_whose_weights_have_changed_is_not_finished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = tmp_path / "judge.safetensors"

    def put(seed: int) -> None:
        state = fresh(ModelSpec(), seed).net.state_dict()
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, weights)

    put(0)
    path = write(tmp_path, guides={"own": {"weights": str(weights)}})
    where = ("--out", tmp_path / "out", "--store", tmp_path / "store")
    assert call(capsys, "run", path, *where, "--executor", "serial").code == 0
    assert call(capsys, "check", path, *where).code == 0
    put(1)
    assert call(capsys, "check", path, *where).code == 3
    again = call(capsys, "run", path, *where, "--executor", "serial")
    assert "nothing to run" not in again.out + again.err
    assert call(capsys, "check", path, *where).code == 0
