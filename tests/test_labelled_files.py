"""Labelled sets as they lie on disk: the bytes, the names, the splits, and files that mean harm."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from victims import fingerprints, label_readers
from victims.corpora import Reader, build_corpus, corpus_key, open_corpus
from victims.errors import GridError, UsageError
from victims.label_readers import DATASETS, GTSRB_CLASSES
from victims.labelled_files import LabelledFiles, fingerprint, labelled_splits, with_names
from victims.plain_pickles import read_plain
from victims.store import Store
from victims.zero_shot_sets import ZERO_SHOT_SETS

Pixels = npt.NDArray[np.uint8]
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR100 = tuple(f"thing_{number}" for number in range(100))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "backdoor-grid"


def rows_of(spec: LabelledFiles) -> list[tuple[bytes, int, str]]:
    """Picture, label and caption of every row."""
    return [
        (image.tobytes(), int(label), caption)
        for chunk in spec.chunks()
        for image, label, caption in zip(
            chunk.image_BCHW, chunk.labels, chunk.captions, strict=True
        )
    ]


def picture(path: Path, image: Pixels | Image.Image) -> Image.Image:
    path.parent.mkdir(parents=True, exist_ok=True)
    made = image if isinstance(image, Image.Image) else Image.fromarray(image)
    made.save(path)
    return made


def noise(seed: int, *shape: int) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def chw(image: Image.Image) -> bytes:
    return np.asarray(image.convert("RGB")).transpose(2, 0, 1).tobytes()


# --- pickles, made by a process of their own: no file of ours may import the module

DUMP = """
import json, pickle, sys
import numpy as np

def built(value):
    if isinstance(value, list):
        return [built(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "array" in value:
        flat = np.array(value["array"], value["dtype"])
        return np.array(flat.reshape(value["shape"]), order=value["order"])
    if "bytes" in value:
        return value["bytes"].encode("latin-1")
    return {key: built(item) for key, item in value.items()}

for path, protocol, by_bytes, value in json.load(sys.stdin):
    value = built(value)
    if by_bytes:
        value = {key.encode(): item for key, item in value.items()}
    with open(path, "wb") as file:
        pickle.dump(value, file, protocol=protocol)
"""


def dump(*jobs: tuple[Path, int, dict[str, Any]], by_bytes: bool = False) -> None:
    """Write real pickles: path, protocol, value; arrays as `array` makes them."""
    todo = [(str(path), protocol, by_bytes, value) for path, protocol, value in jobs]
    subprocess.run([sys.executable, "-c", DUMP], input=json.dumps(todo), text=True, check=True)


def array(values: Any, dtype: str = "uint8", order: str = "C") -> dict[str, Any]:
    held = np.asarray(values)
    told = {"array": held.ravel().tolist(), "shape": held.shape}
    return {**told, "dtype": dtype, "order": order}


def text2(text: str) -> bytes:
    """A string as Python 2 wrote it."""
    raw = text.encode("latin-1")
    return b"U" + bytes([len(raw)]) + raw if len(raw) < 256 else b"T" + len4(raw)


def len4(raw: bytes) -> bytes:
    return struct.pack("<i", len(raw)) + raw


def int2(value: int) -> bytes:
    return b"K" + bytes([value]) if value < 256 else b"M" + struct.pack("<H", value)


def array2(data: Pixels) -> bytes:
    """An array as Python 2 and the numpy of its days wrote it."""
    dtype = b"cnumpy\ndtype\nq\x07(U\x02u1K\x00K\x01tRq\x08(K\x03U\x01|NNNJ" + b"\xff" * 4
    dtype += b"J" + b"\xff" * 4 + b"K\x00tb"
    made = b"cnumpy.core.multiarray\n_reconstruct\nq\x04(cnumpy\nndarray\nq\x05K\x00\x85U\x01btR"
    shape = b"(" + b"".join(int2(side) for side in data.shape) + b"t"
    return (
        made
        + b"q\x06(K\x01"
        + shape
        + dtype
        + b"\x89"
        + text2(data.tobytes().decode("latin-1"))
        + b"tb"
    )


def python2(value: dict[str, Any]) -> bytes:
    """A dict as cPickle of Python 2 wrote it with protocol 2."""

    def put(item: Any) -> bytes:
        if isinstance(item, list):
            return b"]q\x03(" + b"".join(put(one) for one in item) + b"e"
        if isinstance(item, np.ndarray):
            return array2(item)
        return text2(item) if isinstance(item, str) else int2(item)

    body = b"".join(text2(key) + b"q\x02" + put(item) for key, item in value.items())
    return b"\x80\x02}q\x01(" + body + b"u."


# --- the sets


def cifar_rows(seed: int, count: int, classes: int) -> tuple[Pixels, list[int]]:
    labels = np.random.default_rng(seed + 1000).integers(0, classes, count).tolist()
    return noise(seed, count, 3072), labels


BATCHES = [f"data_batch_{number}" for number in range(1, 6)]


def cifar10_values() -> dict[str, dict[str, Any]]:
    values: dict[str, dict[str, Any]] = {}
    for seed, name in enumerate([*BATCHES, "test_batch"]):
        data, labels = cifar_rows(seed, 4, 10)
        names = [f"picture_{row}.png" for row in range(4)]
        values[name] = {"batch_label": name, "labels": labels, "data": data, "filenames": names}
    values["batches.meta"] = {
        "num_cases_per_batch": 10000,
        "label_names": list(CIFAR10),
        "num_vis": 3072,
    }
    return values


def cifar100_values() -> dict[str, dict[str, Any]]:
    values: dict[str, dict[str, Any]] = {}
    for seed, (name, count) in enumerate({"train": 20, "test": 4}.items()):
        data, labels = cifar_rows(seed, count, 100)
        coarse = [label // 5 for label in labels]
        values[name] = {"fine_labels": labels, "coarse_labels": coarse, "data": data}
    values["meta"] = {"fine_label_names": list(CIFAR100), "coarse_label_names": ["all"]}
    return values


def write_python(folder: Path, values: dict[str, dict[str, Any]], protocol: int = 0) -> None:
    """Batches as Python 2 wrote them, or as Python 3 does with a protocol."""
    folder.mkdir(parents=True)
    if not protocol:
        for name, value in values.items():
            (folder / name).write_bytes(python2(value))
        return
    dump(*((folder / name, protocol, plain(value)) for name, value in values.items()))


def plain(value: dict[str, Any]) -> dict[str, Any]:
    return {k: array(v) if isinstance(v, np.ndarray) else v for k, v in value.items()}


def write_binary(folder: Path, values: dict[str, dict[str, Any]], fine: bool) -> None:
    folder.mkdir(parents=True)
    for name, value in values.items():
        if "data" not in value:
            key = "fine_label_names" if fine else "label_names"
            file = "fine_label_names.txt" if fine else "batches.meta.txt"
            (folder / file).write_text("\n".join(value[key]) + "\n\n")
            continue
        columns = ["coarse_labels", "fine_labels"] if fine else ["labels"]
        labels = np.array([value[column] for column in columns], dtype=np.uint8).T
        (folder / f"{name}.bin").write_bytes(np.hstack([labels, value["data"]]).tobytes())


def write_gtsrb(root: Path) -> None:
    signs = root / "gtsrb" / "GTSRB"
    for label in range(43):
        for row in range(2):
            name = f"Training/{label:05d}/00000_{row:05d}.ppm"
            picture(signs / name, noise(label * 2 + row, 16, 16, 3))
        (signs / f"Training/{label:05d}/GT-{label:05d}.csv").write_text("Filename;ClassId\n")
    lines = ["Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"]
    for row in range(5):
        picture(signs / f"Final_Test/Images/{row:05d}.ppm", noise(500 + row, 16, 16, 3))
        lines.append(f"{row:05d}.ppm;16;16;1;1;15;15;{42 - row}")
    (root / "gtsrb" / "GT-final_test.csv").write_text("\n".join(lines) + "\n")


WORDS = {
    "n01": "goldfish, Carassius auratus",
    "n02": "crane",
    "n03": "crane, lifting machine",
    "n04": "bee, worker, insect",
    "n05": "bee, worker, contest",
    "n06": "bee",
    "n99": "entity",
}
WORD_NAMES = [
    "goldfish",
    "crane, n02",
    "crane, lifting machine",
    "bee, n04",
    "bee, n05",
    "bee, n06",
]


def write_tiny(root: Path) -> None:
    folder = root / "tiny-imagenet-200"
    ids = [wnid for wnid in WORDS if wnid != "n99"]
    for label, wnid in enumerate(ids):
        for row in range(2):
            path = folder / f"train/{wnid}/images/{wnid}_{row}.JPEG"
            picture(path, noise(label * 2 + row, 64, 64, 3))
    lines = []
    for row in range(6):
        picture(folder / f"val/images/val_{row}.JPEG", noise(100 + row, 64, 64, 3))
        lines.append(f"val_{row}.JPEG\t{ids[5 - row]}\t0\t0\t63\t63")
    (folder / "val/val_annotations.txt").write_text("\n".join(lines) + "\n")
    (folder / "wnids.txt").write_text("\n".join(reversed(ids)) + "\n")
    (folder / "words.txt").write_text("".join(f"{k}\t{v}\n" for k, v in WORDS.items()))


def write_folder(root: Path) -> None:
    for label, name in enumerate(["polar_bear", "sea_lion"]):
        for row in range(5):
            picture(root / f"train/{name}/{row}.png", noise(label * 5 + row, 8, 8, 3))
        (root / f"train/{name}/notes.txt").write_text("no picture")
        picture(root / f"val/{name}/0.png", noise(50 + label, 8, 8, 3))


MAKE: dict[str, Callable[[Path], None]] = {
    "cifar10": lambda root: write_python(root / "cifar-10-batches-py", cifar10_values()),
    "cifar100": lambda root: write_python(root / "cifar-100-python", cifar100_values()),
    "gtsrb": write_gtsrb,
    "image_folder": write_folder,
    "tiny_imagenet": write_tiny,
}
SIZES = {"cifar10": 32, "cifar100": 32, "gtsrb": 16, "image_folder": 8, "tiny_imagenet": 64}
OWN = {
    "cifar10": ["cifar-10-batches-py"],
    "cifar100": ["cifar-100-python"],
    "gtsrb": ["gtsrb", "gtsrb/GTSRB"],
    "image_folder": [],
    "tiny_imagenet": ["tiny-imagenet-200"],
}


def made(dataset: str, root: Path) -> Path:
    root.mkdir()
    MAKE[dataset](root)
    return root


def splits_of(dataset: str, root: Path, **counts: int) -> dict[str, LabelledFiles]:
    return labelled_splits(dataset, root, SIZES[dataset], **counts)


def both(dataset: str, root: Path) -> tuple[list[Any], list[Any]]:
    """All rows of the training and of the test set."""
    splits = splits_of(dataset, root, clean=0, tuning=0)
    assert set(splits) == {"suspect", "report"}
    return rows_of(splits["suspect"]), rows_of(splits["report"])


def test_every_reader_is_tested() -> None:
    elsewhere = {"imagenet", "stl10", "svhn", *ZERO_SHOT_SETS}
    assert set(MAKE) | elsewhere == set(DATASETS)


# --- CIFAR


def cifar_expected(values: dict[str, dict[str, Any]], key: str, names: list[str]) -> list[Any]:
    test = [name for name in values if "test" in name]
    train = [name for name in values if "data" in values[name] and name not in test]

    def rows(batches: list[str]) -> list[Any]:
        return sorted(
            (image.tobytes(), label, names[label])
            for batch in batches
            for image, label in zip(values[batch]["data"], values[batch][key], strict=True)
        )

    return [rows(train), rows(test)]


@pytest.mark.parametrize("protocol", [0, 2, 3, 4, 5])
def test_cifar10_comes_byte_for_byte_from_python_batches(tmp_path: Path, protocol: int) -> None:
    values = cifar10_values()
    write_python(tmp_path / "cifar-10-batches-py", values, protocol)
    found = [sorted(rows) for rows in both("cifar10", tmp_path)]
    assert found == cifar_expected(values, "labels", list(CIFAR10))


@pytest.mark.parametrize("protocol", [0, 5])
def test_cifar100_has_its_fine_labels(tmp_path: Path, protocol: int) -> None:
    values = cifar100_values()
    write_python(tmp_path / "cifar-100-python", values, protocol)
    found = [sorted(rows) for rows in both("cifar100", tmp_path)]
    names = [name.replace("_", " ") for name in CIFAR100]
    assert found == cifar_expected(values, "fine_labels", names)


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_both_releases_are_the_same_rows_in_the_same_order(tmp_path: Path, dataset: str) -> None:
    values = cifar10_values() if dataset == "cifar10" else cifar100_values()
    folder = "cifar-10-batches-bin" if dataset == "cifar10" else "cifar-100-binary"
    write_binary(tmp_path / "bin" / folder, values, dataset == "cifar100")
    python, binary = both(dataset, made(dataset, tmp_path / "py")), both(dataset, tmp_path / "bin")
    assert python == binary
    assert both(dataset, tmp_path / "bin" / folder) == binary


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_come_as_they_were_written(tmp_path: Path, protocol: int, order: str) -> None:
    values: dict[str, Any] = {"a": noise(1, 3, 5), "none": np.zeros((0, 4), np.uint8)}
    values |= {"labels": np.array([3, -1, 70000]), "wide": np.array([1, 258], dtype=">i2")}
    told = {k: array(v, v.dtype.str, order) for k, v in values.items()}
    rest = {"text": "é", "raw": {"bytes": "\x00ÿ"}, "empty": {"bytes": ""}, "n": [1, -2, 2**40]}
    dump((tmp_path / "file", protocol, {**told, **rest}))
    read = read_plain(tmp_path / "file")
    for name, value in values.items():
        assert np.array_equal(read.pop(name), value)
    assert read == {"text": "é", "raw": b"\x00\xff", "empty": b"", "n": [1, -2, 2**40]}


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_arrays_of_the_first_numpy_are_read_under_its_names(tmp_path: Path, protocol: int) -> None:
    path, data = tmp_path / "file", noise(2, 2, 7)
    dump((path, protocol, {"data": array(data)}))
    raw = path.read_bytes()
    for module in ("multiarray", "numeric"):
        # The length stands before a name that goes over the stack.
        new, old = f"numpy._core.{module}".encode(), f"numpy.core.{module}".encode()
        raw = raw.replace(bytes([len(new)]) + new, bytes([len(old)]) + old).replace(new, old)
    assert b"_core" not in raw
    path.write_bytes(raw)
    assert np.array_equal(read_plain(path)["data"], data)


def test_keys_may_be_bytes_and_labels_an_array(tmp_path: Path) -> None:
    folder, values = tmp_path / "cifar-10-batches-py", cifar10_values()
    folder.mkdir()
    told = {name: plain(value) for name, value in values.items()}
    for name in (*BATCHES, "test_batch"):
        told[name]["labels"] = array(values[name]["labels"], "int64")
    told["batches.meta"]["label_names"] = [{"bytes": name} for name in CIFAR10]
    dump(*((folder / name, 4, value) for name, value in told.items()), by_bytes=True)
    found = [sorted(rows) for rows in both("cifar10", tmp_path)]
    assert found == cifar_expected(values, "labels", list(CIFAR10))


# --- files that mean harm, or nothing


def short(text: str) -> bytes:
    return b"\x8c" + bytes([len(text)]) + text.encode()


HOSTILE: dict[str, tuple[bytes, str]] = {
    "global": (b"\x80\x02cos\nsystem\n" + text2("touch MARK") + b"\x85R.", r"names 'os\.system'"),
    "inside": (
        b"\x80\x02}(U\x04datacposix\nsystem\n" + text2("touch MARK") + b"\x85Ru.",
        r"names 'posix\.system'",
    ),
    "stack": (
        b"\x80\x04"
        + short("builtins")
        + short("exec")
        + b"\x93"
        + short("open('MARK', 'w')")
        + b"\x85R.",
        r"names 'builtins\.exec'",
    ),
    "inst": (b"(S'touch MARK'\nios\nsystem\n.", "uses STRING"),
    "obj": (b"\x80\x02(cos\nsystem\no.", r"names 'os\.system'"),
    "newobj": (b"\x80\x02cnumpy\nndarray\nK\x01\x85\x81.", "uses NEWOBJ"),
    "extension": (b"\x80\x02\x82\x01.", "uses EXT1"),
    "persistent": (b"\x80\x02U\x01aQ.", "uses BINPERSID"),
    "attribute": (b"\x80\x02cnumpy\nload\n.", r"names 'numpy\.load'"),
    "deeper name": (b"\x80\x04" + short("numpy") + short("ndarray.tofile") + b"\x93.", "tofile"),
    "objects": (b"\x80\x02cnumpy\ndtype\nU\x02O8K\x00K\x01\x87R.", "'O8', not of integers"),
    "subclass": (
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\ndtype\nK\x00\x85U\x01b\x87R.",
        "other than an array",
    ),
    "codec": (b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aU\x03zip\x86R.", r"calls _codecs\.en"),
    "state": (b"\x80\x02}K\x01\x85b.", "gives a state to a dict"),
    "set": (b"\x80\x04\x8f.", "uses EMPTY_SET"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_pickle_is_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    body, said = HOSTILE[name]
    path = tmp_path / "cifar-10-batches-py" / "data_batch_2"
    write_python(path.parent, cifar10_values())
    path.write_bytes(body)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(GridError, match=said) as caught:
        splits_of("cifar10", tmp_path)
    assert str(path) in str(caught.value)
    assert "nothing in the file was run" in str(caught.value)
    assert not (tmp_path / "MARK").exists()


@pytest.mark.parametrize("name", ["global", "inside", "stack", "inst"])
def test_those_files_would_have_run_when_unpickled(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_bytes(HOSTILE[name][0])
    with pytest.raises(GridError):
        read_plain(tmp_path / "file")
    assert not (tmp_path / "MARK").exists()
    code = "import pickle; pickle.load(open('file', 'rb'))"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert (tmp_path / "MARK").exists()


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "damaged"),
        (b"no pickle at all", "damaged|uses"),
        (b"\x80\x02}q\x01(U\x04data", "damaged"),
        (b"\x80\x02K\x01.", "holds a int where a dict"),
        (b"\x80\x02}}.", "leaves 2 values"),
        (b"\x80\x02.", "leaves 0 values"),
        (b"\x80\x02\x86.", "more values than it made"),
        (b"\x80\x02}e.", "damaged"),
        (b"\x80\x02}(K\x01K\x02u.", "uses a int as what it is not"),
        (b"\x80\x02}(U\x01au.", "damaged"),
        (b"\x80\x02h\x07.", "damaged"),
        (b"\x80\x02]" + b"\x85" * 99999 + b"q\x00}h\x00K\x01s.", "uses a tuple as"),
        (python2({"a": noise(0, 2, 2)}).replace(b"(K\x02K\x02t", b"(K\x02K\x03t"), "do not fill"),
    ],
)
def test_a_damaged_pickle_says_so(tmp_path: Path, body: bytes, said: str) -> None:
    (tmp_path / "file").write_bytes(body)
    with pytest.raises(GridError, match=said) as caught:
        read_plain(tmp_path / "file")
    assert str(tmp_path / "file") in str(caught.value)


def test_no_damage_gets_past_the_reader_as_another_error(tmp_path: Path) -> None:
    path = tmp_path / "file"
    value = {"data": noise(0, 2, 3), "labels": [1, 2], "names": ["a", "b"]}
    dump((path, 5, plain(value)))
    wholes, rng, refused = [python2(value), path.read_bytes()], np.random.default_rng(0), 0
    for turn in range(1500):
        raw = bytearray(wholes[turn % 2])
        for place in rng.integers(0, len(raw), 1 + turn % 3):
            raw[place] = rng.integers(0, 256)
        path.write_bytes(raw[: rng.integers(1, len(raw) + 1)] if turn % 5 == 0 else raw)
        try:
            assert isinstance(read_plain(path), dict)
        except GridError:
            refused += 1
    assert 500 < refused < 1500


def rewritten(key: str, value: Any) -> bytes:
    return python2({**cifar10_values()["data_batch_1"], key: value})


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (rewritten("labels", [1, 2]), r"2 labels need pictures of shape \(2, 3072\)"),
        (rewritten("labels", [1, 2, 3, 10]), r"labels must lie in 0\.\.9"),
        (rewritten("labels", ["a", "b", "c", "d"]), "a label is a str"),
        (rewritten("labels", "abc"), "no list 'labels' in it; it holds batch_label, data"),
        (rewritten("data", "abc"), "'data' is no array of bytes"),
    ],
)
def test_a_batch_that_is_none_says_what_it_lacks(tmp_path: Path, body: bytes, said: str) -> None:
    root = made("cifar10", tmp_path / "set")
    path = root / "cifar-10-batches-py" / "data_batch_1"
    path.write_bytes(body)
    with pytest.raises(GridError, match=said) as caught:
        splits_of("cifar10", root)
    assert str(path) in str(caught.value)


def test_a_truncated_binary_batch_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-bin"
    write_binary(folder, cifar10_values(), fine=False)
    path = folder / "data_batch_3.bin"
    for raw in (path.read_bytes()[:-1], b""):
        path.write_bytes(raw)
        with pytest.raises(GridError, match=r"data_batch_3\.bin: \d+ bytes .* truncated"):
            splits_of("cifar10", tmp_path)


# --- sets of picture files


def test_traffic_signs_come_with_their_names(tmp_path: Path) -> None:
    train, test = both("gtsrb", made("gtsrb", tmp_path / "set"))
    expected = [
        (chw(Image.fromarray(noise(label * 2 + row, 16, 16, 3))), label, GTSRB_CLASSES[label])
        for label in range(43)
        for row in range(2)
    ]
    assert sorted(train) == sorted(expected)
    tested = [
        (chw(Image.fromarray(noise(500 + row, 16, 16, 3))), 42 - row, GTSRB_CLASSES[42 - row])
        for row in range(5)
    ]
    assert sorted(test) == sorted(tested)
    assert len(set(GTSRB_CLASSES)) == 43
    assert all(name == name.lower().strip() for name in GTSRB_CLASSES)
    assert (GTSRB_CLASSES[14], GTSRB_CLASSES[40]) == ("stop", "roundabout")


def decoded(path: Path) -> bytes:
    with Image.open(path) as image:
        return chw(image)


@pytest.mark.parametrize("layout", ["released", "sorted", "sorted with images"])
def test_tiny_imagenet_is_named_by_its_words(tmp_path: Path, layout: str) -> None:
    folder = made("tiny_imagenet", tmp_path / "set") / "tiny-imagenet-200"
    ids = sorted(wnid for wnid in WORDS if wnid != "n99")
    tested = {row: folder / f"val/images/val_{row}.JPEG" for row in range(6)}
    if layout != "released":
        for row, path in tested.items():
            inner = "images" if "images" in layout else ""
            (own := folder / "val" / ids[5 - row] / inner).mkdir(parents=True)
            tested[row] = path.rename(own / path.name)
        (folder / "val/images").rmdir()
    train, test = both("tiny_imagenet", tmp_path / "set")
    expected = [
        (decoded(folder / f"train/{wnid}/images/{wnid}_{row}.JPEG"), label, WORD_NAMES[label])
        for label, wnid in enumerate(ids)
        for row in range(2)
    ]
    assert sorted(train) == sorted(expected)
    by_row = [(decoded(path), 5 - row, WORD_NAMES[5 - row]) for row, path in tested.items()]
    assert sorted(test) == sorted(by_row)


@pytest.mark.parametrize("tested", ["val", "test"])
def test_any_folders_of_pictures_make_a_set(tmp_path: Path, tested: str) -> None:
    root = made("image_folder", tmp_path / "set")
    if tested == "test":
        # Where there are both, the validation set is not what is reported on.
        picture(root / "test/sea_lion/x.PNG", noise(51, 8, 8, 3))
    train, test = both("image_folder", root)
    names = ["polar bear", "sea lion"]
    assert sorted(train) == sorted(
        (chw(Image.fromarray(noise(row, 8, 8, 3))), row // 5, names[row // 5]) for row in range(10)
    )
    rows = [0, 1] if tested == "val" else [1]
    assert sorted(test) == sorted(
        (chw(Image.fromarray(noise(50 + n, 8, 8, 3))), n, names[n]) for n in rows
    )


# --- what becomes of a picture


def only(root: Path, image: Image.Image | Pixels, size: int, name: str = "0.png") -> Pixels:
    """What the one training picture of a set becomes."""
    picture(root / "train/a" / name, image)
    picture(root / "test/a/0.png", noise(0, 8, 8, 3))
    (chunk,) = labelled_splits("image_folder", root, size)["suspect"].chunks()
    assert chunk.image_BCHW.shape == (1, 3, size, size)
    assert chunk.image_BCHW.dtype == np.uint8
    return np.asarray(chunk.image_BCHW[0])


@pytest.mark.parametrize(
    ("height", "width", "inner"),
    [
        (40, 60, (16, 24)),
        (60, 40, (24, 16)),
        (9, 9, (16, 16)),
        (7, 21, (16, 48)),
        (33, 50, (16, 24)),
    ],
)
def test_the_short_side_is_resized_and_the_middle_is_kept(
    tmp_path: Path, height: int, width: int, inner: tuple[int, int]
) -> None:
    image = Image.fromarray(noise(3, height, width, 3))
    resized = np.asarray(image.resize((inner[1], inner[0]), Image.Resampling.BICUBIC))
    top, left = (inner[0] - 16) // 2, (inner[1] - 16) // 2
    expected = resized[top : top + 16, left : left + 16].transpose(2, 0, 1)
    assert np.array_equal(only(tmp_path, image, 16), expected)


def test_grey_palettes_and_transparency_become_colours(tmp_path: Path) -> None:
    colour = Image.fromarray(noise(4, 8, 8, 3))
    grey = Image.fromarray(noise(5, 8, 8))
    clear = colour.copy()
    clear.putalpha(Image.fromarray(noise(6, 8, 8)))
    palette = colour.quantize(16)
    see_through = palette.copy()
    see_through.info["transparency"] = bytes(range(16))
    for number, (image, expected) in enumerate(
        [
            (grey, grey.convert("RGB")),
            (clear, colour),
            (palette, palette.convert("RGB")),
            (see_through, palette.convert("RGB")),
        ]
    ):
        assert only(tmp_path / str(number), image, 8).tobytes() == chw(expected)


def test_a_deep_picture_is_not_clipped_in_silence(tmp_path: Path) -> None:
    deep = Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000)
    with pytest.raises(GridError, match=r"0\.png: more than 8 bits a channel \(I;16"):
        only(tmp_path, deep, 8)


def damaged(path: Path) -> Iterator[bytes]:
    """Some ways in which a picture may be none."""
    whole = path.read_bytes()
    yield whole[: len(whole) // 2]
    yield whole[:20]
    yield b""
    yield b"<html>not found</html>"
    yield b"\x89PNG\r\n\x1a\n" + bytes(64)


@pytest.mark.parametrize("way", range(5))
@pytest.mark.parametrize(
    ("dataset", "name"),
    [
        ("image_folder", "train/polar_bear/0.png"),
        ("gtsrb", "gtsrb/GTSRB/Training/00007/00000_00001.ppm"),
        ("tiny_imagenet", "tiny-imagenet-200/train/n02/images/n02_0.JPEG"),
    ],
)
def test_a_corrupt_picture_is_an_error_with_its_path(
    tmp_path: Path, dataset: str, name: str, way: int
) -> None:
    root = made(dataset, tmp_path / "set")
    path = root / name
    path.write_bytes(list(damaged(path))[way])
    with pytest.raises(GridError, match="cannot be read as a picture") as caught:
        both(dataset, root)
    assert str(path) in str(caught.value)


# --- splits


@pytest.mark.parametrize("dataset", MAKE)
def test_splits_are_disjoint_and_leave_nothing_out(tmp_path: Path, dataset: str) -> None:
    root = made(dataset, tmp_path / "set")
    train, test = both(dataset, root)
    splits = splits_of(dataset, root, tuning=1, clean=2, public=3)
    assert list(splits) == ["tuning", "clean", "public", "suspect", "report"]
    parts = {split: rows_of(spec) for split, spec in splits.items()}
    assert [len(rows) for rows in parts.values()] == [1, 2, 3, len(train) - 6, len(test)]
    assert parts["report"] == test
    cut = [row for split in ("tuning", "clean", "public", "suspect") for row in parts[split]]
    assert cut == train, "one order, cut into parts"
    assert len({image for image, _, _ in cut}) == len(cut)


def test_a_twentieth_is_held_out_unless_said_otherwise(tmp_path: Path) -> None:
    splits = splits_of("gtsrb", made("gtsrb", tmp_path / "set"))
    found = {split: (spec.offset, spec.num_rows) for split, spec in splits.items()}
    assert found == {"tuning": (0, 4), "clean": (4, 4), "suspect": (8, 78), "report": (0, 5)}
    few = splits_of("gtsrb", tmp_path / "set", suspect=10, report=2)
    found = {split: (spec.offset, spec.num_rows) for split, spec in few.items()}
    assert found == {"tuning": (0, 4), "clean": (4, 4), "suspect": (8, 10), "report": (0, 2)}
    assert rows_of(few["report"]) == rows_of(splits["report"])[:2]
    assert rows_of(few["suspect"]) == rows_of(splits["suspect"])[:10]


def test_a_seed_is_an_order(tmp_path: Path) -> None:
    root = made("gtsrb", tmp_path / "set")
    orders = [both_orders(root, seed) for seed in (0, 0, 1)]
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]
    assert [sorted(rows) for rows in orders[0]] == [sorted(rows) for rows in orders[2]]
    labels = [label for _, label, _ in orders[0][0]]
    assert labels != sorted(labels), "files are not read in the order of their classes"


def both_orders(root: Path, seed: int) -> list[list[Any]]:
    splits = splits_of("gtsrb", root, clean=0, tuning=0, seed=seed)
    return [rows_of(splits["suspect"]), rows_of(splits["report"])]


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        ({"suspect": 79}, r"tuning 4 \+ clean 4 \+ public 0 \+ suspect 79 = 87 rows of 86"),
        ({"clean": 80, "public": 9}, r"= 93 rows of 86 training pictures: ask for 7 fewer"),
        ({"report": 6}, "report 6 rows of 5 test pictures"),
        ({"clean": 82}, "suspect and report need rows"),
        ({"report": 0}, "suspect and report need rows"),
        ({"clean": -1}, "none may be negative"),
    ],
)
def test_more_rows_than_there_are_is_an_error_with_the_numbers(
    tmp_path: Path, counts: dict[str, int], said: str
) -> None:
    root = made("gtsrb", tmp_path / "set")
    with pytest.raises(UsageError, match=said):
        splits_of("gtsrb", root, **counts)


def test_rows_are_counted_without_decoding_a_picture(tmp_path: Path) -> None:
    root = made("gtsrb", tmp_path / "set")
    for path in root.rglob("*.ppm"):
        path.write_bytes(b"no picture")
    assert splits_of("gtsrb", root)["suspect"].num_rows == 78


def test_a_spec_that_means_nothing_is_refused(tmp_path: Path) -> None:
    spec = splits_of("image_folder", made("image_folder", tmp_path / "set"))["suspect"]
    with pytest.raises(UsageError, match="Did you mean 'cifar10'"):
        replace(spec, dataset="cifar-10")
    with pytest.raises(UsageError, match="Did you mean 'cifar10'"):
        fingerprint("cifar-10", tmp_path)
    with pytest.raises(UsageError, match="no split of a labelled data set called 'shifted'"):
        replace(spec, split="shifted")
    wrong: list[dict[str, Any]] = [{"size": 0}, {"num_rows": 0}, {"offset": -1}]
    for changes in wrong:
        with pytest.raises(UsageError, match="must be positive"):
            replace(spec, **changes)
    with pytest.raises(UsageError, match=r"rows 0\.\.98 were asked for, .* has 10 such"):
        rows_of(replace(spec, num_rows=99))


# --- identity


@pytest.mark.parametrize("dataset", MAKE)
def test_a_set_is_the_same_wherever_it_lies(tmp_path: Path, dataset: str) -> None:
    here = made(dataset, tmp_path / "here")
    first = splits_of(dataset, here)
    expected = rows_of(first["suspect"])
    there = tmp_path / "elsewhere" / "deep"
    shutil.copytree(here, there)
    shutil.rmtree(here)
    for root in (there, *(there / own for own in OWN[dataset])):
        again = splits_of(dataset, root)
        assert fingerprint(dataset, root) == first["suspect"].fingerprint
        for split, spec in first.items():
            assert corpus_key(again[split]) == corpus_key(spec)
        assert rows_of(again["suspect"]) == expected
    if OWN[dataset]:
        # The set's own folder under another name.
        moved = (there / OWN[dataset][0]).rename(tmp_path / "renamed")
        assert fingerprint(dataset, moved) == first["suspect"].fingerprint


@pytest.mark.parametrize("dataset", MAKE)
def test_a_change_of_any_file_is_another_set(tmp_path: Path, dataset: str) -> None:
    root = made(dataset, tmp_path / "set")
    specs = splits_of(dataset, root)
    found = DATASETS[dataset](root)
    key, files = corpus_key(specs["suspect"]), found.files
    assert len(files) >= 3
    for path in list(files.values())[:: max(1, len(files) // 8)]:
        assert isinstance(path, Path)
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        digest = with_names(fingerprints.digest_files(files), found)
        assert digest != specs["suspect"].fingerprint
        assert corpus_key(replace(specs["suspect"], fingerprint=digest)) != key
        path.write_bytes(whole)
    assert fingerprint(dataset, root) == specs["suspect"].fingerprint
    for changes in ({"size": 9}, {"split": "clean"}, {"num_rows": 1}, {"offset": 1}, {"seed": 1}):
        assert corpus_key(replace(specs["suspect"], **changes)) != key


def test_a_key_is_what_it_was() -> None:
    spec = LabelledFiles(
        dataset="cifar10", root="/x", fingerprint="0", size=32, split="suspect", num_rows=9
    )
    assert corpus_key(spec) == "corpus-c3f69e34993a98aa"


def test_files_that_changed_since_the_plan_are_not_read(tmp_path: Path) -> None:
    root = made("image_folder", tmp_path / "set")
    spec = splits_of("image_folder", root)["suspect"]
    picture(root / "train/polar_bear/0.png", noise(99, 8, 8, 3))
    with pytest.raises(UsageError, match="not those that were planned with"):
        rows_of(spec)


def test_class_names_that_no_file_holds_are_in_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sign that got another name kept its key, and what was made with the old one was found."""
    root = made("gtsrb", tmp_path / "set")
    before = fingerprint("gtsrb", root)
    names = list(label_readers.GTSRB_CLASSES)
    names[0] = "limit of 20"
    monkeypatch.setattr(label_readers, "GTSRB_CLASSES", tuple(names))
    assert fingerprint("gtsrb", root) != before


# --- the memory of fingerprints


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files whose contents were digested."""
    names: list[str] = []
    digest = hashlib.file_digest

    def noted(file: Any, kind: str) -> Any:
        names.append(Path(file.name).name)
        return digest(file, kind)

    monkeypatch.setattr(hashlib, "file_digest", noted)
    return names


def aged(root: Path) -> Path:
    """As if the files had lain there for an hour."""
    for path in root.rglob("*"):
        os.utime(path, (time.time() - 3600,) * 2)
    return root


def test_files_are_read_once_until_one_changes(
    tmp_path: Path, cache: Path, opened: list[str]
) -> None:
    root = aged(made("image_folder", tmp_path / "set"))
    first = fingerprint("image_folder", root)
    assert len(opened) == 12
    opened.clear()
    assert fingerprint("image_folder", root) == first
    assert opened == []
    assert [path.read_text() for path in (cache / "fingerprints").iterdir()] == [first]
    path = root / "train/polar_bear/0.png"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    os.utime(path, (time.time() - 1800,) * 2)
    assert fingerprint("image_folder", root) != first
    assert len(opened) == 12


def test_what_has_just_changed_is_not_remembered(tmp_path: Path, opened: list[str]) -> None:
    """Two changes within a tick of the clock leave the same time: remembering the first would
    have hidden the second.
    """
    root = aged(made("image_folder", tmp_path / "set"))
    path = root / "train/polar_bear/0.png"
    whole, now = path.read_bytes(), time.time_ns()
    found = set()
    for last in (b"x", b"y"):
        path.write_bytes(whole[:-1] + last)
        os.utime(path, ns=(now, now))
        found.add(fingerprint("image_folder", root))
    assert len(found) == 2
    assert len(opened) == 24


@pytest.mark.parametrize("trouble", ["garbage", "folder", "file in the way", "no home"])
def test_a_cache_out_of_order_is_no_error(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    root = aged(made("image_folder", tmp_path / "set"))
    first = fingerprint("image_folder", root)
    (kept,) = (cache / "fingerprints").iterdir()
    if trouble == "garbage":
        kept.write_bytes(b"\xff" * 64)
    elif trouble == "folder":
        kept.unlink()
        kept.mkdir()
    elif trouble == "file in the way":
        shutil.rmtree(cache)
        cache.write_text("no folder")
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", "relative")
        monkeypatch.setattr(Path, "home", staticmethod(no_home))
    assert fingerprint("image_folder", root) == first
    if trouble == "garbage":
        assert kept.read_text() == first
    assert (
        not (cache / "fingerprints").is_dir() or len(list((cache / "fingerprints").iterdir())) == 1
    )


def no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")


# --- errors about files


@pytest.mark.parametrize("dataset", MAKE)
def test_a_set_that_is_not_there_says_what_was_looked_for(tmp_path: Path, dataset: str) -> None:
    places = [tmp_path / "none", tmp_path / "empty", tmp_path / "full", tmp_path / "file"]
    places[1].mkdir()
    for number in range(12):
        (places[2] / f"d{number:02d}").mkdir(parents=True)
    places[3].write_text("x")
    said = ["no such folder", "nothing", r"d00/, d01/, .*d07/ and 4 more", "a file, no folder"]
    for place, found in zip(places, said, strict=True):
        with pytest.raises(
            UsageError, match=f"looked for .* in {place}. Found there: {found}"
        ) as e:
            splits_of(dataset, place)
        assert str(e.value).startswith(f"{dataset}: ")
        assert "Give as root" in str(e.value)
        assert "download" not in str(e.value)


@pytest.mark.parametrize(
    ("dataset", "gone", "said"),
    [
        ("cifar10", "cifar-10-batches-py/data_batch_4", "looked for data_batch_4 in .*batches-py"),
        ("cifar10", "cifar-10-batches-py/batches.meta", r"looked for batches\.meta in"),
        ("cifar100", "cifar-100-python/test", "looked for test in"),
        ("gtsrb", "gtsrb/GT-final_test.csv", r"looked for GT-final_test\.csv .* in .*/gtsrb\. Fo"),
        ("gtsrb", "gtsrb/GTSRB/Training/00042", "pictures of class 00042 in .*no such folder"),
        ("gtsrb", "gtsrb/GTSRB/Final_Test/Images/00001.ppm", r"00001\.ppm \(1 files\).*speaks of"),
        ("image_folder", "val", "looked for test/ or val/"),
        (
            "image_folder",
            "train/sea_lion",
            r"looked for the classes of val/ \(sea_lion\) in .*train",
        ),
        ("image_folder", "train/sea_lion/*.png", r"pictures of class sea_lion .*notes\.txt"),
        ("tiny_imagenet", "tiny-imagenet-200/wnids.txt", r"tiny-imagenet-200/wnids\.txt in"),
        ("tiny_imagenet", "tiny-imagenet-200/words.txt", r"words\.txt \(the class names\)"),
        ("tiny_imagenet", "tiny-imagenet-200/train/n03", "pictures of class n03"),
        (
            "tiny_imagenet",
            "tiny-imagenet-200/val/val_annotations.txt",
            r"val_annotations\.txt \(the",
        ),
        ("tiny_imagenet", "tiny-imagenet-200/val/images/val_2.JPEG", r"val_2\.JPEG \(1 files\)"),
    ],
)
def test_a_missing_part_is_named(tmp_path: Path, dataset: str, gone: str, said: str) -> None:
    root = made(dataset, tmp_path / "set")
    for path in list(root.glob(gone)):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(UsageError, match=said):
        splits_of(dataset, root)


@pytest.mark.parametrize(
    ("dataset", "name", "text", "said"),
    [
        (
            "gtsrb",
            "gtsrb/GT-final_test.csv",
            "Filename,ClassId\n0.ppm,1\n",
            "line 2: needs the col",
        ),
        ("gtsrb", "gtsrb/GT-final_test.csv", "Filename;ClassId\n0.ppm;43\n", "0 to 42"),
        (
            "gtsrb",
            "gtsrb/GT-final_test.csv",
            "Filename;ClassId\n00000.ppm;4\n",
            "no line for 00001",
        ),
        ("gtsrb", "gtsrb/GT-final_test.csv", "\xff", "not a text in UTF-8"),
        ("tiny_imagenet", "tiny-imagenet-200/words.txt", "n01\tfish\n", "no words for n02, n03"),
        (
            "tiny_imagenet",
            "tiny-imagenet-200/val/val_annotations.txt",
            "a\tn99\t0\n",
            "line 1: needs",
        ),
        ("cifar10", "cifar-10-batches-bin/batches.meta.txt", "cat\ncat\n", "more than once: cat"),
        ("image_folder", "train/_/0.png", "", "one is empty"),
    ],
)
def test_tables_that_do_not_fit_name_the_line(
    tmp_path: Path, dataset: str, name: str, text: str, said: str
) -> None:
    root = tmp_path / "set"
    if dataset == "cifar10":
        write_binary(root / "cifar-10-batches-bin", cifar10_values(), fine=False)
    else:
        made(dataset, root)
    (root / name).parent.mkdir(exist_ok=True)
    (root / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(GridError, match=said) as caught:
        splits_of(dataset, root)
    assert str((root / name).parents[1 if "0.png" in name else 0]) in str(caught.value)


# --- as a corpus


@pytest.mark.parametrize("dataset", MAKE)
def test_a_split_is_built_and_opened_as_a_corpus(tmp_path: Path, dataset: str) -> None:
    store, root = Store(tmp_path / "store"), made(dataset, tmp_path / "set")
    for split, spec in splits_of(dataset, root, clean=2, tuning=1, public=1).items():
        build_corpus(store, spec)
        corpus = open_corpus(store, corpus_key(spec), Reader.REPORTING)
        rows = rows_of(spec)
        assert corpus.split == split
        assert [image.tobytes() for image in corpus.images_NCHW] == [row[0] for row in rows]
        assert corpus.labels.tolist() == [row[1] for row in rows]
        assert list(corpus.captions) == [row[2] for row in rows]
        assert list(corpus.captions) == [corpus.classes[label] for label in corpus.labels]
        assert list(corpus.classes) == list(spec.classes)
        assert list(corpus.templates) == ["{}"]
        assert corpus.size == SIZES[dataset]
    # Once built, it is asked for by its key: the files may go.
    shutil.rmtree(root)
    build_corpus(store, spec)


def test_a_set_larger_than_a_chunk_comes_in_several(tmp_path: Path) -> None:
    folder, values = tmp_path / "cifar-100-binary", cifar100_values()
    data, labels = cifar_rows(7, 600, 100)
    values["train"] = {"fine_labels": labels, "coarse_labels": [0] * 600, "data": data}
    write_binary(folder, values, fine=True)
    spec = splits_of("cifar100", tmp_path, clean=0, tuning=0)["suspect"]
    assert [len(chunk.labels) for chunk in spec.chunks()] == [256, 256, 88]
    found = sorted((image, label) for image, label, _ in rows_of(spec))
    assert found == sorted(zip((row.tobytes() for row in data), labels, strict=True))
