"""Labelled image sets from the files people have: a reader for each, by name.

Nothing is fetched and nothing is written. A reader is given the folder above the data set or the
data set's own, and says what it looked for where it finds nothing.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

from victims.array_sets import stl10, svhn
from victims.cifar_files import cifar10, cifar100
from victims.errors import GridError
from victims.imagenet_files import imagenet
from victims.picture_files import (
    Found,
    absent,
    listed,
    part_of_files,
    pictures_in,
    require_unique,
    text_of,
)
from victims.zero_shot_sets import ZERO_SHOT_SETS

GTSRB_CLASSES: Final = (
    *("speed limit 20", "speed limit 30", "speed limit 50", "speed limit 60", "speed limit 70"),
    *("speed limit 80", "end of speed limit 80", "speed limit 100", "speed limit 120"),
    *("no passing", "no passing for trucks", "right of way at the next crossing"),
    *("priority road", "give way", "stop", "no vehicles", "no trucks", "no entry", "danger"),
    *("curve to the left", "curve to the right", "double curve", "bumpy road", "slippery road"),
    *("road narrows on the right", "road works", "traffic lights", "pedestrians", "children"),
    *("bicycles", "snow or ice", "wild animals", "end of all limits", "turn right ahead"),
    *("turn left ahead", "straight ahead only", "straight ahead or right"),
    *("straight ahead or left", "keep right", "keep left", "roundabout", "end of no passing"),
    "end of no passing for trucks",
)


def gtsrb(root: Path) -> Found:
    """German traffic signs as torchvision lays them out, whole pictures (not the sign's box).

    Stallkamp et al., "The German Traffic Sign Recognition Benchmark", IJCNN 2011.
    """
    advice = "Give as root the folder that holds gtsrb/, or gtsrb/ itself, or gtsrb/GTSRB/."
    places = [root / "gtsrb" / "GTSRB", root / "GTSRB", root]
    signs = next((place for place in places if (place / "Training").is_dir()), None)
    if signs is None:
        raise absent("gtsrb", "gtsrb/GTSRB/Training/", root, advice)
    tables = [folder / "GT-final_test.csv" for folder in (signs.parent, signs)]
    table = next((path for path in tables if path.is_file()), None)
    if table is None:
        wanted = "GT-final_test.csv (the labels of the test pictures)"
        raise absent("gtsrb", wanted, signs.parent, "Put it there.")
    numbers = {f"{number:05d}": number for number in range(len(GTSRB_CLASSES))}
    train = _by_folder("gtsrb", signs / "Training", numbers)
    labels = _sign_labels(table)
    test = _annotated("gtsrb", signs / "Final_Test" / "Images", labels, table)
    files = {"GT-final_test.csv": table, **_named(signs, [*train, *test])}
    # No file of the set names its classes.
    return replace(_found(GTSRB_CLASSES, files, train, test), names_apart=True)


def _sign_labels(table: Path) -> dict[str, int]:
    """Class by file name, from the table of the test pictures."""
    rows = list(csv.DictReader(text_of(table).splitlines(), delimiter=";"))
    labels: dict[str, int] = {}
    for line, row in enumerate(rows, start=2):
        name, label = row.get("Filename"), row.get("ClassId") or ""
        if not name or not label.isdecimal() or int(label) >= len(GTSRB_CLASSES):
            raise GridError(
                f"{table}, line {line}: needs the columns Filename and ClassId (0 to "
                f"{len(GTSRB_CLASSES) - 1}), separated by semicolons"
            )
        labels[name] = int(label)
    return labels


def tiny_imagenet(root: Path) -> Found:
    """Tiny ImageNet as released, or with ``val`` sorted into class folders. The classes, in the
    order of their ids, have their first word in words.txt as name."""
    places = [root / "tiny-imagenet-200", root]
    folder = next((place for place in places if (place / "wnids.txt").is_file()), None)
    if folder is None:
        advice = "Give as root the folder that holds tiny-imagenet-200/, or that folder itself."
        raise absent("tiny_imagenet", "tiny-imagenet-200/wnids.txt", root, advice)
    words, val = folder / "words.txt", folder / "val"
    if not words.is_file():
        raise absent("tiny_imagenet", "words.txt (the class names)", folder, "Put it there.")
    ids = sorted(set(text_of(folder / "wnids.txt").split()))
    files = {name: folder / name for name in ("wnids.txt", "words.txt")}
    number = {wnid: label for label, wnid in enumerate(ids)}
    train = _by_folder("tiny_imagenet", folder / "train", _with_images(folder / "train", number))
    if pictures_in(val / "images"):
        table = val / "val_annotations.txt"
        test = _annotated("tiny_imagenet", val / "images", _val_labels(table, number), table)
        files["val/val_annotations.txt"] = table
    else:
        test = _by_folder("tiny_imagenet", val, _with_images(val, number))
    files |= _named(folder, [*train, *test])
    return _found(_synset_names(words, ids), files, train, test)


def _with_images(folder: Path, number: Mapping[str, int]) -> dict[str, int]:
    """The classes' folders, or those named ``images`` in them, as released."""
    inner = {name: f"{name}/images" for name in number}
    return {
        inner[name] if (folder / inner[name]).is_dir() else name: label
        for name, label in number.items()
    }


def _val_labels(table: Path, number: Mapping[str, int]) -> dict[str, int]:
    """Class by file name, from the table of the validation pictures."""
    if not table.is_file():
        raise absent("tiny_imagenet", f"{table.name} (the labels)", table.parent, "Put it there.")
    labels: dict[str, int] = {}
    for line, text in enumerate(text_of(table).splitlines(), start=1):
        name, _, rest = text.partition("\t")
        if (wnid := rest.partition("\t")[0]) not in number:
            raise GridError(
                f"{table}, line {line}: needs a file name, a tab and an id of wnids.txt"
            )
        labels[name] = number[wnid]
    return labels


def _synset_names(words: Path, ids: Sequence[str]) -> tuple[str, ...]:
    """The first synonym of each class; where classes share it, the second beside it, or the id."""
    wanted, synonyms = set(ids), dict[str, list[str]]()
    for line in text_of(words).splitlines():
        wnid, _, said = line.partition("\t")
        if wnid in wanted:
            synonyms[wnid] = [word.strip() for word in said.split(",") if word.strip()]
    if unnamed := [wnid for wnid in ids if not synonyms.get(wnid)]:
        raise GridError(f"{words}: no words for {', '.join(unnamed[:5])} of wnids.txt")
    names = [synonyms[wnid][0] for wnid in ids]
    seconds = [(synonyms[wnid][1:2] or [wnid])[0] for wnid in ids]
    for beside in (seconds, ids):
        count = Counter(names)
        for place, wnid in enumerate(ids):
            if count[names[place]] > 1:
                names[place] = f"{synonyms[wnid][0]}, {beside[place]}"
    return require_unique(names, words)


def image_folder(root: Path) -> Found:
    """Any set as ``train/CLASS/*`` and ``test/CLASS/*`` (or ``val``, where there is no test)."""
    advice = "Give as root a folder with train/CLASS/ and test/CLASS/ (or val/CLASS/)."
    if not (root / "train").is_dir():
        raise absent("image_folder", "train/", root, advice)
    tested = next((root / n for n in ("test", "val") if (root / n).is_dir()), None)
    if tested is None:
        raise absent("image_folder", "test/ or val/", root, advice)
    folders, others = _folders(root / "train"), _folders(tested)
    if strange := [name for name in others if name not in set(folders)]:
        wanted = f"the classes of {tested.name}/ ({', '.join(strange[:5])})"
        raise absent("image_folder", wanted, root / "train", "What is tested must be trained on.")
    number = {name: label for label, name in enumerate(folders)}
    train = _by_folder("image_folder", root / "train", number)
    test = _by_folder("image_folder", tested, {name: number[name] for name in others})
    classes = require_unique([name.replace("_", " ") for name in folders], root / "train")
    return _found(classes, _named(root, [*train, *test]), train, test)


def _folders(folder: Path) -> list[str]:
    return [path.name for path in listed(folder) if path.is_dir()]


def _by_folder(dataset: str, folder: Path, labels: Mapping[str, int]) -> dict[Path, int]:
    """Pictures with their classes, one folder a class."""
    found: dict[Path, int] = {}
    for name, label in labels.items():
        if not (pictures := pictures_in(folder / name)):
            advice = "Every class needs pictures: unpack the whole data set there."
            raise absent(dataset, f"pictures of class {name}", folder / name, advice)
        found |= dict.fromkeys(pictures, label)
    if not found:
        raise absent(dataset, "a folder for each class", folder, "Unpack the whole data set there.")
    return found


def _annotated(
    dataset: str, folder: Path, labels: Mapping[str, int], table: Path
) -> dict[Path, int]:
    """Pictures with their classes, which a table says by file name."""
    pictures = pictures_in(folder)
    there = {path.name for path in pictures}
    if missing := [name for name in labels if name not in there]:
        advice = f"{table.name} speaks of them: unpack the whole data set there."
        raise absent(dataset, f"{', '.join(missing[:5])} ({len(missing)} files)", folder, advice)
    if unknown := sorted(there - labels.keys()):
        raise GridError(f"{table}: has no line for {unknown[0]} ({len(unknown)} such in {folder})")
    if not pictures:
        raise absent(dataset, "test pictures", folder, "Unpack the whole data set there.")
    return {path: labels[path.name] for path in pictures}


def _named(folder: Path, paths: Sequence[Path]) -> dict[str, Path]:
    above = f"{folder.as_posix()}/"
    return {path.as_posix().removeprefix(above): path for path in paths}


def _found(
    classes: tuple[str, ...],
    files: Mapping[str, Path],
    train: Mapping[Path, int],
    test: Mapping[Path, int],
) -> Found:
    parts = [partial(part_of_files, list(part), list(part.values())) for part in (train, test)]
    return Found(classes=classes, files=files, train=parts[0], test=parts[1])


DATASETS: Final[Mapping[str, Callable[[Path], Found]]] = {
    "cifar10": cifar10,
    "cifar100": cifar100,
    "gtsrb": gtsrb,
    "image_folder": image_folder,
    "imagenet": imagenet,
    "stl10": stl10,
    "svhn": svhn,
    "tiny_imagenet": tiny_imagenet,
    **ZERO_SHOT_SETS,
}
