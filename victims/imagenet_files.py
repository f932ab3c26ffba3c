"""ImageNet in the forms in which it lies on disks: folders by class, flat pictures with a table of
labels, tar files that are read where they lie.

Russakovsky et al., "ImageNet Large Scale Visual Recognition Challenge", IJCV 2015. A set of the
same shape with fewer classes is read, too, if it brings the names of its classes along.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Final

from victims.errors import GridError
from victims.files_by_class import FilesByClass
from victims.imagenet_labels import TABLES, Label, labels_of, require_cover
from victims.imagenet_names import NUM_CLASSES, imagenet_names, in_order, names_of, require_known
from victims.picture_files import (
    ENDINGS,
    Found,
    Part,
    absent,
    files_of,
    listed,
    named_part,
    pictures_in,
)
from victims.tar_files import Source, members

_HOMES: Final = ("", "imagenet", "ImageNet", "ILSVRC2012", "ILSVRC/Data/CLS-LOC")
_FOLDERS: Final = ("val", "validation", "ILSVRC2012_img_val")
_TARS: Final = ("ILSVRC2012_img_val.tar", "val.tar")
_KIT: Final = "ILSVRC2012_devkit_t12/data"


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
    train = partial(_train, home, wnids, names)
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
    wnids = in_order(label for label in labels.values() if isinstance(label, str))
    names, of_names = names_of(places, wnids)
    number: dict[Label, int] = {wnid: place for place, wnid in enumerate(wnids)}
    numbers = {name: number.get(label, -1) for name, label in labels.items()}
    if not wnids:
        numbers = {name: int(label) for name, label in labels.items()}
    require_cover(list(numbers.values()), len(names), where)
    return numbers, wnids or of_names, names


def _train(home: Path, wnids: Sequence[str], names: Sequence[str]) -> Part:
    """Training pictures from a folder or a tar file for each class."""
    folder = home / "train"
    advice = (
        "Training pictures lie in train/n01440764/ or train/n01440764.tar, one for each class."
        " Without any, what is held out for tuning can be cut from the validation pictures, if"
        " that is said: tuning_from: test."
    )
    if not folder.is_dir():
        raise absent("imagenet", "train/", home, advice)
    if not wnids:
        # Where the labels are numbers, they are in the order of the ids.
        wnids = in_order(path.name.removesuffix(".tar") for path in listed(folder))
        if len(wnids) == len(names) == NUM_CLASSES and tuple(names) == imagenet_names():
            require_known(wnids, folder)
    if len(wnids) != len(names):
        raise absent("imagenet", f"a folder or .tar for each of {len(names)}", folder, advice)
    files = FilesByClass("train")
    for wnid in wnids:
        archive = folder / f"{wnid}.tar"
        inner = _in_tar(archive) if archive.is_file() else {}
        inside = {PurePosixPath(name).name: source for name, source in inner.items()}
        if not files.add(folder / wnid, inside):
            raise absent("imagenet", f"pictures of class {wnid}", folder, advice)
    return files.part()
