"""Sets on disk that a grid file names under `evaluate`, from the file to the rows."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from analysis.board import load_board
from analysis.query import run_sql
from analysis.render import render
from grid.export import export_cell
from grid.gridfile import load_grid
from grid.measure import MeasureStage
from grid.planning import make_plan
from grid.preflight import data_places
from grid.results import read_measure
from grid.stages import CorpusStage
from tests.grids import outcomes, records, run_serial, tiny_grid, write_grid_file
from tests.set_files import VAL, below, by_class, names_text, trained, write
from tests.test_retrieval_sets import coco
from victims import heads
from victims.corpora import corpus_key
from victims.errors import UsageError
from victims.evaluation_sets import evaluation_splits
from victims.measuring import Share, templates_digest
from victims.prompts import prompt_templates
from victims.store import Store


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """COCO and an ImageNet of three classes."""
    root = tmp_path_factory.mktemp("sets")
    coco(root)
    own: dict[str, bytes | str] = {"classnames.txt": names_text(), **below("val", by_class())}
    for of in range(3):
        own |= below(f"train/n0000000{(3, 7, 9)[of]}", trained(of))
    write(root / "imagenet", own)
    return root


def evaluate(root: Path, **more: Any) -> dict[str, Any]:
    return {
        "sets": ["report"],
        "ks": [1],
        "retrieval": {"set": "coco", "root": str(root)},
        "others": [{"set": "imagenet", "root": str(root), "probe": True, "templates": "photo2"}],
        **more,
    }


@pytest.fixture(scope="module")
def ran(sets: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Any]:
    folder = tmp_path_factory.mktemp("further")
    more = {"defenses": ["none"], "evaluate": evaluate(sets)}
    grid = tiny_grid(folder, **more)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(heads, "WORTH_KEEPING", 1)
        run_serial(grid, folder / "out", folder / "store")
    return folder / "out", folder / "store", grid


def test_further_sets_have_rows_of_their_own(ran: tuple[Path, Path, Any]) -> None:
    out = ran[0]
    assert {row["status"] for row in outcomes(out).values()} <= {"ok", "inert"}
    rows = {
        (row["eval_set"], row["metric"]): row
        for row in records(out, "rows")
        if row["attack"] == "badnet" and row["count"]
    }
    asr = rows["coco", "image_to_text_asr_top1"]
    assert asr["n"] == 2, "of three pictures the captions of one name the target"
    assert asr["clean_victim"] is not None
    assert rows["coco", "image_to_text_top1"]["n"] == 3
    assert rows["coco", "text_to_image_top1"]["n"] == 15
    assert ("report", "image_to_text_top1") not in rows, "a set is named in the place of these"
    for metric in ("clean_top1", "probe_clean_top1"):
        row = rows["imagenet", metric]
        assert (row["n"], row["status"]) == (len(VAL), "ok")
        assert row["clean_victim"] is not None
        assert row["init_model"] is not None
    assert ("imagenet", "asr_top1") not in rows
    said = templates_digest(prompt_templates("photo2"))
    assert rows["imagenet", "clean_top1"]["templates_digest"] == said
    assert rows["coco", "image_to_text_top1"]["templates_digest"] is None
    assert rows["coco", "image_to_text_top1"]["eval_digest"]


def test_a_board_says_what_it_has_no_columns_for(ran: tuple[Path, Path, Any]) -> None:
    """A retrieval set's board was all dashes, "not measured", though the numbers were there."""
    out = ran[0]
    for name, metric in (("coco", "text_to_image_top1"), ("imagenet", "probe_clean_top1")):
        board = load_board(out, name)
        (note,) = [note for note in board.notes() if metric in note]
        query, place = shlex.split(note.split("See them with: ")[1])[2:4]
        assert place == "--in"
        answer, _ = run_sql(out, query)
        assert {line[3] for line in answer.rows} == set(board.further)
    shown = " ".join(render(load_board(out, "coco")).split())
    assert "none: neither CA nor ASR measured on evaluation set coco, but image_to_text" in shown
    assert not load_board(out).further


def test_a_card_tells_of_retrieval_and_probes(ran: tuple[Path, Path, Any], tmp_path: Path) -> None:
    out, store, _ = ran
    export_cell(out, "badnet/0.1/none/s0", tmp_path / "model", str(store))
    card = (tmp_path / "model" / "README.md").read_text()
    assert "| coco | captions that find their picture first (R@1) |" in card
    assert "| imagenet | clean accuracy of a linear probe |" in card


def test_what_stamps_nothing_has_no_stamped_retrieval(sets: Path, tmp_path: Path) -> None:
    attacks = [{"mmpoison": {"source": "tree", "counts": [2]}}]
    plan = make_plan(tiny_grid(tmp_path, attacks=attacks, evaluate=evaluate(sets)))
    names = ("image_to_text_top1", "image_to_text_asr_top1", "image_to_text_target_top1")
    shares = {name: Share(1, 2) for name in names}
    assert plan.cells[0].measure._not_applicable(shares) == list(names[1:])


def test_a_measurement_says_which_set_it_was(ran: tuple[Path, Path, Any]) -> None:
    """T46: the name of a set stands beside the digest of its files."""
    _, store, grid = ran
    found = read_measure(Store(store), make_plan(grid).cells[0].measure)["sets"]
    assert {name: about.get("set") for name, about in found.items()} == {
        "report": None,
        "coco": "coco",
        "imagenet": "imagenet",
    }
    assert found["coco"]["fingerprint"] == grid.evaluate.retrieval_sets[0].fingerprint
    assert found["imagenet"]["fingerprint"] == grid.evaluate.others[0].report.fingerprint


def test_heads_are_kept_for_all_cells_of_a_text_tower(ran: tuple[Path, Path, Any]) -> None:
    """Of each text tower one head for the world's prompts and one for the set's."""
    _, store, grid = ran
    plan = make_plan(grid)
    measured = {stage.defended.key: stage for cell in plan.cells for stage in cell.stages}
    gates = [stage for gate in plan.gates.values() for stage in gate.stages]
    keys = {
        Store(store).need(s.defended.key).meta["model_key"] for s in (*measured.values(), *gates)
    }
    assert len(Store(store).keys("head")) == 2 * len(keys)
    assert len(measured) + len(gates) > len(keys), "cells share towers"


# --- identity


def test_where_a_set_lies_is_no_part_of_a_grid(sets: Path, tmp_path: Path) -> None:
    import shutil

    there = tmp_path / "there"
    shutil.copytree(sets, there)
    first = tiny_grid(tmp_path / "a", evaluate=evaluate(sets))
    again = tiny_grid(tmp_path / "b", evaluate=evaluate(there))
    assert first.identity_hash == again.identity_hash
    assert [c.key for c in make_plan(first).cells] == [c.key for c in make_plan(again).cells]


@pytest.mark.parametrize(
    "changes",
    [
        {"retrieval": True},
        {"retrieval": {"rows": 2}},
        {"others": []},
        {"others": {"templates": "photo"}},
        {"others": {"templates": ["a {}"]}},
        {"others": {"probe": False}},
        {"others": {"rows": 3}},
    ],
)
def test_what_is_measured_is_part_of_a_grid(
    sets: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    plain = evaluate(sets)
    changed = dict(plain)
    for name, value in changes.items():
        of = plain[name] if isinstance(plain[name], dict) else plain[name][0]
        changed[name] = {**of, **value} if isinstance(value, dict) else value
    first = tiny_grid(tmp_path / "a", evaluate=plain)
    other = tiny_grid(tmp_path / "b", evaluate=changed)
    assert first.identity_hash != other.identity_hash
    measures = [{c.measure.key for c in make_plan(g).cells} for g in (first, other)]
    assert not measures[0] & measures[1]
    gates = [make_plan(g).gates for g in (first, other)]
    assert [g.stages[0].key for g in gates[0].values()] == [
        g.stages[0].key for g in gates[1].values()
    ], "the tuning split is judged as it was"


def test_grids_without_further_sets_keep_their_keys(tmp_path: Path) -> None:
    plain = tiny_grid(tmp_path / "a")
    spelled = tiny_grid(tmp_path / "b", evaluate={"others": [], "retrieval": False})
    assert plain.identity_hash == spelled.identity_hash
    assert [c.key for c in make_plan(plain).cells] == [c.key for c in make_plan(spelled).cells]


# --- the file


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"retrieval": {"set": "cocoo", "root": "ROOT"}}, "no retrieval set .* mean 'coco'"),
        ({"retrieval": {"set": "coco"}}, "missing key 'root'"),
        ({"retrieval": {"set": "coco", "root": "ROOT", "row": 1}}, "unknown key 'row'"),
        ({"retrieval": {"set": "coco", "root": "ROOT/none"}}, r"retrieval: coco: looked for"),
        ({"retrieval": "coco"}, "expected a mapping"),
        ({"retrieval": [{"set": "coco", "root": "ROOT"}] * 2}, "holds a value twice: coco, coco"),
        ({"others": {"set": "imagenet", "root": "ROOT", "templates": "photos"}}, "mean 'photo'"),
        ({"others": {"set": "imagenet", "root": "ROOT", "templates": ["x"]}}, r"have \{\} once"),
        ({"others": {"set": "imagenette", "root": "ROOT"}}, "Did you mean 'imagenet'"),
        ({"others": {"set": "imagenet", "root": "ROOT", "rows": 99}}, "report 99 rows of 7"),
        ({"retrievals": True}, "unknown key 'retrievals'. Did you mean 'retrieval'"),
    ],
)
def test_a_mistake_is_answered_with_its_place(
    sets: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    def placed(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: placed(item) for name, item in value.items()}
        if isinstance(value, list):
            return [placed(item) for item in value]
        return value.replace("ROOT", str(sets)) if isinstance(value, str) else value

    path = write_grid_file(tmp_path, evaluate=placed(changes))
    with pytest.raises(UsageError, match=said) as caught:
        load_grid(str(path))
    assert str(path) in str(caught.value)


def test_a_classifier_is_not_asked_about_further_sets(sets: Path, tmp_path: Path) -> None:
    path = write_grid_file(tmp_path, track="supervised", evaluate=evaluate(sets, retrieval=False))
    with pytest.raises(UsageError, match="others is measured on CLIPs"):
        load_grid(str(path))


# --- the plan


def test_nodes_are_asked_for_the_files(sets: Path, tmp_path: Path) -> None:
    plan = make_plan(tiny_grid(tmp_path, evaluate=evaluate(sets)))
    assert data_places(plan.stages.values(), Store(tmp_path / "store")) == [str(sets)]


def test_a_split_that_was_cut_from_test_pictures_is_said_in_the_plan(
    sets: Path, tmp_path: Path
) -> None:
    plan = make_plan(tiny_grid(tmp_path))
    assert not any("cut from the test" in line for line in plan.cautions())
    cut = evaluation_splits("imagenet", str(sets), 32, tuning=1, tuning_from="test")["tuning"]
    plan.add(CorpusStage(cut))
    assert any("cut from the test pictures" in line for line in plan.cautions())
    assert corpus_key(cut) in plan.stages


def test_a_measurement_waits_for_all_of_its_sets(sets: Path, tmp_path: Path) -> None:
    grid = tiny_grid(tmp_path, evaluate=evaluate(sets))
    stage = make_plan(grid).cells[0].measure
    assert isinstance(stage, MeasureStage)
    wanted = {corpus_key(grid.evaluate.retrieval_sets[0])}
    wanted |= {corpus_key(s) for s in (grid.evaluate.others[0].report,) if s}
    assert wanted <= set(stage.inputs)
    assert wanted <= {parent.key for parent in stage.parents}
    assert replace(stage, others=(), retrieval_sets=()).key != stage.key
