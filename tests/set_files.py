"""Sets of pictures as their releases lay them out, from a few pictures of the embedded world."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy.io import savemat

from tests.conftest import corpus_spec

WNIDS = ("n00000003", "n00000007", "n00000009")
NAMES = ("tench", "great white shark", "cock")
# Classes of the validation pictures in their order, and how many training pictures each has.
VAL = (2, 0, 1, 1, 2, 0, 2)
TRAIN = 6


@cache
def pixels(count: int = 128) -> npt.NDArray[np.uint8]:
    """Pictures of the world, NHWC."""
    chunks = [chunk.image_BCHW for chunk in corpus_spec("public", count).chunks()]
    return np.concatenate(chunks).transpose(0, 2, 3, 1)


@cache
def encoded(row: int) -> bytes:
    """A picture as PNG, whatever its file is called."""
    file = io.BytesIO()
    Image.fromarray(pixels()[row % len(pixels())]).save(file, "PNG")
    return file.getvalue()


def chw(row: int) -> bytes:
    return bytes(pixels()[row % len(pixels())].transpose(2, 0, 1).tobytes())


def write(folder: Path, files: Mapping[str, bytes | str]) -> Path:
    for name, body in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body.encode() if isinstance(body, str) else body)
    return folder


def write_tar(path: Path, files: Mapping[str, bytes], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, body in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(body)
            tar.addfile(entry, io.BytesIO(body))
    return path


# --- ImageNet: validation picture i is picture i of the world, training pictures follow


def val_name(place: int) -> str:
    return f"ILSVRC2012_val_{place + 1:08d}.JPEG"


def flat() -> dict[str, bytes]:
    return {val_name(place): encoded(place) for place in range(len(VAL))}


def by_class() -> dict[str, bytes]:
    return {f"{WNIDS[of]}/{val_name(place)}": encoded(place) for place, of in enumerate(VAL)}


def trained(of: int) -> dict[str, bytes]:
    """Training pictures of a class."""
    first = len(VAL) + of * TRAIN
    return {f"{WNIDS[of]}_{row}.JPEG": encoded(first + row) for row in range(TRAIN)}


def below(folder: str, files: Mapping[str, bytes]) -> dict[str, bytes]:
    return {f"{folder}/{name}": body for name, body in files.items()}


def names_text() -> str:
    return "".join(f"{name}\n" for name in NAMES)


# --- sets with lists of their own


def lists(lines: Mapping[str, list[str]]) -> dict[str, bytes | str]:
    return {name: "".join(f"{line}\n" for line in said) for name, said in lines.items()}


def food101(root: Path) -> None:
    train = ["apple_pie/11", "apple_pie/12", "pho/13"]
    test = ["apple_pie/14", "pho/15"]
    pictures = {
        f"images/{name}.jpg": encoded(int(name.partition("/")[2])) for name in (*train, *test)
    }
    tables = lists({"meta/train.txt": train, "meta/test.txt": test})
    write(root / "food-101", {**pictures, **tables})


def oxford_pets(root: Path) -> None:
    train = ["Abyssinian_1 1 1 1", "american_bulldog_2 2 2 1", "Bombay_5 8 1 3"]
    test = ["Abyssinian_3 1 1 1", "american_bulldog_4 2 2 1", "Bombay_6 8 1 3"]
    names = [line.partition(" ")[0] for line in (*train, *test)]
    pictures = {f"images/{name}.jpg": encoded(int(name[-1])) for name in names}
    said = {"annotations/trainval.txt": train, "annotations/test.txt": ["#Image CLASS-ID", *test]}
    write(root / "oxford-iiit-pet", {**pictures, **lists(said)})


def flowers102(root: Path) -> None:
    kinds = [number % 102 + 1 for number in range(306)]
    pictures = {f"jpg/image_{number:05d}.jpg": encoded(number - 1) for number in range(1, 307)}
    folder = write(root / "flowers-102", pictures)
    savemat(folder / "imagelabels.mat", {"labels": np.array([kinds], dtype=np.uint8)})
    ids = {"trnid": range(1, 103), "valid": range(103, 205), "tstid": range(205, 307)}
    arrays = {name: np.array([list(part)], dtype=np.uint16) for name, part in ids.items()}
    savemat(folder / "setid.mat", arrays, do_compression=True)


def caltech101(root: Path) -> None:
    counts = {"accordion": 33, "car_side": 32, "BACKGROUND_Google": 40}
    files = {
        f"{of}/image_{row:04d}.jpg": encoded(row) for of, n in counts.items() for row in range(n)
    }
    write(root / "caltech101" / "101_ObjectCategories", files)


def dtd(root: Path) -> None:
    train, val = ["banded/b_1.jpg", "polka-dotted/p_2.jpg"], ["banded/b_3.jpg"]
    test = ["banded/b_4.jpg", "polka-dotted/p_5.jpg"]
    pictures = {f"images/{name}": encoded(int(name[-5])) for name in (*train, *val, *test)}
    said = {"labels/train1.txt": train, "labels/val1.txt": val, "labels/test1.txt": test}
    write(root / "dtd" / "dtd", {**pictures, **lists(said)})


def fgvc_aircraft(root: Path) -> None:
    train, test = ["0000001 F-16A/B", "0000002 DC-3"], ["0000003 DC-3", "0000004 F-16A/B"]
    pictures = {f"images/{line[:7]}.jpg": encoded(int(line[:7])) for line in (*train, *test)}
    said = {"images_variant_trainval.txt": train, "images_variant_test.txt": test}
    write(root / "fgvc-aircraft-2013b" / "data", {**pictures, **lists(said)})


LANDS = (
    *("AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial", "Pasture"),
    *("PermanentCrop", "Residential", "River", "SeaLake"),
)


def eurosat(root: Path) -> None:
    files = {
        f"{of}/{of}_{row}.jpg": encoded(10 * place + row)
        for place, of in enumerate(LANDS)
        for row in range(10)
    }
    write(root / "eurosat" / "2750", files)


def stanford_cars(root: Path) -> None:
    named = np.array(["AM General Hummer SUV 2000", "smart fortwo Convertible 2012"], dtype=object)
    said = {"cars_train": {1: 1, 2: 2, 3: 1}, "cars_test": {4: 2, 5: 1}}
    pictures = {
        f"{part}/{row:05d}.jpg": encoded(row) for part, rows in said.items() for row in rows
    }
    folder = write(root / "stanford_cars", {**pictures, "devkit/README.txt": "cars"})
    savemat(folder / "devkit" / "cars_meta.mat", {"class_names": named[None]})
    kinds = [("bbox_x1", object), ("class", object), ("fname", object)]
    tables = ("devkit/cars_train_annos.mat", "cars_test_annos_withlabels.mat")
    for table, rows in zip(tables, said.values(), strict=True):
        lines = [(30.0, float(of), f"{row:05d}.jpg") for row, of in rows.items()]
        savemat(folder / table, {"annotations": np.array([lines], dtype=kinds)})


def rendered_sst2(root: Path) -> None:
    parts = {"train": (1, 2), "valid": (3, 4), "test": (5, 6)}
    files = {
        f"{part}/{of}/{row}.png": encoded(row)
        for part, rows in parts.items()
        for of, row in zip(("negative", "positive"), rows, strict=True)
    }
    write(root / "rendered-sst2", files)


def sun397(root: Path) -> None:
    train = ["/a/abbey/sun_a1.jpg", "/b/balcony/interior/sun_b2.jpg"]
    test = ["/a/abbey/sun_a3.jpg", "/b/balcony/interior/sun_b4.jpg"]
    pictures = {name[1:]: encoded(int(name[-5])) for name in (*train, *test)}
    said = {"Training_01.txt": train, "Testing_01.txt": test}
    write(root / "SUN397", {**pictures, **lists(said)})


def stl10(root: Path) -> None:
    small = pixels(6).repeat(3, axis=1).repeat(3, axis=2)  # 32 px to the release's 96
    columns_first = small.transpose(0, 3, 2, 1)
    parts = {"train": columns_first[:4], "test": columns_first[4:]}
    labels = {"train": bytes([1, 2, 3, 1]), "test": bytes([2, 3])}
    files: dict[str, bytes | str] = {"class_names.txt": "airplane\nbird\ncar\n"}
    for part, images in parts.items():
        files |= {f"{part}_X.bin": images.tobytes(), f"{part}_y.bin": labels[part]}
    write(root / "stl10_binary", files)


def svhn(root: Path) -> None:
    (root / "svhn").mkdir(parents=True)
    for part, rows, labels in (
        ("train", slice(0, 4), [1, 10, 9, 2]),
        ("test", slice(4, 6), [10, 3]),
    ):
        images = pixels(6)[rows].transpose(1, 2, 3, 0)
        y = np.array([[label] for label in labels], dtype=np.uint8)
        path = root / "svhn" / f"{part}_32x32.mat"
        savemat(path, {"X": images, "y": y}, do_compression=True)
