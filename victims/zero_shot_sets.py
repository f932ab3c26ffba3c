"""Sets that papers judge CLIPs by, as they are released and as torchvision unpacks them.

Each has lists of its training and test pictures, or, where the release has none, a cut that this
module makes and the documents name. Where a release has a validation part, it is trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Final

from victims.errors import GridError
from victims.mat_files import read_mat, read_structures, read_texts
from victims.picture_files import (
    Found,
    absent,
    files_of,
    named_part,
    pictures_in,
    require_unique,
)
from victims.picture_lists import (
    Listing,
    Row,
    after_30,
    below_letter,
    breed,
    cut,
    folder_first,
    last_fifth,
    listed,
    picture_then_class,
    sorted_into,
)


def _spoken(name: str) -> str:
    """A folder's name in words: ``apple_pie`` is an apple pie."""
    return " ".join(name.replace("_", " ").split())


def _title(name: str) -> str:
    return " ".join(word[0].upper() + word[1:] for word in _spoken(name).split())


def _place(name: str) -> str:
    """``balcony/interior`` is a balcony interior."""
    return _spoken(name.replace("/", " "))


def _as_numbers(of: str) -> str:
    """The classes of some sets are numbers on disk, and all others are words."""
    return of.zfill(4) if of.isdecimal() else of


@dataclass(frozen=True, slots=True, kw_only=True)
class _Set:
    """Where a set lies and how it is read. ``needs`` is what its folder is known by; ``train`` and
    ``test`` list pictures; ``spoken`` turns a class's name on disk into words, or
    ``names`` knows them all. ``classes`` are on disk in every whole copy, where no list says so;
    ``order`` is that of the classes."""

    homes: tuple[str, ...]
    needs: str
    train: Listing
    test: Listing
    words: Mapping[str, str] | None = None
    spoken: Callable[[str], str] = _spoken
    names: Callable[[Path], tuple[str, ...]] | None = None
    classes: tuple[str, ...] = ()
    order: Callable[[str], str] = _as_numbers


def read_set(dataset: str, root: Path) -> Found:
    """One of the sets of this module."""
    about = _SETS[dataset]
    folder = next((root / h for h in about.homes if (root / h / about.needs).exists()), None)
    if folder is None:
        wanted = f"{about.homes[0]}/{about.needs}"
        advice = f"Give as root the folder that holds {about.homes[0]}/, or that folder itself."
        raise absent(dataset, wanted, root, advice)
    rows = {"train": list(about.train(folder)), "test": list(about.test(folder))}
    _require_apart(dataset, folder, rows)
    trained, tested = ({of for _, of in rows[part]} for part in ("train", "test"))
    if trained != tested:
        odd = ", ".join(sorted(trained ^ tested)[:5])
        raise GridError(f"{dataset}: {folder}: not both trained on and tested: {odd}")
    if missing := sorted(set(about.classes) - trained):
        raise GridError(
            f"{dataset}: {folder}: no pictures of {', '.join(missing[:5])}, of its"
            f" {len(about.classes)} classes. Accuracy on the others is that of an easier set:"
            " unpack the whole set there."
        )
    kinds = sorted(trained, key=about.order)
    number = {of: label for label, of in enumerate(kinds)}
    classes = require_unique(_named(about, kinds, folder), folder)
    parts = {
        part: partial(
            named_part,
            part,
            [(name, number[of], folder / name) for name, of in rows[part]],
        )
        for part in rows
    }
    train, test = parts["train"], parts["test"]
    files = files_of(train, test)
    return Found(classes=classes, files=files, train=train, test=test, names_apart=True)


def _named(about: _Set, kinds: list[str], folder: Path) -> list[str]:
    if about.names is not None:
        names = about.names(folder)
        if kinds != [str(number) for number in range(1, len(names) + 1)]:
            raise GridError(
                f"{folder}: {len(kinds)} classes have pictures in both parts, and there are"
                f" {len(names)}. Unpack the whole set."
            )
        return list(names)
    said = about.words or {}
    return [said.get(of) or about.spoken(of) for of in kinds]


def _require_apart(dataset: str, folder: Path, rows: Mapping[str, list[Row]]) -> None:
    """All pictures are there, and none is both trained on and tested."""
    seen: set[str] = set()
    for part, listing in rows.items():
        names = [name for name, _ in listing]
        if not names:
            raise absent(dataset, f"{part} pictures", folder, "Unpack the whole set there.")
        if twice := seen & set(names):
            raise GridError(f"{dataset}: {folder}: {min(twice)} is trained on and tested")
        if len(set(names)) < len(names):
            raise GridError(f"{dataset}: {folder}: the {part} list names a picture twice")
        seen |= set(names)
    there = {str(at) for at in {PurePosixPath(name).parent for name in seen}}
    have = {f"{at}/{path.name}" for at in there for path in pictures_in(folder / at)}
    if missing := sorted(seen - have):
        some = f"{', '.join(missing[:3])} ({len(missing)} files)"
        raise absent(dataset, some, folder, "Its lists speak of them: unpack the whole set there.")


def _flowers(*splits: str) -> Listing:
    """Pictures of the parts that ``setid.mat`` names."""

    def read(folder: Path) -> Iterator[Row]:
        labels, ids = read_mat(folder / "imagelabels.mat"), read_mat(folder / "setid.mat")
        for name in (*splits, "labels"):
            if name not in (labels if name == "labels" else ids):
                raise GridError(f"{folder}: no array {name} in setid.mat and imagelabels.mat")
        of = labels["labels"].ravel()
        for split in splits:
            for number in ids[split].ravel().tolist():
                if not 1 <= number <= len(of):
                    raise GridError(f"{folder}/setid.mat: {split} speaks of picture {number}")
                yield f"jpg/image_{number:05d}.jpg", str(int(of[number - 1]))

    return read


def _flower_names(folder: Path) -> tuple[str, ...]:
    from torchvision.datasets import Flowers102  # slow to import

    try:
        return tuple(Flowers102.classes)
    except AttributeError as error:
        raise GridError(
            "flowers102: this torchvision does not name its classes: update it"
        ) from error


def _cars(pictures: str, *tables: str) -> Listing:
    """Pictures of a part by the first of its tables that is there, with their classes' numbers."""

    def read(folder: Path) -> Iterator[Row]:
        table = next((folder / name for name in tables if (folder / name).is_file()), None)
        if table is None:
            advice = "It says which car each picture shows: put it there."
            raise absent("stanford_cars", tables[0], folder, advice)
        for place, row in enumerate(read_structures(table, "annotations"), 1):
            name, of = row.get("fname"), row.get("class")
            if not isinstance(name, str) or isinstance(of, str | None) or of.size != 1:
                raise GridError(f"{table}: annotation {place} names no picture and class")
            if PurePosixPath(name).name != name:
                raise GridError(f"{table}: annotation {place}: {name!r} is no file's name")
            yield f"{pictures}/{name}", str(int(of.item()))

    return read


def _car_names(folder: Path) -> tuple[str, ...]:
    return tuple(read_texts(folder / "devkit" / "cars_meta.mat", "class_names"))


# As CLIP's authors call them (Radford et al., 2021; data/prompts.md of their code).
_LANDS: Final = {
    "AnnualCrop": "annual crop land",
    "Forest": "forest",
    "HerbaceousVegetation": "brushland or shrubland",
    "Highway": "highway or road",
    "Industrial": "industrial buildings or commercial buildings",
    "Pasture": "pasture land",
    "PermanentCrop": "permanent crop land",
    "Residential": "residential buildings or homes or apartments",
    "River": "river",
    "SeaLake": "lake or sea",
}
_THINGS: Final = {
    "Faces": "off-center face",
    "Faces_easy": "centered face",
    "Leopards": "leopard",
    "Motorbikes": "motorbike",
    "airplanes": "airplane",
    "car_side": "side of a car",
}

_SETS: Final[Mapping[str, _Set]] = {
    "caltech101": _Set(
        homes=("caltech101/101_ObjectCategories", "101_ObjectCategories", ""),
        needs="accordion",
        train=cut(after_30, tested=False),
        test=cut(after_30, tested=True),
        words=_THINGS,
    ),
    "dtd": _Set(
        homes=("dtd", "dtd/dtd", ""),
        needs="labels/test1.txt",
        train=listed("labels/train1.txt", "labels/val1.txt", row=folder_first, below="images/"),
        test=listed("labels/test1.txt", row=folder_first, below="images/"),
    ),
    "eurosat": _Set(
        homes=("eurosat/2750", "2750", "EuroSAT_RGB", ""),
        needs="AnnualCrop",
        train=cut(last_fifth, tested=False),
        test=cut(last_fifth, tested=True),
        words=_LANDS,
        classes=tuple(_LANDS),
    ),
    "fgvc_aircraft": _Set(
        homes=("fgvc-aircraft-2013b/data", "data", ""),
        needs="images_variant_test.txt",
        train=listed(
            "images_variant_trainval.txt", row=picture_then_class, below="images/", ending=".jpg"
        ),
        test=listed(
            "images_variant_test.txt", row=picture_then_class, below="images/", ending=".jpg"
        ),
    ),
    "flowers102": _Set(
        homes=("flowers-102", ""),
        needs="setid.mat",
        train=_flowers("trnid", "valid"),
        test=_flowers("tstid"),
        names=_flower_names,
    ),
    "food101": _Set(
        homes=("food-101", ""),
        needs="meta/test.txt",
        train=listed("meta/train.txt", row=folder_first, below="images/", ending=".jpg"),
        test=listed("meta/test.txt", row=folder_first, below="images/", ending=".jpg"),
    ),
    "oxford_pets": _Set(
        homes=("oxford-iiit-pet", ""),
        needs="annotations/test.txt",
        train=listed("annotations/trainval.txt", row=breed, below="images/", ending=".jpg"),
        test=listed("annotations/test.txt", row=breed, below="images/", ending=".jpg"),
        spoken=_title,
        order=str.casefold,  # as the release numbers them
    ),
    "rendered_sst2": _Set(
        homes=("rendered-sst2", ""),
        needs="test/positive",
        train=sorted_into("train", "valid"),
        test=sorted_into("test"),
        classes=("negative", "positive"),
    ),
    "stanford_cars": _Set(
        homes=("stanford_cars", "stanford-cars", ""),
        needs="devkit/cars_meta.mat",
        train=_cars("cars_train", "devkit/cars_train_annos.mat"),
        test=_cars(
            "cars_test",
            "cars_test_annos_withlabels.mat",
            "devkit/cars_test_annos_withlabels.mat",
        ),
        names=_car_names,
    ),
    "sun397": _Set(
        homes=("SUN397", ""),
        needs="Testing_01.txt",
        train=listed("Training_01.txt", row=below_letter),
        test=listed("Testing_01.txt", row=below_letter),
        spoken=_place,
    ),
}

ZERO_SHOT_SETS: Final[Mapping[str, Callable[[Path], Found]]] = {
    dataset: partial(read_set, dataset) for dataset in _SETS
}
