"""Grids on ingested pairs: what a file may say, what the store holds, and that the numbers are
those of the same pairs in a corpus of their own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pyarrow.feather as feather
import pytest
import torch

from grid.data import CorpusData
from grid.gridfile import load_grid
from grid.planning import make_plan
from grid.preflight import data_places
from grid.stages import Bench, CorpusStage, TriggerStage
from tests.grids import (
    OPEN_GATE,
    RECIPE,
    call,
    numbers,
    outcomes,
    records,
    run_serial,
    write_grid_file,
)
from tests.pairs import ingested, labelled_folder, request, world_pairs, write_shards
from victims.corpora import Reader, build_corpus, corpus_key, open_corpus, whole
from victims.errors import GridError, UsageError
from victims.evaluation_sets import EvaluationSet
from victims.ingested import IngestedPairs
from victims.lab import DataRef, Lab, Ledger
from victims.models import ModelSpec
from victims.pair_folders import (
    MANIFEST,
    ChosenCaptions,
    ChosenImages,
    open_images,
    pictures_of,
    read_folder,
)
from victims.prompts import prompt_templates
from victims.recipe import Recipe, Runtime
from victims.store import Store
from victims.world import CLASSES

PAIRS = 220


class Made(NamedTuple):
    pairs: Path
    labelled: Path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Pairs of the embedded world that were ingested, and a labelled set of its pictures."""
    folder = tmp_path_factory.mktemp("made")
    shards = write_shards(folder / "shards", world_pairs(PAIRS + 10), 50)
    ingested(request(shards, limit=PAIRS), folder / "pairs")
    rows = {"train": ("tuning", 120), "test": ("report", 80)}
    return Made(folder / "pairs", labelled_folder(folder / "labelled", rows))


def corpus_of(made: Made, **changes: Any) -> dict[str, Any]:
    corpus = {
        **{"pairs": str(made.pairs), "suspect": 96, "clean": 40, "public": 64},
    }
    judge = {
        **{"set": "image_folder", "root": str(made.labelled), "tuning": 1},
        "templates": ["a photo of a {}", "this is a {}"],
    }
    judge |= changes.pop("judge", {})
    return {"corpus": {**corpus, "judged_by": judge, **changes}}


def grid_of(folder: Path, made: Made, corpus: Mapping[str, Any] | None = None, **more: Any) -> Any:
    data = corpus_of(made, **(corpus or {}))
    return load_grid(str(write_grid_file(folder, data=data, **more)))


# --- what is read


def test_chosen_rows_answer_as_an_array_of_them_does() -> None:
    rng = np.random.default_rng(0)
    images_NCHW = rng.integers(0, 256, (20, 3, 4, 4), dtype=np.uint8)
    images_NCHW.setflags(write=False)
    rows = rng.permutation(20)[:9].astype(np.int64)
    chosen, wanted = ChosenImages(images_NCHW, rows), images_NCHW[rows]
    assert (len(chosen), chosen.shape, chosen.ndim) == (9, (9, 3, 4, 4), 4)
    assert chosen.dtype == np.uint8
    some = np.array([3, 3, 0])
    mask = np.arange(9) % 2 == 0
    indices: Sequence[Any] = [4, -1, np.int64(2), some, slice(2, 5), slice(None), mask, [1, 0]]
    for index in indices:
        found = chosen[index]
        assert type(found) is np.ndarray
        assert np.array_equal(found, wanted[index])
        torch.from_numpy(found).add_(1)  # a copy, which may be written to
    assert [image.tobytes() for image in chosen] == [image.tobytes() for image in wanted]
    for index in (9, [0, 9]):
        with pytest.raises(IndexError):
            chosen[index]


def test_only_chosen_captions_are_read_and_when_they_are_asked_for(made: Made) -> None:
    rows = np.array([5, 0, 7], dtype=np.int64)
    captions = ChosenCaptions(made.pairs / "pairs.arrow", rows)
    nowhere = ChosenCaptions(made.pairs / "nothing.arrow", rows)
    assert len(nowhere) == 3
    every = [pair.caption for pair in world_pairs(8)]
    assert list(captions) == [every[5], every[0], every[7]]
    assert captions[-1] == every[7]
    assert captions[:2] == [every[5], every[0]]


# --- what a file may say


def test_splits_are_disjoint_and_growing_one_moves_no_other(made: Made, tmp_path: Path) -> None:
    def rows(data: CorpusData) -> dict[str, list[int]]:
        specs = {n: data.corpus(n) for n in ("suspect", "clean", "public") if data.rows(n)}
        assert all(isinstance(spec, IngestedPairs) for spec in specs.values())
        return {n: s.rows().tolist() for n, s in specs.items() if isinstance(s, IngestedPairs)}

    found = rows(grid_of(tmp_path, made).data)
    assert {n: len(r) for n, r in found.items()} == {"suspect": 96, "clean": 40, "public": 64}
    assert len({row for split in found.values() for row in split}) == 200
    more = rows(grid_of(tmp_path, made, {"suspect": 110}).data)
    assert more["suspect"][:96] == found["suspect"]
    assert (more["clean"], more["public"]) == (found["clean"], found["public"])
    more = rows(grid_of(tmp_path, made, {"clean": 50}).data)
    assert more["clean"][-40:] == found["clean"]
    assert (more["suspect"], more["public"]) == (found["suspect"], found["public"])
    more = rows(grid_of(tmp_path, made, {"public": 70}).data)
    assert more["public"][-64:] == found["public"]
    assert more["suspect"] == found["suspect"]
    other = rows(grid_of(tmp_path, made, {"seed": 1}).data)
    assert other["suspect"] != found["suspect"]
    pool = {"rows": 35, "pool": "overlap"}
    overlap = grid_of(tmp_path, made, {"clean": pool, "suspect": 150}).data
    assert rows(overlap)["clean"] == rows(overlap)["suspect"][:35]
    assert overlap.corpus("clean").split == overlap.corpus("suspect").split


def test_prompts_come_by_name_or_as_a_list_and_are_no_part_of_the_pairs(
    made: Made, tmp_path: Path
) -> None:
    listed = grid_of(tmp_path, made)
    named = grid_of(tmp_path, made, {"judge": {"templates": "label"}})
    default = grid_of(tmp_path, made, {"judge": {"templates": "imagenet80"}})
    assert tuple(listed.data.templates) == ("a photo of a {}", "this is a {}")
    assert tuple(named.data.templates) == prompt_templates("label") == ("{}",)
    assert len(default.data.templates) == 80
    for split in ("suspect", "clean", "public"):
        keys = {corpus_key(grid.data.corpus(split)) for grid in (listed, named, default)}
        assert len(keys) == 1, "a victim is not trained again for other prompts"
    reports = {corpus_key(grid.data.corpus("report")) for grid in (listed, named, default)}
    assert len(reports) == 3
    assert listed.evaluate.sets == ("report",)
    assert list(listed.data.classes) == sorted(CLASSES)
    assert [listed.data.classes[t] for t in listed.targets] == ["circle"]


def test_pairs_are_others_for_other_rows_or_contents(made: Made, tmp_path: Path) -> None:
    spec = grid_of(tmp_path, made).data.corpus("suspect")
    others = [
        *(replace(spec, num_rows=95), replace(spec, seed=1), replace(spec, offset=1)),
        *(replace(spec, digest="0" * 64), replace(spec, behind=0)),
    ]
    assert len({corpus_key(one) for one in (spec, *others)}) == len(others) + 1
    assert corpus_key(replace(spec, root="/elsewhere")) == corpus_key(spec)
    with pytest.raises(UsageError, match=r"rows 200\.\.295 were asked for, .* has 220 pairs"):
        replace(spec, offset=200)


def test_names_of_classes_are_in_what_attacks_make_and_in_no_clean_victim(
    made: Made, tmp_path: Path
) -> None:
    """A class that was renamed had all clean victims trained again."""
    attacks = ["badnet", "mmpoison"]
    other = tmp_path / "labelled"
    shutil.copytree(made.labelled, other)
    for part in ("train", "test"):
        (other / part / "cross").rename(other / part / "crucifix")
    before, after = (
        make_plan(grid_of(tmp_path, made, {"judge": judge}, attacks=attacks, rates=[0, 0.05]))
        for judge in ({}, {"root": str(other)})
    )
    assert [c.cell.label for c in before.cells] == [c.cell.label for c in after.cells]
    for one, two in zip(before.cells, after.cells, strict=True):
        same = one.cell.count == 0
        assert (one.victim.key == two.victim.key) is same, one.cell
        assert (one.stages[-1].key == two.stages[-1].key) is False
    stage = next(s for s in after.stages.values() if isinstance(s, TriggerStage))
    store = Store(tmp_path / "store")
    build_corpus(store, stage.corpus.spec)
    assert "crucifix" in stage.held(store).corpus.classes


# --- pictures with several captions


@pytest.fixture(scope="module")
def several(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Forty pictures, most with five captions and one with thirty, in a mixed order."""
    folder, every = tmp_path_factory.mktemp("several"), world_pairs(40)
    said = [(n, f"{every[n].caption} {k}") for n in range(40) for k in range(30 if n == 7 else 5)]
    mixed = np.random.default_rng(0).permutation(len(said)).tolist()
    pairs = [
        every[said[row][0]]._replace(name=f"{at:05d}.png", caption=said[row][1])
        for at, row in enumerate(mixed)
    ]
    ingested(request(write_shards(folder / "in", pairs, 60)), folder / "pairs")
    return Made(folder / "pairs", made.labelled)


@pytest.mark.parametrize("seed", range(6))
def test_no_picture_is_in_two_splits(several: Made, tmp_path: Path, seed: int) -> None:
    """Of fifty clean rows 46 showed a picture of the suspect data: other captions of it."""
    folder = read_folder(several.pairs)
    assert (folder.rows, folder.about["pictures"], folder.about["most_captions"]) == (225, 40, 30)
    counts = {"suspect": 83, "clean": 42, "public": 37}
    data = grid_of(tmp_path, several, {**counts, "seed": seed}).data
    picture_N, shown = pictures_of(folder), dict[str, set[int]]()
    for name, count in counts.items():
        spec = data.corpus(name)
        assert isinstance(spec, IngestedPairs)
        rows = spec.rows()
        assert len(set(rows.tolist())) == len(rows) == count
        shown[name] = set(picture_N[rows].tolist())
        # The captions of a picture stand together; one picture at most is not all there.
        assert int((np.diff(picture_N[rows]) != 0).sum()) + 1 == len(shown[name])
    assert sum(map(len, shown.values())) == len(set.union(*shown.values()))
    more = grid_of(tmp_path, several, {**counts, "seed": seed, "clean": 44, "suspect": 90}).data
    for name in ("public", "clean"):
        one, two = data.corpus(name), more.corpus(name)
        assert isinstance(one, IngestedPairs)
        assert isinstance(two, IngestedPairs)
        assert two.rows().tolist()[-one.num_rows :] == one.rows().tolist()


def test_where_there_is_no_room_to_keep_pictures_together_it_is_said(
    several: Made, tmp_path: Path
) -> None:
    full = {"suspect": 101, "clean": 62, "public": 62}
    found = list[str]()
    for seed in range(4):
        with pytest.raises(UsageError, match=r"picture.*(ask|Ask) for .*fewer") as raised:
            grid_of(tmp_path, several, {**full, "seed": seed})
        found.append(str(raised.value))
    assert len(found) == 4


def test_pairs_of_an_earlier_version_are_cut_as_they_were_and_that_is_said(
    made: Made, several: Made, tmp_path: Path
) -> None:
    plan = make_plan(grid_of(tmp_path, made))
    assert not any("show one picture" in line for line in plan.cautions())
    old = tmp_path / "old"
    shutil.copytree(several.pairs, old)
    about = json.loads((old / MANIFEST).read_text())
    unknown = ("pictures", "most_captions")
    (old / MANIFEST).write_text(
        json.dumps({**{n: v for n, v in about.items() if n not in unknown}, "form": 1})
    )
    table = feather.read_table(old / "pairs.arrow", memory_map=False).drop_columns("picture")
    feather.write_feather(table, old / "pairs.arrow", compression="uncompressed")
    grid = grid_of(tmp_path, several, {"pairs": str(old), "suspect": 100, "clean": 61})
    assert sum("show one picture" in line for line in make_plan(grid).cautions()) == 1
    spec = grid.data.corpus("suspect")
    assert isinstance(spec, IngestedPairs)
    assert len(set(spec.rows().tolist())) == 100


def test_where_pairs_lie_is_no_part_of_a_key(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CORPORA", str(tmp_path))
    shutil.copytree(made.pairs, tmp_path / "moved")
    here = grid_of(tmp_path, made)
    there = grid_of(tmp_path, made, {"pairs": "$CORPORA/moved"})
    beside = grid_of(tmp_path, made, {"pairs": "moved"})
    assert here.identity_hash == there.identity_hash == beside.identity_hash
    assert there.data.corpus("suspect").root == str(tmp_path / "moved")
    assert beside.data.corpus("suspect").root == str(tmp_path / "moved")
    braced = grid_of(tmp_path, made, {"pairs": "${CORPORA}/moved"})
    assert braced.data.corpus("clean").root == str(tmp_path / "moved")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pairs": "$NO_SUCH/x"}, r"data\.corpus\.pairs: .*environment variable NO_SUCH"),
        ({"pairs": "nowhere"}, r"data\.corpus\.pairs: .*nowhere: no such folder"),
        ({"judge": {"root": "$NO_SUCH"}}, r"judged_by\.root: .*variable NO_SUCH"),
        ({"suspect": 200}, r"suspect 200 \+ clean 40 \+ public 64 = 304 rows of 220 pairs"),
        ({"suspect": 0}, r"data\.corpus\.suspect: at least 1"),
        ({"clean": {"rows": 97, "pool": "overlap"}}, "the suspect data has 96"),
        ({"judge": {"set": "imagefolder"}}, "Did you mean 'image_folder'"),
        ({"judge": {"templates": "imagnet80"}}, "Did you mean 'imagenet80'"),
        ({"judge": {"templates": ["a photo"]}}, r"'a photo' must have \{\} once"),
        ({"judge": {"templates": ["{} {x}"]}}, "must have"),
        ({"judge": {"tuning": 0}}, "at least 1 a class"),
        ({"judge": {"tuning": 500}}, "tuning needs 500 pictures of each class"),
        ({"judge": {"report": 500}}, "500 rows of 80 test pictures"),
        ({"sise": 32}, "sise"),
    ],
)
def test_what_cannot_be_meant_is_answered_with_its_place(
    changes: dict[str, Any], message: str, made: Made, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        grid_of(tmp_path, made, changes)


def test_other_keys_that_do_not_fit_are_answered(made: Made, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="64 px, but the pictures of `data` have 32 px"):
        grid_of(tmp_path, made, model={"arch": "tiny", "size": 64})
    with pytest.raises(UsageError, match=r"regime F starts from a public model.*regime: S"):
        grid_of(tmp_path, made, {"public": 0})
    with pytest.raises(UsageError, match="a probe is trained on clean rows"):
        grid_of(tmp_path, made, evaluate={"probe": True})
    with pytest.raises(UsageError, match="no 'shifted' split"):
        grid_of(tmp_path, made, evaluate={"sets": ["report", "shifted"]})
    with pytest.raises(UsageError, match=r"Known: .*world"):
        grid_of(tmp_path, made, track="supervised", model="preact_tiny")
    scratch = {"victim": RECIPE, "repair": RECIPE}
    found = grid_of(tmp_path, made, {"public": 0}, regime="S", recipes=scratch)
    assert make_plan(found).num_victims() == 2
    reader = [{"badclip": {"variant": "released"}}]
    with pytest.raises(UsageError, match=r"badclip reads a public model.*there are none"):
        grid_of(tmp_path, made, {"public": 0}, regime="S", recipes=scratch, attacks=reader)


# --- what the store holds


def test_the_store_points_to_the_pixels(made: Made, tmp_path: Path) -> None:
    grid = grid_of(tmp_path, made)
    spec, store = grid.data.corpus("suspect"), Store(tmp_path / "store")
    artefact = build_corpus(store, spec)
    assert sum(artefact.files.values()) < 96 * 8 + 1000
    corpus = open_corpus(store, corpus_key(spec), Reader.TRAINING)
    images, every = open_images(read_folder(made.pairs)), world_pairs(PAIRS)
    assert np.array_equal(corpus.images_NCHW[:], images[spec.rows()])
    assert list(corpus.captions) == [every[row].caption for row in spec.rows()]
    assert (corpus.size, len(corpus), corpus.split) == (32, 96, "suspect")
    assert set(corpus.labels.tolist()) == {-1}
    assert not corpus.is_labelled
    other = build_corpus(store, grid.data.corpus("public"))
    assert other.meta["digest"] != corpus.digest


def test_pairs_that_changed_or_went_are_said(made: Made, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(made.pairs, moved)
    spec = grid_of(tmp_path, made, {"pairs": str(moved)}).data.corpus("suspect")
    store, key = Store(tmp_path / "store"), corpus_key(spec)
    build_corpus(store, spec)
    with (moved / "images.npy").open("r+b") as file:
        file.truncate(10_000)
    with pytest.raises(GridError, match=r"images\.npy: cannot be read"):
        open_corpus(store, key, Reader.TRAINING)
    about = json.loads((moved / MANIFEST).read_text())
    (moved / MANIFEST).write_text(json.dumps({**about, "digest": "0" * 64}))
    with pytest.raises(UsageError, match="holds pairs with the digest 0000000000000000"):
        open_corpus(store, key, Reader.TRAINING)
    shutil.rmtree(moved)
    with pytest.raises(GridError, match=r"moved: no such folder.*every node"):
        open_corpus(store, key, Reader.TRAINING)


def test_a_folder_that_moved_is_found_by_the_next_run(made: Made, tmp_path: Path) -> None:
    from grid.plan import finished

    moved, store = tmp_path / "moved", Store(tmp_path / "store")
    shutil.copytree(made.pairs, moved)
    before = make_plan(grid_of(tmp_path, made, {"pairs": str(moved)}))
    for stage in before.stages.values():
        if isinstance(stage, CorpusStage) and isinstance(stage.spec, IngestedPairs):
            build_corpus(store, stage.spec)
    held = finished(store, before)
    assert len(held) == 3
    after = make_plan(grid_of(tmp_path, made))
    assert finished(store, after) == held, "what points to the pairs does not depend on the path"
    # Both see the pairs in their own folder, whoever came first, and neither undoes the other's.
    kept = {key: store.need(key).meta for key in held}
    for key in (*held, *held):
        for plan in (before, after):
            stage = plan.stages[key]
            assert isinstance(stage, CorpusStage)
            stage.run(Bench(store, Runtime(), print, Ledger()))
            assert stage.open(store, Reader.TRAINING).images_NCHW[:].shape[1:] == (3, 32, 32)
    assert {key: store.need(key).meta for key in held} == kept
    shutil.rmtree(moved)
    for key in held:
        stage = after.stages[key]
        assert isinstance(stage, CorpusStage)
        assert len(stage.open(store, Reader.TRAINING)) == stage.spec.num_rows
        with pytest.raises(GridError, match="moved: no such folder"):
            open_corpus(store, key, Reader.TRAINING)


def test_a_cluster_is_asked_for_the_folders(made: Made, tmp_path: Path) -> None:
    plan = make_plan(grid_of(tmp_path, made))
    store = Store(tmp_path / "store")
    wanted = sorted([str(made.pairs), str(made.labelled)])
    assert data_places(plan.stages.values(), store) == wanted
    for stage in plan.stages.values():
        if isinstance(stage, CorpusStage):
            build_corpus(store, stage.spec)
    assert data_places(plan.stages.values(), store) == [str(made.pairs)]


# --- the numbers


@dataclass(frozen=True, slots=True, kw_only=True)
class Copied:
    """The same pairs as a corpus of their own, pixels and all."""

    name: ClassVar[str] = "copied"
    version: ClassVar[int] = 1

    of: Any

    split: str = "suspect"
    num_rows: int = 96
    classes: tuple[str, ...] = tuple(CLASSES)
    templates: tuple[str, ...] = ()

    def chunks(self) -> Iterator[Any]:
        return iter(self.of.chunks())


def test_a_victim_is_the_one_that_a_copy_of_the_pairs_makes(made: Made, tmp_path: Path) -> None:
    spec = grid_of(tmp_path, made).data.corpus("suspect")
    store, recipe = Store(tmp_path / "store"), Recipe(epochs=1, batch_size=32, lr=2e-3)
    lab = Lab(store, ModelSpec(arch="tiny", size=32), Runtime())
    weights, pixels = [], []
    for one in (spec, Copied(of=spec)):
        build_corpus(store, one)
        data = DataRef(corpus_key(one), 96)
        trained = lab.load(lab.train(lab.plain(recipe), data, recipe))
        weights.append(torch.cat([w.detach().flatten() for w in trained.parameters()]))
        read = whole(open_corpus(store, data.key, Reader.TRAINING)).reader(torch.device("cpu"))
        pixels.append(read(np.arange(96)))
    assert torch.equal(*pixels)
    assert torch.equal(*weights)
    assert weights[0].std() > 0


def test_simulated_attacks_halve_the_clean_pairs_without_copying(
    made: Made, tmp_path: Path
) -> None:
    from grid.tuning.scenes import SimulatedData

    of = grid_of(tmp_path, made).data
    halves = [SimulatedData(of=of).corpus(split) for split in ("suspect", "clean")]
    clean = of.corpus("clean")
    assert isinstance(clean, IngestedPairs)
    found = [half.rows().tolist() for half in halves if isinstance(half, IngestedPairs)]
    assert found[0] + found[1] == clean.rows().tolist()


def test_no_picture_is_in_both_halves(several: Made, tmp_path: Path) -> None:
    from grid.tuning.scenes import SimulatedData

    of = grid_of(tmp_path, several, {"suspect": 80, "clean": 44, "public": 40}).data
    halved, picture_N = SimulatedData(of=of), pictures_of(read_folder(several.pairs))
    shown = list[set[int]]()
    for split in ("suspect", "clean"):
        half = halved.corpus(split)
        assert isinstance(half, IngestedPairs)
        assert len(half.rows()) == halved.rows(split)
        shown.append(set(picture_N[half.rows()].tolist()))
    assert not shown[0] & shown[1]
    assert halved.rows("suspect") == 22


@pytest.mark.exhaustive
def test_a_grid_on_files_from_ingest_to_board(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gate = {"strong": OPEN_GATE, "medium": OPEN_GATE, "init_loss": 1}
    more: dict[str, Any] = {
        "gate": gate,
        "evaluate": {"retrieval": True},
        "defenses": ["none", "finetune", "roclip"],
    }
    grid = grid_of(tmp_path, made, **more)
    report = run_serial(grid, tmp_path / "out", tmp_path / "store")
    assert (report.code, report.counts) == (0, {"ok": 6})
    said = {row["metric"] for row in numbers(tmp_path / "out").values()}
    assert {"clean_top1", "asr_top1", "image_to_text_top1"} <= said
    again = run_serial(grid, tmp_path / "out", tmp_path / "store")
    assert again.stages_run == 0
    board = call(capsys, "leaderboard", tmp_path / "out", "--format", "md")
    assert board.code == 0
    assert "| badnet | 10 | finetune |" in board.out
    # Other prompts: what was trained clean stays, and only what is read by prompts is made again.
    other = replace(
        grid, data=grid_of(tmp_path, made, {"judge": {"templates": "label"}}, **more).data
    )
    report = run_serial(other, tmp_path / "label", tmp_path / "store")
    assert (report.code, len(outcomes(tmp_path / "label"))) == (0, 6)
    clean = [c for c in make_plan(grid).cells if c.cell.count == 0]
    kept = {c.victim.key for c in clean} & {c.victim.key for c in make_plan(other).cells}
    assert len(kept) == 1
    sets = [other.data.corpus("report"), other.data.corpus("tuning")]
    assert all(isinstance(spec, EvaluationSet) for spec in sets)


def test_a_damaged_picture_is_no_method_s_fault_and_is_read_once(
    made: Made, tmp_path: Path
) -> None:
    """Every attack and defense of the board had failed, for a picture that nobody could read."""
    labelled = shutil.copytree(made.labelled, tmp_path / "labelled")
    torn = next((labelled / "test").glob("*/*.png"))
    torn.write_bytes(torn.read_bytes()[:90])
    grid = grid_of(tmp_path, made, {"judge": {"root": str(labelled)}}, defenses=["none"])
    report = run_serial(grid, tmp_path / "out", tmp_path / "store")
    assert set(report.counts) == {"failed_infrastructure"}
    detail = {str(row["detail"]) for row in outcomes(tmp_path / "out").values()}
    assert all(f"{torn.name}: cannot be read as a picture" in words for words in detail)
    tried = [row for row in records(tmp_path / "out", "attempts") if row["outcome"] != "ok"]
    assert [(row["outcome"], row["attempt"]) for row in tried] == [("failed_infrastructure", 1)]
    # The same command goes on once it is mended.
    shutil.copy(made.labelled / torn.relative_to(labelled), torn)
    again = run_serial(
        grid_of(tmp_path, made, {"judge": {"root": str(labelled)}}, defenses=["none"]),
        *(tmp_path / "out", tmp_path / "store"),
    )
    assert "failed_infrastructure" not in again.counts


def test_what_an_embedded_model_cannot_read_is_said(made: Made, tmp_path: Path) -> None:
    """All names outside of its world were one and the same word to it, and no word was said."""
    plain = make_plan(grid_of(tmp_path, made))
    assert not any("reads the" in said for said in plain.cautions())
    labelled = shutil.copytree(made.labelled, tmp_path / "labelled")
    for part in ("train", "test"):
        (labelled / part / "star").rename(labelled / part / "sea_star")
        (labelled / part / "moon").rename(labelled / part / "banana")
    judge = {"judge": {"root": str(labelled)}}
    plan = make_plan(grid_of(tmp_path, made, judge, target="circle"))
    (said,) = [words for words in plan.cautions() if "reads the" in words]
    assert "cannot read 2 of 20 classes (banana, sea star)" in said
    plan = make_plan(grid_of(tmp_path, made, judge, target="banana"))
    assert any("the target 'banana' is none of them" in words for words in plan.cautions())
