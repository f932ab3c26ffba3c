"""ImageNet in every form in which it lies on disks: always the same set, and no form that lies."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from tests.set_files import (
    NAMES,
    TRAIN,
    VAL,
    WNIDS,
    below,
    by_class,
    chw,
    encoded,
    flat,
    names_text,
    trained,
    val_name,
    write,
    write_tar,
)
from victims.corpora import Reader, build_corpus, corpus_key, open_corpus
from victims.errors import GridError, UsageError
from victims.evaluation_sets import EvaluationSet, evaluation_splits
from victims.files_by_class import FilesByClass
from victims.imagenet_files import imagenet
from victims.imagenet_labels import require_cover
from victims.imagenet_names import imagenet_names
from victims.labelled_files import labelled_splits
from victims.prompts import prompt_templates
from victims.store import Store
from victims.tar_files import Member, members

SIZE = 32


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def rows_of(spec: EvaluationSet) -> list[tuple[bytes, int, str]]:
    return [
        (image.tobytes(), int(label), caption)
        for chunk in spec.chunks()
        for image, label, caption in zip(
            chunk.image_BCHW, chunk.labels, chunk.captions, strict=True
        )
    ]


def table(head: list[str], rows: list[list[object]]) -> str:
    file = io.StringIO()
    csv.writer(file).writerows([head, *rows])
    return file.getvalue()


# --- the forms


def with_table(name: str, text: str) -> Callable[[Path], None]:
    return lambda root: void(write(root, {**below("val", flat()), name: text}))


def void(_: object) -> None:
    return None


# Numbers of the challenge are in an order of their own: not that of the ids.
MAPPING = f"1 {WNIDS[1]}\n2 {WNIDS[2]}\n3 {WNIDS[0]}\n"
TRUTH = "".join(f"{ {1: 1, 2: 2, 0: 3}[of] }\n" for of in VAL)
CLSLOC = f"{WNIDS[1]} 1 great_white_shark\n{WNIDS[2]} 2 cock\n{WNIDS[0]} 3 tench\n"


def ground_truth(root: Path) -> None:
    kit = root / "ILSVRC2012_devkit_t12" / "data"
    write(kit, {"ILSVRC2012_validation_ground_truth.txt": TRUTH, "map_clsloc.txt": CLSLOC})
    write(root / "val", flat())


def meta_mat(root: Path) -> None:
    """As the kit has it: structures of numbers and text, groups of classes behind the classes."""
    kit = root / "ILSVRC2012_devkit_t12" / "data"
    write(kit, {"ILSVRC2012_validation_ground_truth.txt": TRUTH})
    rows = [(1, WNIDS[1]), (2, WNIDS[2]), (3, WNIDS[0]), (4, "n99999999")]
    kinds = [("ILSVRC2012_ID", object), ("WNID", object), ("words", object), ("gloss", object)]
    synsets = np.array([(float(n), w, "a, b", "") for n, w in rows], dtype=kinds)
    savemat(kit / "meta.mat", {"synsets": synsets.reshape(-1, 1)}, do_compression=True)
    write(root / "val", flat())


FORMS: dict[str, Callable[[Path], None]] = {
    "sorted": lambda root: void(write(root / "val", by_class())),
    "under its name": lambda root: void(write(root / "imagenet" / "val", by_class())),
    "tar of folders": lambda root: void(write_tar(root / "val.tar", by_class())),
    "tar of folders below one": lambda root: void(
        write_tar(root / "val.tar", below("./val", by_class()))
    ),
    "flat, ids in order": with_table(
        "val/imagenet_2012_validation_synset_labels.txt", "".join(f"{WNIDS[of]}\n" for of in VAL)
    ),
    "flat, the development kit": ground_truth,
    "flat, the kit's meta.mat": meta_mat,
    "flat, Kaggle's table": with_table(
        "LOC_val_solution.csv",
        table(
            ["ImageId", "PredictionString"],
            [[val_name(p)[:-5], f"{WNIDS[of]} 1 2 3 4"] for p, of in enumerate(VAL)],
        ),
    ),
    "flat, numbers": with_table(
        "val/val.txt", "".join(f"{val_name(p)} {of}\n" for p, of in enumerate(VAL))
    ),
    "flat, labels.csv": with_table(
        "val/labels.csv",
        table(["image", "label"], [[f"x/{val_name(p)}", of] for p, of in enumerate(VAL)]),
    ),
    "flat beside the table": lambda root: void(
        write(root, {**flat(), "val.txt": "".join(f"{n} {VAL[p]}\n" for p, n in enumerate(flat()))})
    ),
    "flat tar": lambda root: void(
        (
            write_tar(root / "ILSVRC2012_img_val.tar", flat()),
            write(
                root,
                {
                    "ILSVRC2012_validation_ground_truth.txt": TRUTH,
                    "ILSVRC2012_mapping.txt": MAPPING,
                },
            ),
        )
    ),
}


def made(root: Path, form: str, train: str = "") -> Path:
    FORMS[form](root)
    home = root / "imagenet" if form == "under its name" else root
    write(home, {"classnames.txt": names_text()})
    for of, wnid in enumerate(WNIDS):
        if train == "folders":
            write(home / "train" / wnid, trained(of))
        elif train == "tars":
            write_tar(home / "train" / f"{wnid}.tar", trained(of))
    return root


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> EvaluationSet:
    """The report split of pictures sorted into folders."""
    root = made(tmp_path_factory.mktemp("plain"), "sorted")
    return evaluation_splits("imagenet", str(root), SIZE, tuning=0)["report"]


@pytest.mark.parametrize("form", FORMS)
def test_a_set_is_the_same_in_every_form(tmp_path: Path, form: str, plain: EvaluationSet) -> None:
    root = made(tmp_path / "set", form)
    found = evaluation_splits("imagenet", str(root), SIZE, tuning=0)["report"]
    assert found.fingerprint == plain.fingerprint
    assert corpus_key(found) == corpus_key(plain)
    rows = rows_of(found)
    assert rows == rows_of(plain)
    expected = [(chw(place), of, NAMES[of]) for place, of in enumerate(VAL)]
    assert sorted(rows) == sorted(expected)
    assert rows != sorted(rows, key=lambda row: row[1]), "not in the order of the classes"


def test_numbers_of_the_challenge_are_not_taken_for_the_order_of_ids(tmp_path: Path) -> None:
    truth = {"val/ILSVRC2012_validation_ground_truth.txt": TRUTH}
    write(tmp_path, {**below("val", flat()), **truth, "classnames.txt": names_text()})
    with pytest.raises(UsageError, match=r"order of their own.*meta\.mat.*ILSVRC2012_mapping\.txt"):
        imagenet(tmp_path)


# --- the training pictures


@pytest.mark.parametrize("train", ["folders", "tars"])
def test_tuning_takes_some_training_pictures_of_each_class(tmp_path: Path, train: str) -> None:
    root = made(tmp_path / "set", "sorted", train)
    before = sorted(path for path in root.rglob("*"))
    splits = evaluation_splits("imagenet", str(root), SIZE, tuning=2, probe=3, seed=1)
    assert list(splits) == ["tuning", "clean", "report"]
    rows = {split: rows_of(spec) for split, spec in splits.items()}
    for split, count in {"tuning": 2, "clean": 3}.items():
        assert sorted(label for _, label, _ in rows[split]) == sorted([0, 1, 2] * count)
        assert splits[split].split == split
    own = {chw(len(VAL) + place) for place in range(3 * TRAIN)}
    seen = [{image for image, *_ in rows[split]} for split in splits]
    assert seen[0] | seen[1] <= own
    assert not seen[0] & seen[1]
    assert len(seen[0] | seen[1]) == 3 * 5
    assert not any(spec.caution for spec in splits.values())
    assert sorted(path for path in root.rglob("*")) == before, "nothing is unpacked"
    there = made(tmp_path / "other", "tar of folders", "tars" if train == "folders" else "folders")
    again = evaluation_splits("imagenet", str(there), SIZE, tuning=2, probe=3, seed=1)
    assert {n: corpus_key(s) for n, s in again.items()} == {
        n: corpus_key(s) for n, s in splits.items()
    }
    other = evaluation_splits("imagenet", str(root), SIZE, tuning=2, probe=3, seed=2)
    assert rows_of(other["tuning"]) != rows["tuning"]


def test_the_default_is_five_of_each_class_and_all_that_is_tested(tmp_path: Path) -> None:
    splits = evaluation_splits("imagenet", str(made(tmp_path / "set", "sorted", "tars")), SIZE)
    assert {n: s.num_rows for n, s in splits.items()} == {"tuning": 15, "report": len(VAL)}
    assert splits["report"].templates == prompt_templates("imagenet80")


def test_without_training_pictures_tuning_is_cut_only_if_that_is_said(tmp_path: Path) -> None:
    root = str(made(tmp_path / "set", "sorted"))
    with pytest.raises(UsageError, match=r"looked for train/ .*tuning_from: test"):
        evaluation_splits("imagenet", root, SIZE)
    splits = evaluation_splits("imagenet", root, SIZE, tuning=1, tuning_from="test")
    rows = {split: rows_of(spec) for split, spec in splits.items()}
    assert sorted(label for _, label, _ in rows["tuning"]) == [0, 1, 2]
    assert sorted(rows["tuning"] + rows["report"]) == sorted(
        (chw(place), of, NAMES[of]) for place, of in enumerate(VAL)
    ), "disjoint, and nothing is lost"
    assert "cut from the test pictures" in str(splits["tuning"].caution)
    with pytest.raises(
        UsageError, match=r"tuning needs 3 pictures of each class, and class 0 has 2"
    ):
        evaluation_splits("imagenet", root, SIZE, tuning=3, tuning_from="test")
    with pytest.raises(UsageError, match="report 8 rows of 7"):
        evaluation_splits("imagenet", root, SIZE, tuning=0, report=8)


def test_it_is_a_labelled_set_too(tmp_path: Path) -> None:
    root = made(tmp_path / "set", "tar of folders", "tars")
    splits = labelled_splits("imagenet", root, SIZE, clean=2, tuning=2)
    assert {n: s.num_rows for n, s in splits.items()} == {
        "tuning": 2,
        "clean": 2,
        "suspect": 3 * TRAIN - 4,
        "report": len(VAL),
    }
    found = imagenet(root)
    assert len(found.files) == 3 * TRAIN + len(VAL)
    chunk = next(iter(splits["suspect"].chunks()))
    assert set(chunk.captions) <= set(NAMES)


def test_a_split_is_a_corpus_with_its_prompts(tmp_path: Path, plain: EvaluationSet) -> None:
    store = Store(tmp_path / "store")
    build_corpus(store, plain)
    corpus = open_corpus(store, corpus_key(plain), Reader.REPORTING)
    assert tuple(corpus.templates) == prompt_templates("imagenet80")
    assert tuple(corpus.classes) == NAMES
    assert not corpus.is_labelled
    assert [image.tobytes() for image in corpus.images_NCHW] == [row[0] for row in rows_of(plain)]


def test_names_of_classes_and_prompts_are_part_of_what_a_split_is(tmp_path: Path) -> None:
    root = made(tmp_path / "set", "sorted")

    def key(**more: object) -> str:
        splits = evaluation_splits("imagenet", str(root), SIZE, tuning=0, **more)  # type: ignore[arg-type]
        return corpus_key(splits["report"])

    first = key()
    assert key(templates="imagenet80") == first != key(templates="photo")
    write(root, {"classnames.txt": "tench\nshark\ncock\n"})
    assert key() != first


def test_pictures_that_changed_since_the_plan_are_not_read(tmp_path: Path) -> None:
    root = made(tmp_path / "set", "sorted")
    spec = evaluation_splits("imagenet", str(root), SIZE, tuning=0)["report"]
    (root / "val" / WNIDS[VAL[0]] / val_name(0)).write_bytes(encoded(99))
    with pytest.raises(UsageError, match="not those that were planned with"):
        rows_of(spec)


# --- tar files


def test_a_picture_of_a_tar_is_read_where_it_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = write_tar(tmp_path / "val.tar", by_class())
    read: list[str] = []
    whole = Member.read_bytes

    def noted(member: Member) -> bytes:
        read.append(member.name)
        return whole(member)

    monkeypatch.setattr(Member, "read_bytes", noted)
    write(tmp_path, {"classnames.txt": names_text()})
    part = imagenet(tmp_path).test()
    assert not read, "an index is enough to know what there is"
    (picture,) = part.pictures(np.array([3]))
    assert len(read) == 1
    raw = archive.read_bytes()
    member = members(archive)[read[0]]
    assert raw[member.offset : member.offset + member.size] == whole(member)
    assert np.asarray(picture).transpose(2, 0, 1).tobytes() in {chw(p) for p in range(len(VAL))}


def test_hidden_files_and_links_of_a_tar_are_no_pictures(tmp_path: Path) -> None:
    import tarfile

    path = write_tar(tmp_path / "val.tar", {"a/1.png": encoded(1), "a/._1.png": b"x"})
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("a/2.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    assert list(members(path)) == ["a/1.png"]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("compressed", "not a plain tar file.*gunzip"),
        ("cut off", r"cut off|not a plain tar"),
        ("garbage", "not a plain tar file"),
    ],
)
def test_a_tar_that_cannot_be_read_where_it_lies_says_so(
    tmp_path: Path, damage: str, said: str
) -> None:
    mode = "w:gz" if damage == "compressed" else "w"
    path = write_tar(tmp_path / "val.tar", by_class(), mode)
    raw = path.read_bytes()
    if damage == "cut off":
        last = max(members(path).values(), key=lambda member: member.offset)
        path.write_bytes(raw[: last.offset + last.size // 2])
    if damage == "garbage":
        path.write_bytes(os.urandom(2048))
    write(tmp_path, {"classnames.txt": names_text()})
    with pytest.raises(GridError, match=said):
        imagenet(tmp_path)


# --- labels and names


def test_labels_with_holes_are_refused(tmp_path: Path) -> None:
    """T09: a copied labels.csv has 998 distinct labels; 517 and 639 never occur."""
    labels = [134 if k == 517 else 638 if k == 639 else k for k in range(1000)]
    with pytest.raises(GridError, match=r"all 1000 classes, and 2 never occur \(517, 639\)"):
        require_cover(labels, 1000, Path("labels.csv"))
    with pytest.raises(GridError, match=r"class 1000 is outside 0\.\.999"):
        require_cover([*range(1000), 1000], 1000, Path("labels.csv"))
    rows: list[list[object]] = [[val_name(p), min(of, 1)] for p, of in enumerate(VAL)]
    with_table("val/labels.csv", table(["image", "label"], rows))(tmp_path)
    write(tmp_path, {"classnames.txt": names_text()})
    with pytest.raises(
        GridError, match=r"labels\.csv: labels must cover all 3 .*1 never occur \(2\)"
    ):
        imagenet(tmp_path)


def test_no_two_classes_have_one_name() -> None:
    names = imagenet_names()
    assert len(set(names)) == len(names) == 1000
    assert (names[657], names[744]) == ("missile", "projectile")
    assert (names[836], names[837]) == ("sunglass", "sunglasses")
    assert names[954] == "banana"


def known_ids() -> list[str]:
    """The ids of the 1,000 classes, from a library that names them."""
    spec = importlib.util.find_spec("timm")
    assert spec is not None
    assert spec.origin is not None
    return (Path(spec.origin).parent / "data/_info/imagenet_synsets.txt").read_text().split()


def thousand(root: Path, ids: Iterable[str]) -> Path:
    root.mkdir()
    write_tar(root / "val.tar", {f"{name}/a{name}.JPEG": encoded(0) for name in ids})
    return root


def test_a_thousand_classes_have_the_known_names_in_the_order_of_their_ids(tmp_path: Path) -> None:
    ids = known_ids()
    found = imagenet(thousand(tmp_path / "set", reversed(ids)))
    assert found.classes == imagenet_names()
    assert found.test().labels.tolist() == list(range(1000))
    named = [Path(name).stem.removeprefix("a") for name, _ in found.test().files]
    assert named == ids


def test_names_are_given_to_no_folders_but_those_of_the_known_ids(tmp_path: Path) -> None:
    """val/0 to val/999 were sorted as text: 988 of 1,000 labels were wrong, and nothing said so."""
    numbered = thousand(tmp_path / "numbered", map(str, range(1000)))
    with pytest.raises(UsageError, match=r"'0' is no id of WordNet.*1000 such.*classnames\.txt"):
        imagenet(numbered)
    others = thousand(tmp_path / "others", ["n99999999", *known_ids()[1:]])
    with pytest.raises(UsageError, match=r"are not those of ImageNet's classes.*classnames\.txt"):
        imagenet(others)
    write(numbered, {"classnames.txt": "".join(f"class {n}\n" for n in range(1000))})
    found = imagenet(numbered)
    named = [int(Path(name).stem.removeprefix("a")) for name, _ in found.test().files]
    assert named == found.test().labels.tolist() == list(range(1000))


def test_training_folders_of_numbered_pictures_are_those_of_the_known_ids(tmp_path: Path) -> None:
    """A table of numbers says the order of the ids, and folders must be these ids."""
    names = [f"{n}.JPEG" for n in range(1000)]
    labels = "".join(f"{name} {n}\n" for n, name in enumerate(names))
    write_tar(tmp_path / "val.tar", {name: encoded(0) for name in names})
    write(tmp_path, {"val.txt": labels})
    (tmp_path / "train").mkdir()
    for number in range(1000):
        (tmp_path / "train" / str(number)).mkdir()
    found = imagenet(tmp_path)
    assert found.classes == imagenet_names()
    with pytest.raises(UsageError, match="'0' is no id of WordNet"):
        found.train()


def test_of_training_pictures_only_those_that_are_asked_for_become_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A list of 1.28 million was made to take 5,000 of them."""
    root = made(tmp_path / "set", "sorted", "folders")
    write_tar(root / "train" / f"{WNIDS[0]}.tar", {"only/there.JPEG": encoded(1), **trained(0)})
    part = imagenet(root).train()
    assert len(part.files) == len(part.labels) == 3 * TRAIN + 1
    assert [int(name.split("/")[1]) for name, _ in part.files] == part.labels.tolist()
    assert [name for name, _ in part.files] == sorted(name for name, _ in part.files)
    kinds = {type(source) for name, source in part.files if "there" in name}
    assert kinds == {Member}, "the others lie in a folder, too, and are read there"
    assert {type(source) for name, source in part.files if "there" not in name} == {type(root)}
    read: list[int] = []
    whole = FilesByClass.__getitem__

    def noted(files: FilesByClass, index: int) -> object:
        read.append(index)
        return whole(files, index)

    monkeypatch.setattr(FilesByClass, "__getitem__", noted)
    evaluation_splits("imagenet", str(root), SIZE, tuning=2)
    assert len(read) == 3 * 2


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, r"3 classes in .*names that are known are those of all 1000.*classnames\.txt"),
        ({"classnames.txt": "a\nb\n"}, r"classnames\.txt: 2 names for 3 classes"),
        ({"classnames.txt": "a\nb\na\n"}, r"classnames\.txt: .*more than once: a"),
        ({"classnames.txt": "a\n\nb\n"}, "one is empty"),
        ({"classes.json": "{}"}, f"no name for {WNIDS[0]}"),
        ({"classes.json": "["}, "no JSON"),
        ({"classes.json": json.dumps(dict.fromkeys(WNIDS, "same"))}, "more than once: same"),
        ({"classes.json": "[1]"}, "needs names by id"),
    ],
)
def test_names_that_do_not_fit_say_so(tmp_path: Path, files: dict[str, str], said: str) -> None:
    write(tmp_path, {**below("val", by_class()), **files})
    with pytest.raises(GridError, match=said):
        imagenet(tmp_path)


def test_names_by_id_may_be_those_of_more_classes(tmp_path: Path) -> None:
    named = {**dict(zip(WNIDS, NAMES, strict=True)), "n99999999": "kite"}
    write(tmp_path, {**below("val", by_class()), "val/classes.json": json.dumps(named)})
    assert imagenet(tmp_path).classes == NAMES


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"val/val.txt": "x.JPEG 0\n"}, r"speaks of x\.JPEG and 0 more pictures"),
        ({"val/val.txt": f"{val_name(0)} 0\n"}, r"has no line for .*\(6 such"),
        ({"val/val.txt": "no number\n"}, "line 1: needs a file name and the number"),
        (
            {"val/labels.csv": "image,label\na.JPEG,n01440764\n"},
            r"labels\.csv, line 2: label 'n01440764' of 'a\.JPEG' is no number",
        ),
        ({"val/labels.csv": "image;label\na;1\n"}, "line 2: needs the columns image and label"),
        ({"LOC_val_solution.csv": "ImageId,PredictionString\na,\n"}, "line 2: needs ImageId"),
        ({"imagenet_2012_validation_synset_labels.txt": "n1\n"}, "line 1: 'n1' is no id"),
        ({"imagenet_2012_validation_synset_labels.txt": f"{WNIDS[0]}\n" * 8}, "8 lines for 7"),
        ({"imagenet_2012_validation_synset_labels.txt": f"{WNIDS[0]}\n" * 6}, "6 lines, one for"),
        (
            {
                "ILSVRC2012_validation_ground_truth.txt": "9\n",
                "ILSVRC2012_mapping.txt": MAPPING,
            },
            "line 1: '9' is not in its mapping",
        ),
        (
            {"ILSVRC2012_validation_ground_truth.txt": "1\n", "meta.mat": "x"},
            r"meta\.mat: no \.mat file of version 5",
        ),
        (
            {"ILSVRC2012_validation_ground_truth.txt": "1\n", "map_clsloc.txt": "1 tench\n"},
            "line 1: needs a number of its own and an id",
        ),
        ({}, r"looked for labels of the flat pictures \(imagenet_2012"),
    ],
)
def test_tables_that_do_not_fit_name_the_line(
    tmp_path: Path, files: dict[str, str], said: str
) -> None:
    write(tmp_path, {**below("val", flat()), "classnames.txt": names_text(), **files})
    with pytest.raises(GridError, match=said):
        imagenet(tmp_path)


def test_a_set_that_is_not_there_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"looked for val/ with pictures.*Give as root"):
        imagenet(tmp_path)
    write(tmp_path, {**below("val", by_class()), "classnames.txt": names_text(), "train/x/a": ""})
    with pytest.raises(UsageError, match=f"pictures of class {WNIDS[0]} in .*train"):
        imagenet(tmp_path).train()
