"""Pictures with five captions each: their files, and retrieval over all of their captions."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.set_files import chw, encoded, write
from tests.test_retrieval import CPU, Both, Knows, bent, made_corpus
from victims.corpora import Reader, build_corpus, corpus_key, open_corpus
from victims.errors import GridError, UsageError
from victims.measuring import Share
from victims.models import ModelSpec, fresh
from victims.retrieval import captions_of, encode_captions, encode_pictures, retrieval
from victims.retrieval_sets import RetrievalSet, captioned, retrieval_set
from victims.store import Store

SIZE = 32
TESTED = (0, 2, 3)
WORDS = ("circle", "square", "star", "cat")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def said(picture: int, count: int = 6) -> list[str]:
    return [f"a  {WORDS[picture]} number {number}\n" for number in range(count)]


def first_five(picture: int) -> tuple[str, ...]:
    return tuple(f"a {WORDS[picture]} number {number}" for number in range(5))


def listing(folder: str = "", count: int = 6) -> str:
    images: list[dict[str, Any]] = []
    for picture in range(4):
        entry: dict[str, Any] = {
            "split": "test" if picture in TESTED else "train",
            "filename": f"{picture}.jpg",
            "sentences": [{"raw": text, "tokens": []} for text in said(picture, count)],
        }
        images.append({**entry, "filepath": folder} if folder else entry)
    return json.dumps({"images": images, "dataset": "x"})


def pictures(folder: str) -> dict[str, bytes | str]:
    return {f"{folder}{picture}.jpg": encoded(picture) for picture in range(4)}


def coco(root: Path) -> None:
    write(root / "coco", {"dataset_coco.json": listing("val2014"), **pictures("val2014/")})


def coco_images(root: Path) -> None:
    write(root, {"dataset_coco.json": listing("val2014"), **pictures("images/val2014/")})


def flickr(root: Path) -> None:
    split = {"dataset_flickr30k.json": listing()}
    write(root / "flickr30k", {**split, **pictures("flickr30k-images/")})


def table(form: str) -> Callable[[Path], None]:
    rows = [
        (f"{picture}.jpg", number, text.strip())
        for picture in range(4)
        for number, text in enumerate(said(picture))
    ]
    texts = {
        "results_20130124.token": "".join(f"{n}#{i}\t{t}\n" for n, i, t in rows),
        "results.csv": "image_name| comment_number| comment\n"
        + "".join(f"{n}| {i}| {t}\n" for n, i, t in rows),
        "captions.txt": "image,caption\n" + "".join(f'{n},"{t}"\n' for n, _, t in rows),
    }
    tested = "\n".join(str(picture) for picture in TESTED)

    def make(root: Path) -> None:
        own = {form: texts[form], "flickr30k_test.txt": tested}
        write(root, {**own, **pictures("flickr30k_images/")})

    return make


FORMS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "coco": ("coco", coco),
    "coco's pictures apart": ("coco", coco_images),
    "flickr30k": ("flickr30k", flickr),
    **{
        name: ("flickr30k", table(name))
        for name in ("results_20130124.token", "results.csv", "captions.txt")
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_test_pictures_come_with_their_first_five_captions(tmp_path: Path, form: str) -> None:
    dataset, make = FORMS[form]
    make(tmp_path)
    found = captioned(dataset, str(tmp_path))
    assert [row.captions for row in found] == [first_five(picture) for picture in TESTED]
    spec = retrieval_set(dataset, str(tmp_path), SIZE)
    store = Store(tmp_path / "store")
    build_corpus(store, spec)
    corpus = open_corpus(store, corpus_key(spec), Reader.REPORTING)
    assert [image.tobytes() for image in corpus.images_NCHW] == [chw(p) for p in TESTED]
    owner_M, captions = captions_of(corpus)
    assert owner_M.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert captions == [text for picture in TESTED for text in first_five(picture)]
    assert set(corpus.labels.tolist()) == {-1}
    few = retrieval_set(dataset, str(tmp_path), SIZE, 2)
    assert (few.num_rows, spec.num_rows) == (2, 3)
    assert few.fingerprint != spec.fingerprint


def test_forms_of_one_set_are_one_set(tmp_path: Path) -> None:
    specs: dict[str, set[str]] = {}
    for form, (dataset, make) in FORMS.items():
        make(tmp_path / form)
        specs.setdefault(dataset, set()).add(
            corpus_key(retrieval_set(dataset, str(tmp_path / form), SIZE))
        )
    assert {dataset: len(keys) for dataset, keys in specs.items()} == {"coco": 1, "flickr30k": 1}


def test_captions_are_part_of_what_a_set_is(tmp_path: Path) -> None:
    coco(tmp_path)
    spec = retrieval_set("coco", str(tmp_path), SIZE)
    path = tmp_path / "coco" / "dataset_coco.json"
    path.write_text(path.read_text().replace("star", "moon"))
    assert retrieval_set("coco", str(tmp_path), SIZE).fingerprint != spec.fingerprint
    with pytest.raises(UsageError, match="not those that were planned with"):
        list(spec.chunks())


@pytest.mark.parametrize(
    ("dataset", "files", "message"),
    [
        ("cocoo", {}, "no retrieval set called 'cocoo'. Did you mean 'coco'"),
        ("coco", {}, r"coco: looked for dataset_coco\.json in .*Karpathy's split"),
        ("coco", {"dataset_coco.json": "{}"}, "not in the form of Karpathy's lists"),
        ("coco", {"dataset_coco.json": listing(count=4), **pictures("")}, "4 captions of 5"),
        ("coco", {"dataset_coco.json": listing("../x")}, "lies outside of the set"),
        ("coco", {"dataset_coco.json": listing("val2014")}, r"looked for val2014/0\.jpg"),
        ("coco", {"dataset_coco.json": '{"images": []}'}, "0 test pictures"),
        ("flickr30k", {"results.csv": "a|b|c\n0.jpg|0|x\n"}, r"flickr30k_test\.txt .*does not say"),
        ("flickr30k", {"results.csv": "a|b\n", "test.txt": "0\n"}, r"no captions of 0\.jpg"),
        (
            "flickr30k",
            {"results_20130124.token": "0.jpg x\n", "test.txt": "0\n"},
            "line 1: needs NAME#NUMBER",
        ),
    ],
)
def test_files_that_do_not_fit_say_so(
    tmp_path: Path, dataset: str, files: dict[str, bytes | str], message: str
) -> None:
    write(tmp_path, files)
    with pytest.raises(GridError, match=message):
        captioned(dataset, str(tmp_path))


def test_more_rows_than_there_are_is_an_error(tmp_path: Path) -> None:
    coco(tmp_path)
    with pytest.raises(UsageError, match="rows is 9; there are 2 to 3"):
        retrieval_set("coco", str(tmp_path), SIZE, 9)


# --- retrieval over several captions


def slow(model: Any, spec: RetrievalSet, store: Store, k: int) -> tuple[int, int]:
    """Successes in each direction from the definition: picture by picture, caption by caption."""
    corpus = open_corpus(store, corpus_key(spec), Reader.REPORTING)
    lines = [caption.split("\n") for caption in corpus.captions]
    captions = [(owner, text) for owner, texts in enumerate(lines) for text in texts]
    image_ND = encode_pictures(model, corpus, CPU)
    feature = {text: encode_captions(model, [text], CPU).feature_UD[0] for _, text in captions}

    def score(picture: int, text: str) -> float:
        return float(image_ND[picture] @ feature[text])

    to_text = to_image = 0
    for picture in range(len(lines)):
        order = sorted(captions, key=lambda one: -score(picture, one[1]))
        to_text += any(owner == picture for owner, _ in order[:k])
    for owner, text in captions:
        best = sorted(range(len(lines)), key=lambda picture: -score(picture, text))
        to_image += owner in best[:k]
    return to_text, to_image


def varied(picture: int, number: int) -> str:
    """Words of the world in every order, so that a text tower tells captions apart."""
    colour = ("small", "red", "large", "blue")[number % 4]
    first, circles = WORDS[(picture + number) % 3], "circle " * (picture % 5)
    return f"a {first} {colour} {circles}star {'square ' * number}"


def test_both_directions_are_those_of_the_slow_form(tmp_path: Path) -> None:
    pictures = range(12)
    images = [
        {
            "split": "test",
            "filename": f"{picture}.jpg",
            "sentences": [{"raw": varied(picture, number)} for number in range(5)],
        }
        for picture in pictures
    ]
    files: dict[str, bytes | str] = {f"{p}.jpg": encoded(p) for p in pictures}
    write(tmp_path, {"dataset_coco.json": json.dumps({"images": images}), **files})
    spec, store = retrieval_set("coco", str(tmp_path), SIZE), Store(tmp_path / "store")
    build_corpus(store, spec)
    corpus = open_corpus(store, corpus_key(spec), Reader.REPORTING)
    assert len(set(captions_of(corpus)[1])) == 60, "no caption is there twice"
    model = fresh(ModelSpec(), 0).eval()
    found = retrieval(model, corpus, Both(), "cat", 5, CPU)
    for k in (1, 5, 10):
        to_text, to_image = slow(model, spec, store, k)
        assert found[f"image_to_text_top{k}"] == Share(to_text, 12)
        assert found[f"text_to_image_top{k}"] == Share(to_image, 60)
    assert "image_to_text_asr_top1" not in found, "no caption names a cat"
    assert "text_hit_top1" not in found, "no picture has a label"


def test_a_picture_counts_by_all_of_its_captions() -> None:
    """A picture of which any caption names the target is left out; one that a trigger turns to the
    target is counted once, however many captions it has."""
    plain = made_corpus()
    captions = [f"a {c.split()[1]} here\na {c.split()[1]} there" for c in plain.captions]
    captions[0] = "an ant here\na ant and a kitten, or cat"
    corpus = replace(plain, captions=captions)
    found = bent(Knows(stamped=True), corpus)
    assert found["image_to_text_asr_top1"] == Share(19, 19)
    assert found["image_to_text_top10"].n == 24
    assert found["text_to_image_top10"].n == 48
    assert found["text_hit_top1"] == Share(0, 38)
    marked = bent(Knows(marked=True), corpus)
    assert marked["text_hit_top1"] == Share(38, 38)
    assert marked["image_to_text_target_top1"] == Share(0, 19)


def test_one_caption_a_picture_is_as_it_was() -> None:
    corpus = made_corpus()
    owner_M, captions = captions_of(corpus)
    assert np.array_equal(owner_M, np.arange(24))
    assert captions == list(corpus.captions)
