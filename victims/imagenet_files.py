"""ImageNet in the forms in which it lies on disks: folders by class, flat pictures with a table of
labels, tar files that are read where they lie.

Russakovsky et al., "ImageNet Large Scale Visual Recognition Challenge", IJCV 2015. A set of the
same shape with fewer classes is read, too, if it brings the names of its classes along.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Final

from victims.errors import GridError, UsageError
from victims.imagenet_labels import TABLES, Label, labels_of, require_cover
from victims.picture_files import (
    ENDINGS,
    Found,
    Part,
    absent,
    files_of,
    listed,
    named_part,
    pictures_in,
    require_unique,
    text_of,
)
from victims.tar_files import Source, members

_HOMES: Final = ("", "imagenet", "ImageNet", "ILSVRC2012", "ILSVRC/Data/CLS-LOC")
_FOLDERS: Final = ("val", "validation", "ILSVRC2012_img_val")
_TARS: Final = ("ILSVRC2012_img_val.tar", "val.tar")
_KIT: Final = "ILSVRC2012_devkit_t12/data"
NUM_CLASSES: Final = 1000
# The list that comes with open_clip has two names twice, which were equal text weights: their
# classes get the first word that WordNet has for them.
_TWICE: Final[Mapping[int, tuple[str, str]]] = {
    744: ("missile", "projectile"),
    836: ("sunglasses", "sunglass"),
}


@dataclass(frozen=True, slots=True)
class _Validation:
    """The validation pictures, each with the name of its folder, and where they lie."""

    where: Path
    pictures: Mapping[str, Source]


def imagenet(root: Path) -> Found:
    """ImageNet's validation pictures as the test set, and what there is of its training pictures.

    ``files`` do not depend on the form: a set that is sorted, packed or unpacked stays the same.
    """
    home, found = _validation(root)
    numbers, wnids, names = _classes(root, home, found)
    pictures = [
        (name.rpartition("/")[2], numbers[name], source) for name, source in found.pictures.items()
    ]
    test = partial(named_part, "val", pictures)
    train = partial(_train, home, wnids, len(names))
    files = files_of(test, train) if (home / "train").is_dir() else files_of(test)
    return Found(classes=names, files=files, train=train, test=test, names_apart=True)


def _validation(root: Path) -> tuple[Path, _Validation]:
    """The set's own folder, and its validation pictures."""
    for home in (root / name for name in _HOMES):
        for folder in (home / name for name in _FOLDERS):
            if pictures := _in_folder(folder):
                return home, _Validation(folder, pictures)
        for archive in (home / name for name in _TARS):
            if archive.is_file():
                return home, _Validation(archive, _in_tar(archive))
        # The validation folder itself, if a table beside its pictures says so.
        if any((home / table).is_file() for table in TABLES) and pictures_in(home):
            return home, _Validation(home, _in_folder(home))
    wanted = f"val/ with pictures, {_TARS[0]} or {_TARS[1]}"
    raise absent("imagenet", wanted, root, "Give as root the folder that holds them.")


def _in_folder(folder: Path) -> dict[str, Source]:
    """Pictures by ``CLASS/NAME``, or by name where they are flat."""
    flat = pictures_in(folder)
    if flat:
        return {path.name: path for path in flat}
    classes = [path for path in listed(folder) if path.is_dir()]
    return {f"{of.name}/{path.name}": path for of in classes for path in pictures_in(of)}


def _in_tar(archive: Path) -> dict[str, Source]:
    found: dict[str, Source] = {}
    inside = {PurePosixPath(name): member for name, member in members(archive).items()}
    pictures = {path: m for path, m in inside.items() if path.suffix.lower() in ENDINGS}
    # All in one folder, or in none: flat. Otherwise the folder is the class.
    is_flat = len({path.parent for path in pictures}) == 1
    for path, member in sorted(pictures.items()):
        name = path.name if is_flat else f"{path.parent.name}/{path.name}"
        if name in found:
            raise GridError(f"{archive}: holds {name} in two folders")
        found[name] = member
    if not found:
        raise GridError(f"{archive}: holds no pictures")
    return found


def _classes(
    root: Path, home: Path, found: _Validation
) -> tuple[dict[str, int], Sequence[str], tuple[str, ...]]:
    """Class number of each picture, ids of the classes in order (none: unknown), and names."""
    folder = found.where if found.where.is_dir() else home
    places = list(dict.fromkeys([folder, home, root, home / _KIT, root / _KIT]))
    labels: dict[str, Label] = {name: name.rpartition("/")[0] for name in found.pictures}
    where = found.where
    if not all(labels.values()):
        told = labels_of(list(found.pictures), places)
        if told is None:
            wanted = f"labels of the flat pictures ({', '.join(TABLES)})"
            raise absent("imagenet", wanted, home, "Put one there, or sort them into folders.")
        labels, where = told
    wnids = sorted({label for label in labels.values() if isinstance(label, str)})
    names, of_names = _names(places, wnids)
    number: dict[Label, int] = {wnid: place for place, wnid in enumerate(wnids)}
    numbers = {name: number.get(label, -1) for name, label in labels.items()}
    if not wnids:
        numbers = {name: int(label) for name, label in labels.items()}
    require_cover(list(numbers.values()), len(names), where)
    return numbers, wnids or of_names, names


def _names(places: Sequence[Path], wnids: Sequence[str]) -> tuple[tuple[str, ...], list[str]]:
    """Names of the classes, and their ids where the file of the names says them."""
    for place in places:
        text, table = place / "classnames.txt", place / "classes.json"
        if text.is_file():
            names = [line.strip() for line in text_of(text).splitlines()]
            if wnids and len(names) != len(wnids):
                raise UsageError(
                    f"{text}: {len(names)} names for {len(wnids)} classes; it needs one a line, in"
                    f" the order of the ids ({', '.join(wnids[:3])}, ...)"
                )
            return require_unique(names, text), []
        if table.is_file():
            named = _by_wnid(table)
            if unnamed := [wnid for wnid in wnids if wnid not in named]:
                raise UsageError(f"{table}: no name for {', '.join(unnamed[:5])}")
            ids = list(wnids) or sorted(named)
            return require_unique([named[wnid] for wnid in ids], table), ids
    if wnids and len(wnids) != NUM_CLASSES:
        raise UsageError(
            f"imagenet: {len(wnids)} classes in {places[0]}, and the names that are known are those"
            f" of all {NUM_CLASSES}. Put classnames.txt there (a name a line, in the order of the"
            ' ids) or classes.json ({"n01440764": "tench", ...}).'
        )
    return imagenet_names(), []


def _by_wnid(table: Path) -> dict[str, str]:
    try:
        named = json.loads(text_of(table))
    except ValueError as error:
        raise GridError(f"{table}: no JSON ({error})") from error
    if not isinstance(named, dict) or not all(isinstance(n, str) for n in named.values()):
        raise GridError(f'{table}: needs names by id, {{"n01440764": "tench", ...}}')
    return named


def imagenet_names() -> tuple[str, ...]:
    """The names of all classes: OpenAI's, as open_clip has them, no name twice."""
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES  # slow to import

    names = list(IMAGENET_CLASSNAMES)
    if len(names) != NUM_CLASSES:
        raise GridError(f"open_clip has {len(names)} names of ImageNet's {NUM_CLASSES} classes")
    for index, (shared, own) in _TWICE.items():
        if names[index] == shared:
            names[index] = own
    return require_unique(names, Path("open_clip.zero_shot_metadata"))


def _train(home: Path, wnids: Sequence[str], num_classes: int) -> Part:
    """Training pictures from a folder or a tar file for each class."""
    folder, pictures = home / "train", list[tuple[str, int, Source]]()
    advice = (
        "Training pictures lie in train/n01440764/ or train/n01440764.tar, one for each class."
        " Without any, what is held out for tuning can be cut from the validation pictures, if"
        " that is said: tuning_from: test."
    )
    if not folder.is_dir():
        raise absent("imagenet", "train/", home, advice)
    # Where the labels are numbers, they are in the order of the ids.
    there = sorted({path.name.removesuffix(".tar") for path in listed(folder)})
    wnids = wnids or there
    if len(wnids) != num_classes:
        raise absent("imagenet", f"a folder or .tar for each of {num_classes}", folder, advice)
    for number, wnid in enumerate(wnids):
        archive = folder / f"{wnid}.tar"
        inner = _in_tar(archive) if archive.is_file() else {}
        here: dict[str, Source] = {
            PurePosixPath(name).name: source for name, source in inner.items()
        }
        here |= {path.name: path for path in pictures_in(folder / wnid)}
        if not here:
            raise absent("imagenet", f"pictures of class {wnid}", folder, advice)
        pictures.extend((name, number, source) for name, source in here.items())
    return named_part("train", pictures)
