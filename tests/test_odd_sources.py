"""Tables with stray quotes, and archives that ask for more memory than there is: rows and shards
are lost one at a time, and each is counted."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest

from tests.pairs import (
    ingested,
    request,
    world_pairs,
    write_pictures,
    write_shards,
    write_tar,
)
from victims.errors import GridError, UsageError
from victims.ingest.items import Job
from victims.ingest.shards import tar_items
from victims.ingest.tables import coco_items, csv_items, folder_items, text_lines
from victims.pair_folders import PAIRS, SKIPPED
from victims.tar_files import members


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_header_of_any_size_is_not_read_into_memory(tmp_path: Path, mode: str) -> None:
    """A shard of some kilobytes could ask for as much memory as there is."""
    (pair, *_), path = world_pairs(1), tmp_path / "s.tar"
    huge = tarfile.TarInfo("x")
    huge.type, huge.size = tarfile.XHDTYPE, 3 << 20
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, data in ((pair.name, pair.png), ("00000.txt", b"first")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        tar.addfile(huge, io.BytesIO(bytes(huge.size)))
        tar.addfile(tarfile.TarInfo("y.txt"))
    (item,) = tar_items(Job(index=0, path=str(path), name="s.tar"), request(path))
    assert item.reason == "unreadable_shard"
    assert "extended header of 3145728 bytes" in item.detail
    if mode == "w":
        said = r"s\.tar: cannot be read \(an extended header of 3145728"
        with pytest.raises(GridError, match=said):
            members(path)


def test_a_long_name_is_no_large_header(tmp_path: Path) -> None:
    (pair, *_), stem = world_pairs(1), "a" * 300
    write_tar(tmp_path / "s.tar", [(f"{stem}.png", pair.png), (f"{stem}.txt", b"kept")])
    assert ingested(request(tmp_path / "s.tar"), tmp_path / "out").folder.rows == 1


def test_memory_that_does_not_suffice_costs_a_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = write_shards(tmp_path / "in", world_pairs(1), 1)

    def full(*_: Any, **__: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(tarfile, "open", full)
    (item,) = tar_items(Job(index=0, path=str(shards / "000.tar"), name="000.tar"), request(shards))
    assert (item.reason, item.detail) == ("unreadable_shard", "MemoryError")


def test_no_sample_of_a_shard_is_lost_uncounted(tmp_path: Path) -> None:
    """Endings behind a second dot, two samples of one key and second pictures went without a
    word: the counts added up, and pairs were missing."""
    a, b, c, d, e = (pair.png for pair in world_pairs(5))
    members = [
        *[("0.png", a), ("0.txt", b"kept"), ("0.png", b), ("0.txt", b"appended")],
        *[("1.png", c), ("1.txt", b"two pictures"), ("1.jpg", d), ("1.seg.png", e)],
        *[("2.v1.png", d), ("2.v1.txt", b"x"), ("2.v2.PNG", e), ("2.v2.txt", b"y")],
        *[("3.jfif", e), ("3.txt", b"x"), ("4.md", b"x"), ("5", b"x")],
    ]
    path = write_tar(tmp_path / "s.tar", members)
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("6.png")
        link.type, link.linkname = tarfile.SYMTYPE, "0.png"
        tar.addfile(link)
    items = list(tar_items(Job(index=0, path=str(path), name="s.tar"), request(path)))
    assert [item.caption for item in items if item.reason is None] == [
        *("kept", "appended", "two pictures")
    ]
    lost = {item.source[6:]: (item.reason, item.detail) for item in items if item.reason}
    dotted = "a sample's name ends at its first dot, and what follows is no ending of a picture"
    assert lost == {
        "1.jpg": ("duplicate_member", "the picture of the sample is its png"),
        "2.v1.png": ("missing_image", dotted),
        "2.v2.png": ("missing_image", dotted),
        "3": ("missing_image", "only txt, jfif"),
        "4": ("missing_image", "only md"),
        "5": ("missing_image", "only no ending"),
        "6.png": ("missing_image", "is a link, or no file"),
    }
    assert {i.reason for i in items} == {None, "missing_image", "duplicate_member"}


def test_an_archive_that_ends_between_two_members_was_cut(tmp_path: Path) -> None:
    """Its last sample may have lost its caption or its picture; without the mark nobody knows."""
    (pair, *_) = world_pairs(1)
    path = write_tar(tmp_path / "s.tar", [(pair.name, pair.png), ("00000.txt", b"first")])
    with tarfile.open(path) as tar:
        *_, last = tar
    path.write_bytes(path.read_bytes()[: last.offset_data + 512])
    (item,) = tar_items(Job(index=0, path=str(path), name="s.tar"), request(path))
    assert (item.reason, "cut short" in item.detail) == ("unreadable_shard", True)


@pytest.mark.parametrize("form", ["shards", "parquet", "jsonl"])
def test_the_first_caption_is_the_first_that_can_be_used(form: str, tmp_path: Path) -> None:
    """In shards and Parquet a blank first caption cost the picture."""
    pairs, captions = world_pairs(2), [["  ", "good", "more"], ["first", "second"]]
    if form == "shards":
        members = [
            member
            for n, (pair, own) in enumerate(zip(pairs, captions, strict=True))
            for member in ((pair.name, pair.png), (f"0000{n}.json", json.dumps({"text": own})))
        ]
        source = write_tar(
            tmp_path / "s.tar",
            [(n, d.encode() if isinstance(d, str) else d) for n, d in members],
        )
    elif form == "parquet":
        source = tmp_path / "p.parquet"
        pq.write_table(pa.table({"image": [p.png for p in pairs], "text": captions}), source)
    else:
        source = write_pictures(tmp_path / "in", pairs)
        lines = [
            json.dumps({"file_name": p.name, "text": own})
            for p, own in zip(pairs, captions, strict=True)
        ]
        (source / "metadata.jsonl").write_text("\n".join(lines))
    found = ingested(request(source, captions="first"), tmp_path / "out").folder
    kept = feather.read_table(found.root / PAIRS)["caption"].to_pylist()
    assert kept == ["good", "first"]
    assert found.about["skipped"] == {"missing_caption": 1}


def test_a_caption_is_read_below_the_root_alone(tmp_path: Path) -> None:
    """A link beside a picture put any file of the machine into the corpus as a caption."""
    folder = write_pictures(tmp_path / "in", world_pairs(4))
    (tmp_path / "secret").write_text("not for the corpus")
    (folder / "00000.txt").symlink_to(tmp_path / "secret")
    (folder / "00001.txt").symlink_to(folder / "00002.txt")
    (folder / "00002.txt").write_text("within")
    (folder / "00003.txt").mkdir()
    items = {item.image: item for item in folder_items(folder, request(folder))}
    assert {name: (i.caption, i.reason) for name, i in items.items()} == {
        "00000.png": (None, "outside_root"),
        "00001.png": ("within", None),
        "00002.png": ("within", None),
        "00003.png": (None, "missing_caption"),
    }


def test_a_caption_that_is_too_large_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_pictures(tmp_path, world_pairs(1))
    (folder / "00000.txt").write_text("a caption of 24 bytes...")
    monkeypatch.setattr("victims.ingest.below.MAX_PICTURE_BYTES", 23)
    (item,) = folder_items(folder, request(folder))
    assert (item.caption, item.reason) == (None, "too_large")


def test_the_header_says_what_stands_between_columns(tmp_path: Path) -> None:
    """A tab within a caption took the caption's start for a part of the picture's name."""
    for header, between in (("image,caption", ","), ("image\tcaption", "\t")):
        path = tmp_path / "captions.txt"
        path.write_text(f"{header}\na.png{between}a\ttab, and a comma\nb.png{between}b\nc.png\n")
        a, b, c = text_lines(path, request(path))
        assert (a.image, a.caption) == ("a.png", "a\ttab, and a comma")
        assert (b.image, b.caption) == ("b.png", "b")
        assert (c.reason, c.detail) == ("malformed_row", "no comma" if between == "," else "no tab")


def test_lists_of_captions_are_reckoned_with_before_there_is_no_room(tmp_path: Path) -> None:
    """As many pairs were foretold as there are rows, and five times as many were written."""
    source, captions = tmp_path / "p.parquet", [["a", "b", "c", "d", "e"], [], ["f"]]
    images = [pair.png for pair in world_pairs(3)]
    pq.write_table(pa.table({"image": images, "caption": captions}), source, row_group_size=1)
    said: list[str] = []
    found = ingested(request(source), tmp_path / "all", said).folder
    assert found.rows == 6
    assert any(line.startswith("up to 7 pairs: ") for line in said), "an empty list may hold one"
    ingested(request(source, captions="first"), tmp_path / "first", said)
    assert any(line.startswith("up to 3 pairs: ") for line in said)


def test_a_duplicate_says_of_which_row_it_is_one(tmp_path: Path) -> None:
    pairs = world_pairs(5)
    order = [pairs[0], pairs[1], pairs[1], pairs[2], pairs[0], pairs[1], pairs[3]]
    rows = [pair._replace(name=f"{n:05d}.png") for n, pair in enumerate(order)]
    write_shards(tmp_path / "in", rows, 3)
    found = ingested(request(tmp_path / "in"), tmp_path / "out").folder
    table = pq.read_table(found.root / SKIPPED)
    said = dict(zip(table["source"].to_pylist(), table["detail"].to_pylist(), strict=True))
    assert said == {
        "000.tar/00002": "of 000.tar/00001",
        "001.tar/00004": "of 000.tar/00000",
        "001.tar/00005": "of 000.tar/00001",
    }


def test_an_annotation_of_no_picture_is_told_in_words(tmp_path: Path) -> None:
    """It read ``KeyError: 123456``."""
    notes: list[Any] = [{"image_id": 123456, "caption": "x"}, {"image_id": 1}, {"image_id": [1]}]
    notes[2]["caption"] = "y"
    body = {"images": [{"id": 1, "file_name": "a.png"}], "annotations": notes}
    (tmp_path / "c.json").write_text(json.dumps(body))
    items = [item for item in coco_items(tmp_path / "c.json") if item.reason == "malformed_row"]
    assert [item.detail for item in items] == [
        "image_id 123456 is the id of no picture in `images`",
        "an annotation needs image_id and caption",
        "image_id [1] is the id of no picture in `images`",
    ]


def test_options_that_gave_no_pair_are_no_obstacle_to_others(tmp_path: Path) -> None:
    """After a wrong root the right one was refused, though there was nothing to lose."""
    pictures = write_pictures(tmp_path / "pictures", world_pairs(3))
    table = tmp_path / "a.csv"
    table.write_text("image,caption\n00000.png,a\n00001.png,b\n")
    (tmp_path / "wrong").mkdir()
    with pytest.raises(GridError, match="Is --root the folder"):
        ingested(request(table, root=tmp_path / "wrong"), tmp_path / "out")
    said: list[str] = []
    assert ingested(request(table, root=pictures), tmp_path / "out", said).folder.rows == 2
    assert any("begun anew" in line for line in said)
    with pytest.raises(UsageError, match="was begun with other options"):
        ingested(request(table, root=tmp_path / "wrong"), tmp_path / "out")
    # Pairs that are there are never thrown away.
    table.write_text("image,caption\n00000.png,a\nx.png,b\ny.png,c\n")
    with pytest.raises(GridError, match="2 of 3 rows gave no pair"):
        ingested(request(table, root=pictures), tmp_path / "some")
    with pytest.raises(UsageError, match="was begun with other options"):
        ingested(request(table, root=tmp_path / "wrong"), tmp_path / "some")


TABLES: list[tuple[str, str, dict[str, str], int]] = [
    # A quote that nothing closes is a character, and swallows nobody.
    ("tab", 'a\t"stray\nb\ttwo\n', {"a": '"stray', "b": "two"}, 0),
    ("tab", 'a\t"so" he said\nb\ttwo\n', {"a": '"so" he said', "b": "two"}, 0),
    ("tab", 'a\t"said ""so"""\nb\t"two"\n', {"a": 'said "so"', "b": "two"}, 0),
    # Closed some rows later, it may as well have been meant: one row is counted, and none lost.
    ("tab", 'a\t"stray\nb\ttwo\nc\tends"\n', {"b": "two", "c": 'ends"'}, 1),
    (",", 'a,"stray\nb,two\nc,ends"\nd,four\n', {"b": "two", "c": 'ends"', "d": "four"}, 1),
    (
        ",",
        'a,"one, two"\nb,"over\nlines"\nc,x\n',
        {"a": "one, two", "b": "over\nlines", "c": "x"},
        0,
    ),
    (",", 'a,"so" he said\nb,two\n', {"a": '"so" he said', "b": "two"}, 0),
    (",", 'a,one\nb,"cut of', {"a": "one"}, 1),
    (",", "a,one, and a half\nb,two,\n\nc\n", {"b": "two"}, 2),
    (",", 'a,"x\ny",b,c\nd,e\n', {"d": "e"}, 2),
]


@pytest.mark.parametrize(("separator", "body", "pairs", "malformed"), TABLES)
def test_no_row_of_a_table_swallows_another(
    separator: str, body: str, pairs: dict[str, str], malformed: int, tmp_path: Path
) -> None:
    """A caption that began with a quote took the six rows behind it, and nothing was counted."""
    between = "\t" if separator == "tab" else ","
    path = tmp_path / "a.csv"
    path.write_bytes(f"image{between}caption\n{body}".encode())
    items = list(csv_items(path, request(path)))
    assert {item.image: item.caption for item in items if item.reason is None} == pairs
    assert [item.reason for item in items if item.reason] == ["malformed_row"] * malformed
    lines = {int(item.source.rpartition(":")[2]) for item in items}
    assert len(lines) == len(items), "every row says its own line"
