"""The sets that papers judge CLIPs by: their layouts, their lists, the names of their classes."""

from __future__ import annotations

import contextlib
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from tests import set_files
from tests.set_files import chw, encoded, lists, pixels, write
from victims.errors import GridError, UsageError
from victims.evaluation_sets import EvaluationSet, evaluation_splits
from victims.label_readers import DATASETS
from victims.labelled_files import labelled_splits
from victims.mat_files import read_mat, read_structures, read_texts
from victims.prompts import default_templates, prompt_templates
from victims.zero_shot_sets import ZERO_SHOT_SETS

SIZE = 32
Row = tuple[bytes, str]
# Of each set, its classes and the pictures of the world that are trained on and tested.
EXPECTED: dict[str, tuple[tuple[str, ...], list[int], list[int]]] = {
    "food101": (("apple pie", "pho"), [11, 12, 13], [14, 15]),
    "oxford_pets": (("Abyssinian", "American Bulldog", "Bombay"), [1, 2, 5], [3, 4, 6]),
    "dtd": (("banded", "polka-dotted"), [1, 2, 3], [4, 5]),
    "fgvc_aircraft": (("DC-3", "F-16A/B"), [1, 2], [3, 4]),
    "stanford_cars": (
        ("AM General Hummer SUV 2000", "smart fortwo Convertible 2012"),
        [1, 2, 3],
        [4, 5],
    ),
    "rendered_sst2": (("negative", "positive"), [1, 2, 3, 4], [5, 6]),
    "sun397": (("abbey", "balcony interior"), [1, 2], [3, 4]),
    "svhn": (
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
        [0, 1, 2, 3],
        [4, 5],
    ),
}
# To the letter of data/prompts.md of CLIP's authors.
LANDS = (
    *("annual crop land", "forest", "brushland or shrubland", "highway or road"),
    *("industrial buildings or commercial buildings", "pasture land", "permanent crop land"),
    *("residential buildings or homes or apartments", "river", "lake or sea"),
)
CUT: dict[str, tuple[tuple[str, ...], int, int]] = {
    "caltech101": (("accordion", "side of a car"), 60, 3 + 2),
    "eurosat": (LANDS, 80, 20),
    "flowers102": (("pink primrose", "hard-leaved pocket orchid", "canterbury bells"), 204, 102),
    "stl10": (("airplane", "bird", "car"), 4, 2),
}
MAKE: dict[str, Callable[[Path], None]] = {
    dataset: getattr(set_files, dataset) for dataset in (*EXPECTED, *CUT)
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def made(dataset: str, root: Path) -> Path:
    MAKE[dataset](root)
    return root


def rows_of(spec: EvaluationSet) -> list[Row]:
    return [
        (image.tobytes(), caption)
        for chunk in spec.chunks()
        for image, caption in zip(chunk.image_BCHW, chunk.captions, strict=True)
    ]


def test_every_set_is_tested() -> None:
    assert set(MAKE) == {*ZERO_SHOT_SETS, "stl10", "svhn"}


@pytest.mark.parametrize("dataset", EXPECTED)
def test_lists_say_what_is_trained_on_and_what_is_tested(tmp_path: Path, dataset: str) -> None:
    classes, train, test = EXPECTED[dataset]
    found = DATASETS[dataset](made(dataset, tmp_path))
    assert found.classes == classes
    for part, pictures in ((found.train(), train), (found.test(), test)):
        shown = {
            np.asarray(picture).transpose(2, 0, 1).tobytes()
            for picture in part.pictures(np.arange(len(part.labels)))
        }
        assert shown == {chw(row) for row in pictures}


def test_labels_are_those_of_the_lists(tmp_path: Path) -> None:
    root = str(made("food101", tmp_path))
    splits = evaluation_splits("food101", root, SIZE, tuning=1)
    assert sorted(caption for _, caption in rows_of(splits["tuning"])) == ["apple pie", "pho"]
    with pytest.raises(UsageError, match="clean needs 1 pictures of each class, and class 1 has 0"):
        evaluation_splits("food101", root, SIZE, tuning=1, probe=9)
    said = [(chw(14), "apple pie"), (chw(15), "pho")]
    assert sorted(rows_of(splits["report"])) == sorted(said)
    numbers = str(made("svhn", tmp_path))
    report = evaluation_splits("svhn", numbers, SIZE, tuning=0)["report"]
    assert sorted(rows_of(report)) == sorted([(chw(4), "zero"), (chw(5), "three")])
    cars = str(made("stanford_cars", tmp_path))
    report = evaluation_splits("stanford_cars", cars, SIZE, tuning=0)["report"]
    hummer, smart = EXPECTED["stanford_cars"][0]
    assert sorted(rows_of(report)) == sorted([(chw(5), hummer), (chw(4), smart)])
    birds = str(made("stl10", tmp_path))
    report = evaluation_splits("stl10", birds, 96, tuning=0)["report"]
    small = {
        (np.frombuffer(image, np.uint8).reshape(3, 96, 96)[:, ::3, ::3].tobytes(), caption)
        for image, caption in rows_of(report)
    }
    assert small == {(chw(4), "bird"), (chw(5), "car")}
    flowers = str(made("flowers102", tmp_path))
    report = evaluation_splits("flowers102", flowers, SIZE, tuning=0)["report"]
    assert {"pink primrose", "blackberry lily"} <= {caption for _, caption in rows_of(report)}


@pytest.mark.parametrize("dataset", CUT)
def test_other_sets_have_so_many_pictures(tmp_path: Path, dataset: str) -> None:
    classes, train, test = CUT[dataset]
    found = DATASETS[dataset](made(dataset, tmp_path))
    assert found.classes[: len(classes)] == classes
    parts = found.train(), found.test()
    assert [len(part.labels) for part in parts] == [train, test]
    names = [{name.partition("/")[2] for name, _ in part.files} for part in parts]
    assert not names[0] & names[1], "T30: nothing is trained on that is tested"


def test_flowers_are_trained_on_their_validation_part_and_tested_on_test(tmp_path: Path) -> None:
    """T30: released scripts train on the test part, the largest by far."""
    found = DATASETS["flowers102"](made("flowers102", tmp_path))
    numbers = [
        {int(name.rpartition("_")[2][:5]) for name, _ in part.files}
        for part in (found.train(), found.test())
    ]
    assert numbers == [set(range(1, 205)), set(range(205, 307))]


@pytest.mark.parametrize("dataset", MAKE)
def test_every_set_is_cut_and_is_the_same_wherever_it_lies(tmp_path: Path, dataset: str) -> None:
    root = made(dataset, tmp_path / "here")
    splits = labelled_splits(dataset, root, SIZE, clean=0, tuning=1)
    assert {"tuning", "suspect", "report"} == set(splits)
    report = evaluation_splits(dataset, str(root), SIZE, tuning=0)["report"]
    assert report.templates == prompt_templates(default_templates(dataset))
    assert report.num_rows == splits["report"].num_rows
    moved = shutil.move(root, tmp_path / "there")
    assert labelled_splits(dataset, moved, SIZE)["report"].fingerprint == (
        splits["report"].fingerprint
    )
    again = evaluation_splits(dataset, str(moved), SIZE, tuning=0)["report"]
    assert again.fingerprint == report.fingerprint
    assert again.templates == report.templates
    (inner,) = list(Path(moved).iterdir())
    own = evaluation_splits(dataset, str(inner), SIZE, tuning=0)["report"]
    assert own.fingerprint == report.fingerprint, "the set's own folder may be the root"


@pytest.mark.parametrize("dataset", MAKE)
def test_a_set_that_is_not_there_says_what_was_looked_for(tmp_path: Path, dataset: str) -> None:
    with pytest.raises(UsageError, match=f"{dataset}: looked for .* Give as root"):
        DATASETS[dataset](tmp_path)


@pytest.mark.parametrize(
    ("dataset", "changes", "said"),
    [
        ("food101", {"meta/train.txt": None}, r"lacks meta/train\.txt"),
        ("food101", {"images/pho/13.jpg": None}, r"looked for images/pho/13\.jpg \(1 files\)"),
        ("food101", {"meta/train.txt": "apple_pie/11\npho/15\n"}, r"pho/15\.jpg is trained on and"),
        ("food101", {"meta/train.txt": "apple_pie/11\n"}, "not both trained on and tested: pho"),
        ("food101", {"meta/train.txt": "pho\n"}, r"train\.txt, line 1: names no picture and class"),
        ("food101", {"meta/train.txt": "../../etc/x\n"}, "line 1: names no picture"),
        ("food101", {"meta/train.txt": "\n"}, "looked for train pictures"),
        (
            "food101",
            {"meta/train.txt": "pho/13\npho/13\napple_pie/11\n"},
            "train list names a picture twice",
        ),
        ("fgvc_aircraft", {"data/images_variant_trainval.txt": "0000001\n"}, "line 1: names no"),
    ],
)
def test_lists_that_do_not_fit_say_so(
    tmp_path: Path, dataset: str, changes: dict[str, str | None], said: str
) -> None:
    (folder,) = list(made(dataset, tmp_path).iterdir())
    for name, body in changes.items():
        if body is None:
            (folder / name).unlink()
        else:
            write(folder, {name: body})
    with pytest.raises(GridError, match=said):
        DATASETS[dataset](tmp_path)


def test_cars_without_their_tables_say_so(tmp_path: Path) -> None:
    made("stanford_cars", tmp_path)
    folder = tmp_path / "stanford_cars"
    table = folder / "cars_test_annos_withlabels.mat"
    table.rename(folder / "devkit" / table.name)
    assert len(DATASETS["stanford_cars"](tmp_path).test().labels) == 2
    meta = folder / "devkit" / "cars_meta.mat"
    named = meta.read_bytes()
    savemat(meta, {"class_names": np.eye(2)})
    with pytest.raises(GridError, match="no array of texts called class_names"):
        DATASETS["stanford_cars"](tmp_path)
    meta.write_bytes(named)
    (folder / "devkit" / table.name).unlink()
    with pytest.raises(GridError, match=r"looked for cars_test_annos_withlabels\.mat"):
        DATASETS["stanford_cars"](tmp_path)
    for line, said in ((("../a.jpg", 1.0), "no file's name"), ((2.0, 1.0), "names no picture")):
        rows = np.array([[line]], dtype=[("fname", object), ("class", object)])
        savemat(table, {"annotations": rows})
        with pytest.raises(GridError, match=f"annotation 1.*{said}"):
            DATASETS["stanford_cars"](tmp_path)


def test_names_that_read_alike_are_refused(tmp_path: Path) -> None:
    made("food101", tmp_path)
    folder, said = tmp_path / "food-101", {}
    for part, row in (("train", 1), ("test", 2)):
        names = [f"pho/{row}", f"apple pie/{row}", f"apple_pie/{row}"]
        said[f"meta/{part}.txt"] = names
        write(folder, {f"images/{name}.jpg": encoded(row) for name in names})
    write(folder, lists(said))
    with pytest.raises(GridError, match="more than once: apple pie"):
        DATASETS["food101"](tmp_path)


def test_arrays_that_do_not_fit_say_so(tmp_path: Path) -> None:
    made("stl10", tmp_path)
    (tmp_path / "stl10_binary" / "test_X.bin").write_bytes(b"x" * 100)
    with pytest.raises(GridError, match="no picture for each label"):
        DATASETS["stl10"](tmp_path).test()
    (tmp_path / "stl10_binary" / "train_y.bin").write_bytes(bytes([1, 2, 3, 4]))
    with pytest.raises(GridError, match="one of 3 classes"):
        DATASETS["stl10"](tmp_path).train()
    made("svhn", tmp_path)
    savemat(tmp_path / "svhn" / "test_32x32.mat", {"X": pixels(2)})
    with pytest.raises(GridError, match="needs the pictures X and their labels y"):
        DATASETS["svhn"](tmp_path).test()


def test_a_class_that_is_not_there_is_named(tmp_path: Path) -> None:
    """A copy without rivers was judged as if EuroSAT had nine classes."""
    shutil.rmtree(made("eurosat", tmp_path) / "eurosat" / "2750" / "River")
    with pytest.raises(GridError, match="no pictures of River, of its 10 classes"):
        DATASETS["eurosat"](tmp_path)
    movies = made("rendered_sst2", tmp_path) / "rendered-sst2"
    shutil.rmtree(movies / "valid")
    with pytest.raises(GridError, match="no pictures in valid/negative/"):
        DATASETS["rendered_sst2"](tmp_path)
    for part in ("train", "valid", "test"):
        shutil.rmtree(movies / part / "negative", ignore_errors=True)
        write(movies, {f"{part}/positive/1.png": encoded(1)})
    with pytest.raises(GridError, match="no pictures of negative, of its 2 classes"):
        DATASETS["rendered_sst2"](tmp_path)


# --- .mat files


@pytest.mark.parametrize("compressed", [False, True])
def test_arrays_of_a_mat_file_are_those_that_were_written(tmp_path: Path, compressed: bool) -> None:
    rng = np.random.default_rng(0)
    kinds = ("u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8")
    arrays = {kind: rng.integers(0, 100, (2, 3, 4)).astype(kind) for kind in kinds}
    arrays |= {"one": np.array([[7]], dtype=np.uint8), "wide": rng.normal(size=(1, 50))}
    others = {"cell": np.array([{"a": 1}], dtype=object), "text": "abc", "z": np.array([[1j]])}
    savemat(tmp_path / "a.mat", {**arrays, **others}, do_compression=compressed)
    found = read_mat(tmp_path / "a.mat")
    assert set(found) == set(arrays), "cells, text and complex numbers are passed over"
    for name, array in arrays.items():
        assert np.array_equal(found[name], array), name


@pytest.mark.parametrize("compressed", [False, True])
def test_structures_hold_their_numbers_and_text(tmp_path: Path, compressed: bool) -> None:
    kinds = [("n", object), ("text", object), ("empty", object), ("cell", object)]
    cell = np.array([1, "x"], dtype=object)
    rows = [(np.arange(n + 1.0), f"caf\xe9 {n}", np.zeros((0, 0)), cell) for n in range(3)]
    savemat(
        tmp_path / "a.mat",
        {"other": np.eye(2), "many": np.array(rows, dtype=kinds)},
        do_compression=compressed,
    )
    found = read_structures(tmp_path / "a.mat", "many")
    assert [row["text"] for row in found] == [f"caf\xe9 {n}" for n in range(3)]
    assert [np.ravel(row["n"]).tolist() for row in found] == [[0.0], [0.0, 1.0], [0.0, 1.0, 2.0]]
    assert not any("cell" in row for row in found)
    with pytest.raises(GridError, match="no array of structures called other"):
        read_structures(tmp_path / "a.mat", "other")


@pytest.mark.parametrize("compressed", [False, True])
def test_cells_hold_their_texts(tmp_path: Path, compressed: bool) -> None:
    texts = np.array([["a b", "caf\xe9", "M"]], dtype=object)
    mixed = np.array([["a", 1.0]], dtype=object)
    arrays = {"mixed": mixed, "texts": texts, "eye": np.eye(2)}
    savemat(tmp_path / "a.mat", arrays, do_compression=compressed)
    assert read_texts(tmp_path / "a.mat", "texts") == ["a b", "caf\xe9", "M"]
    for name in ("mixed", "eye", "none"):
        with pytest.raises(GridError, match=f"no array of texts called {name}"):
            read_texts(tmp_path / "a.mat", name)


def test_no_damage_gets_past_the_reader_as_another_error(tmp_path: Path) -> None:
    path = tmp_path / "a.mat"
    pair = np.array([(1.0, "x")], dtype=[("n", object), ("t", object)])
    savemat(path, {"x": np.arange(20).reshape(4, 5), "y": np.eye(3), "s": pair})
    raw, rng = path.read_bytes(), np.random.default_rng(0)
    for place in rng.integers(0, len(raw), 200).tolist():
        path.write_bytes(raw[:place] + bytes([raw[place] ^ 0xFF]) + raw[place + 1 :])
        with contextlib.suppress(GridError):
            read_mat(path)
        with contextlib.suppress(GridError):
            read_structures(path, "s")
    for body in (b"", b"x" * 200, raw[:300]):
        path.write_bytes(body)
        with pytest.raises(GridError, match=r"a\.mat"):
            read_mat(path)


def test_what_no_mat_file_can_mean_is_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small element holds four bytes at most: one of five would be read out of the next."""
    path = tmp_path / "a.mat"
    savemat(path, {"x": np.arange(3)})
    whole = path.read_bytes()
    path.write_bytes(whole + struct.pack("<HH", 5, 5) + bytes(12))
    with pytest.raises(GridError, match="a small element of 5 bytes"):
        read_mat(path)
    monkeypatch.setattr("victims.mat_files._MOST", 4096)
    for length, fits in ((300, True), (1000, False)):
        savemat(path, {"x": np.zeros(length)}, do_compression=True)
        assert path.stat().st_size < 400
        if fits:
            assert read_mat(path)["x"].size == length
        else:
            with pytest.raises(GridError, match="an array of more than 2 GiB"):
                read_mat(path)
