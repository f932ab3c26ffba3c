"""`grid ingest`: every form gives the same corpus, bad rows are counted, and nothing that stops a
run changes what it makes."""

from __future__ import annotations

import io
import json
import os
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.grids import call, environment, grid_command
from tests.pairs import (
    Pair,
    encoded,
    every_form,
    ingested,
    request,
    world_pairs,
    write_csv,
    write_pictures,
    write_shards,
    write_tar,
)
from victims.errors import GridError, UsageError
from victims.ingest import below, pictures
from victims.ingest import sources as sources_of_work
from victims.ingest.below import Unusable
from victims.ingest.items import Reason
from victims.ingest.join import digest_again
from victims.ingest.pictures import decode, strict_pillow
from victims.ingest.sources import expand
from victims.pair_folders import IMAGES, MANIFEST, PAIRS, SKIPPED, WORK, open_images, read_folder

FORMS = [
    *("csv", "tsv", "shards", "pattern", "json", "coco", "beside", "listed", "jsonl", "structs"),
    "bytes",
]


def skipped(out: Path) -> dict[str, str]:
    """Source -> reason, of what became no pair."""
    table = pq.read_table(out / SKIPPED)
    return dict(zip(table["source"].to_pylist(), table["reason"].to_pylist(), strict=True))


# --- forms


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return every_form(tmp_path_factory.mktemp("forms"), world_pairs(16))


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_corpus(form: str, forms: dict[str, Any], tmp_path: Path) -> None:
    pairs = world_pairs(16)
    folder = ingested(forms[form], tmp_path / "out").folder
    table = feather.read_table(folder.root / PAIRS)
    assert table["caption"].to_pylist() == [pair.caption for pair in pairs]
    assert set(table["label"].to_pylist()) == {-1}
    assert len(set(table["source"].to_pylist())) == len(pairs)
    # PNG loses nothing, and a picture that has the size keeps its bytes.
    shown = np.stack([np.moveaxis(np.asarray(Image.open(_file(p))), -1, 0) for p in pairs])
    assert np.array_equal(open_images(folder), shown)
    assert folder.digest == ingested(forms["csv"], tmp_path / "csv").folder.digest
    assert not (folder.root / WORK).exists()
    assert set(forms) == set(FORMS)


def _file(pair: Pair) -> Any:
    return io.BytesIO(pair.png)


def test_several_captions_of_a_picture_are_pairs_or_the_first_alone(tmp_path: Path) -> None:
    shown = write_pictures(tmp_path / "pictures", world_pairs(3))
    notes = [(0, "one"), (1, "two"), (0, "again"), (0, "once more")]
    body = {
        "images": [{"id": n, "file_name": f"{n:05d}.png"} for n in range(3)],
        "annotations": [{"image_id": image, "caption": text} for image, text in notes],
    }
    source = tmp_path / "coco.json"
    source.write_text(json.dumps(body))
    every = ingested(request(source, root=shown), tmp_path / "all").folder
    first = ingested(request(source, root=shown, captions="first"), tmp_path / "first").folder
    assert _captions(every.root) == ["one", "two", "again", "once more"]
    assert _captions(first.root) == ["one", "two"]
    assert every.about["skipped"] == {"missing_caption": 1}
    images = open_images(every)
    assert np.array_equal(images[0], images[3])
    assert not np.array_equal(images[0], images[1])


def _captions(root: Path) -> list[str]:
    found: list[str] = feather.read_table(root / PAIRS)["caption"].to_pylist()
    return found


def test_patterns_are_expanded(tmp_path: Path) -> None:
    for name in ("a-01.tar", "a-02.tar", "b-01.tar"):
        (tmp_path / name).touch()
    names = [path.name for path in expand(f"{tmp_path}/a-{{01..03}}.tar")]
    assert names == ["a-01.tar", "a-02.tar", "a-03.tar"]
    assert [p.name for p in expand(f"{tmp_path}/{{b,a}}-*.tar")] == [
        *("b-01.tar", "a-01.tar", "a-02.tar"),
    ]


def test_pictures_are_resized_and_cropped_like_labelled_ones(tmp_path: Path) -> None:
    from victims.picture_files import fit

    wide = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 90, 3), dtype=np.uint8))
    write_tar(tmp_path / "a.tar", [("a.png", encoded(wide)), ("a.txt", b"noise")])
    folder = ingested(request(tmp_path / "a.tar", size=20), tmp_path / "out").folder
    assert np.array_equal(open_images(folder)[0], fit(wide, 20))


# --- what is wrong with rows


def png_header(width: int, height: int) -> bytes:
    """A PNG that says it is that large, and holds nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    about = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", about) + chunk(b"IEND", b"")


def grey16() -> bytes:
    level_HW = np.arange(32 * 32, dtype=np.uint16).reshape(32, 32) * 60
    return encoded(Image.fromarray(level_HW))


def test_every_bad_row_has_its_reason_and_the_others_their_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(below, "MAX_PICTURE_BYTES", 200_000)
    good = world_pairs(12)
    folder = write_pictures(tmp_path / "in" / "pictures", good)
    (tmp_path / "secret.png").write_bytes(good[0].png)
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "cut.png").write_bytes(good[0].png[:400])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("no picture")
    (folder / "bomb.png").write_bytes(png_header(20_000, 20_000))
    (folder / "thin.png").write_bytes(encoded(Image.new("RGB", (100_000, 1))))
    (folder / "large.png").write_bytes(b"\0" * 200_001)
    (folder / "float.tiff").write_bytes(encoded(Image.new("F", (8, 8)), "TIFF"))
    (folder / "folder.png").mkdir()
    bad = {
        "cut.png": Reason.CORRUPT_IMAGE,
        "empty.png": Reason.CORRUPT_IMAGE,
        "text.png": Reason.CORRUPT_IMAGE,
        "absent.png": Reason.MISSING_IMAGE,
        "folder.png": Reason.MISSING_IMAGE,
        "": Reason.MISSING_IMAGE,
        "a\0b.png": Reason.UNREADABLE_IMAGE,
        "bomb.png": Reason.TOO_MANY_PIXELS,
        "thin.png": Reason.TOO_MANY_PIXELS,
        "large.png": Reason.TOO_LARGE,
        "float.tiff": Reason.UNSUPPORTED_IMAGE,
        "link.png": Reason.OUTSIDE_ROOT,
        "../../secret.png": Reason.OUTSIDE_ROOT,
        "/etc/hostname": Reason.OUTSIDE_ROOT,
    }
    lines = [b"image,caption"]
    lines += [f"{p.name},{p.caption}".encode() for p in good]
    lines += [f"{name},a caption".encode() for name in bad]
    lines += [b"00001.png,", b"00002.png,   ", b"00003.png,caf\xe9", b"only one column"]
    lines += [f"{good[0].name},{good[0].caption}".encode(), b"00004.png,another caption"]
    table = folder.parent / "pairs.csv"
    table.write_bytes(b"\n".join(lines))
    found = ingested(request(table, root=folder), tmp_path / "out", allow_skips=True).folder
    assert _captions(found.root) == [*(p.caption for p in good), "another caption"]
    by_row = skipped(found.root)
    first = len(good) + 2  # rows of a file count from 1, and the header is one
    wanted = {f"pairs.csv:{first + n}": str(r) for n, r in enumerate(bad.values())}
    after = first + len(bad)
    rest = ("missing_caption", "missing_caption", "caption_not_utf8", "malformed_row", "duplicate")
    wanted |= {f"pairs.csv:{after + n}": reason for n, reason in enumerate(rest)}
    assert by_row == wanted
    assert found.about["skipped"] == dict(Counter(wanted.values()))
    assert found.about["seen"] == found.rows + len(wanted)


def test_modes_are_converted_and_counted(tmp_path: Path) -> None:
    base = Image.open(_file(world_pairs(1)[0]))
    moving = [base.convert("P"), Image.new("P", (32, 32))]
    files = {
        "cmyk.jpg": encoded(base.convert("CMYK"), "JPEG"),
        "palette.png": encoded(base.convert("P")),
        "grey.png": encoded(base.convert("L")),
        "alpha.png": encoded(base.convert("RGBA")),
        "deep.png": grey16(),
        "bits.png": encoded(base.convert("1")),
        "moving.gif": encoded(moving[0], "GIF", save_all=True, append_images=moving[1:]),
        "plain.png": encoded(base),
    }
    folder = tmp_path / "in"
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    (folder / "captions.txt").write_text("".join(f"{name}\t{name}\n" for name in files))
    found = ingested(request(folder), tmp_path / "out").folder
    assert found.rows == len(files)
    assert found.about["notes"] == {"converted": 7, "animated": 1}
    images = dict(zip(files, open_images(found), strict=True))
    plain = np.moveaxis(np.asarray(base), -1, 0)
    assert np.array_equal(images["alpha.png"], plain)
    assert np.array_equal(images["plain.png"], plain)
    assert np.array_equal(images["grey.png"][0], np.asarray(base.convert("L")))
    deep = (np.arange(32 * 32) * 60 >> 8).reshape(32, 32)
    assert np.array_equal(images["deep.png"][1], deep)
    with Image.open(folder / "moving.gif") as moved:
        shown = np.asarray(moved.convert("RGB"))
    assert np.array_equal(images["moving.gif"], np.moveaxis(shown, -1, 0))


def test_decoders_that_fail_in_any_way_cost_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise KeyError("table")

    monkeypatch.setattr(pictures, "fit", fail)
    with strict_pillow(), pytest.raises(Unusable) as caught:
        decode(world_pairs(1)[0].png, 32)
    assert caught.value.reason is Reason.CORRUPT_IMAGE
    assert "KeyError" in caught.value.detail


def test_a_shard_that_breaks_keeps_what_came_before(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "in", world_pairs(24), 6)
    whole = (shards / "001.tar").read_bytes()
    (shards / "001.tar").write_bytes(whole[: 6 * (512 + 2048) - 700])
    (shards / "002.tar").write_bytes(b"no archive at all" * 100)
    middle = bytearray((shards / "003.tar").read_bytes())
    at = middle.rindex(b"00021.png")
    middle[at : at + 512] = b"\x07" * 512
    (shards / "003.tar").write_bytes(bytes(middle))
    found = ingested(request(shards), tmp_path / "out").folder
    reasons = skipped(found.root)
    assert reasons == dict.fromkeys(("001.tar", "002.tar", "003.tar"), "unreadable_shard")
    sources = feather.read_table(found.root / PAIRS)["source"].to_pylist()
    kept = Counter(source.partition("/")[0] for source in sources)
    assert kept["000.tar"] == 6
    assert 0 < kept["001.tar"] < 6
    assert kept["003.tar"] == 2  # the third sample's end is not known


def test_samples_without_their_half_are_named(tmp_path: Path) -> None:
    png, link = world_pairs(1)[0].png, b"x"
    members = [
        *[("dir/a.png", png), ("dir/a.txt", b"kept")],
        *[("b.txt", b"no picture"), ("c.png", png), ("d.jpg", png), ("d.txt", b"\xff\xfe bad")],
        *[
            ("e.png", png),
            ("e.json", b"{broken"),
            ("f.png", png),
            ("f.json", b'{"text": ["x", "y"]}'),
        ],
        *[("g.cls", link), ("._h.png", link)],
    ]
    write_tar(tmp_path / "s.tar", members)
    found = ingested(request(tmp_path / "s.tar"), tmp_path / "out", allow_skips=True).folder
    assert _captions(found.root) == ["kept", "x", "y"]
    assert skipped(found.root) == {
        "s.tar/b": "missing_image",
        "s.tar/c": "missing_caption",
        "s.tar/d": "caption_not_utf8",
        "s.tar/e": "malformed_row",
        "s.tar/g": "missing_image",
    }
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "s.tar"]


def test_members_that_lead_elsewhere_are_never_written(tmp_path: Path) -> None:
    pair = world_pairs(1)[0]
    members = [("../../up.png", pair.png), ("../../up.txt", b"caption"), ("/abs.png", pair.png)]
    write_tar(tmp_path / "deep" / "in" / "s.tar", [*members, ("/abs.txt", b"another")])
    found = ingested(request(tmp_path / "deep" / "in" / "s.tar"), tmp_path / "out").folder
    assert found.rows == 2
    names = {path.name for path in tmp_path.rglob("*.*")}
    assert not names & {"up.png", "up.txt", "abs.png", "abs.txt"}
    assert not Path("/abs.png").exists()


def test_rows_of_parquet_that_lack_something(tmp_path: Path) -> None:
    pairs = world_pairs(6)
    (tmp_path / "more.png").write_bytes(pairs[1].png)
    structs = [
        {"bytes": pairs[0].png, "path": None},
        {"bytes": None, "path": "more.png"},
        {"bytes": None, "path": None},
        {"bytes": pairs[3].png, "path": "../x"},
        None,
        {"bytes": pairs[5].png, "path": ""},
    ]
    captions = ["a", "b", "c", None, "e", "f"]
    pq.write_table(pa.table({"image": structs, "caption": captions}), tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 not really PAR1")
    found = ingested(request(tmp_path, form="parquet"), tmp_path / "out", allow_skips=True).folder
    assert _captions(found.root) == ["a", "b", "f"]
    assert found.about["skipped"] == {
        **{"missing_caption": 1, "missing_image": 2, "unreadable_shard": 1},
    }


def test_pairs_are_kept_once_whatever_part_they_are_in(tmp_path: Path) -> None:
    pairs = world_pairs(6)
    write_shards(tmp_path / "in", [*pairs, pairs[2], pairs[0]._replace(caption="new")], 3)
    found = ingested(request(tmp_path / "in"), tmp_path / "out").folder
    assert _captions(found.root) == [*(p.caption for p in pairs), "new"]
    assert found.about["skipped"] == {"duplicate": 1}


# --- when most is missing


def test_a_corpus_of_which_most_is_missing_is_not_published(tmp_path: Path) -> None:
    rows = [["image", "caption"], ["00000.png", "a"], ["x.png", "b"], ["y.png", "c"]]
    shown = write_pictures(tmp_path / "pictures", world_pairs(1))
    asked = request(write_csv(tmp_path / "a.csv", rows), root=shown)
    with pytest.raises(GridError, match=r"2 of 3 rows gave no pair: missing_image 2\. Is --root"):
        ingested(asked, tmp_path / "out")
    with pytest.raises(UsageError, match="has not ended there"):
        read_folder(tmp_path / "out")
    assert ingested(asked, tmp_path / "out", allow_skips=True).folder.rows == 1


def test_nobody_waits_for_a_source_that_gives_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("victims.ingest.sources.PART_ROWS", 100)
    monkeypatch.setattr("grid.ingest_parts.HOPELESS_ROWS", 150)
    rows = [["image", "caption"], *([f"{n}.png", "a"] for n in range(1000))]
    asked = request(write_csv(tmp_path / "a.csv", rows))
    with pytest.raises(GridError, match="none of the first 200 rows gave a pair: missing_image"):
        ingested(asked, tmp_path / "out", allow_skips=True)


# --- stopping, going on, workers

SLOW = """
import sys, time
import victims.ingest.work as work
real, calls = work.decode, []
def slow(data, size):
    calls.append(1)
    if len(calls) == 17:
        print("in the middle", flush=True)
        time.sleep(120)
    return real(data, size)
work.decode = slow
from grid.cli import main
main(sys.argv[1:])
"""


def test_a_killed_run_goes_on_and_makes_the_same(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "in", world_pairs(30), 5)
    asked, out = request(shards), tmp_path / "out"
    command = [sys.executable, "-c", SLOW, "ingest", str(shards), "--out", str(out)]
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "env": environment(), "text": True}
    with subprocess.Popen([*command, "--size", "32", "--workers", "1"], **options) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "in the middle\n"
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    parts = sorted((out / WORK / "parts").iterdir())
    assert [path.suffix for path in parts] == [".tmp", *([".parquet", ".u8"] * 3)]
    times = [path.stat().st_mtime_ns for path in parts[1:]]
    with pytest.raises(UsageError, match=r"begun with other options \(size: 32 there, 24 now\)"):
        ingested(request(shards, size=24), out)
    said: list[str] = []
    joined = _stopped_while_joining(asked, out, said)
    assert "going on: 3 of 6 parts are there" in said
    assert joined == times
    folder = ingested(asked, out).folder
    assert folder.digest == ingested(asked, tmp_path / "calm").folder.digest
    assert digest_again(out) == folder.digest


def _stopped_while_joining(asked: Any, out: Path, said: list[str]) -> list[int]:
    """Go on and stop when all pixels have moved; when the parts of before were written."""
    kept = list[int]()

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    def look(work: Path, num_parts: int, limit: int | None) -> Any:
        from victims.ingest.keep import choose

        paths = sorted((work / "parts").iterdir())[:6]
        kept.extend(path.stat().st_mtime_ns for path in paths)
        return choose(work, num_parts, limit)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("victims.ingest.join._write_pairs", stop)
        patch.setattr("grid.ingest.choose", look)
        with pytest.raises(KeyboardInterrupt):
            ingested(asked, out, said)
    assert not list((out / WORK / "parts").glob("*.u8"))
    assert not (out / MANIFEST).exists()
    return kept


@pytest.mark.exhaustive
def test_two_workers_make_what_one_makes(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "in", world_pairs(40), 5)
    one = ingested(request(shards), tmp_path / "one").folder
    two = ingested(request(shards), tmp_path / "two", workers=2).folder
    assert (one.digest, one.rows) == (two.digest, 40)
    for name in (IMAGES, PAIRS):
        assert (one.root / name).read_bytes() == (two.root / name).read_bytes()


def test_a_part_that_was_cut_is_found_before_any_is_used_up(tmp_path: Path) -> None:
    """After a power cut a part may be shorter than its table says."""
    from grid import ingest_parts

    shards = write_shards(tmp_path / "in", world_pairs(10), 5)
    asked, out = request(shards), tmp_path / "out"
    real, cut = ingest_parts.run_parts, out / WORK / "parts" / "000001.u8"

    def parts_and_a_cut(run: Any) -> None:
        real(run)
        with cut.open("r+b") as file:
            file.truncate(100)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("grid.ingest.run_parts", parts_and_a_cut)
        with pytest.raises(GridError, match="part 1 is not whole any more"):
            ingested(asked, out)
    assert not (out / WORK / "joining").exists()
    again = ingested(asked, out).folder
    assert again.digest == ingested(asked, tmp_path / "calm").folder.digest


def test_what_is_published_is_on_the_disk_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A manifest that outlived its files in a power cut would speak of what is not there."""
    order, real, rename = list[str](), os.fsync, Path.replace

    def settled(number: int) -> None:
        order.append(Path(f"/proc/self/fd/{number}").readlink().name)
        real(number)

    def renamed(path: Path, to: Path) -> Path:
        order.append(f"-> {to.name}")
        return rename(path, to)

    monkeypatch.setattr(os, "fsync", settled)
    monkeypatch.setattr(Path, "replace", renamed)
    shards = write_shards(tmp_path / "in", world_pairs(4), 4)
    ingested(request(shards), tmp_path / "out")
    for place, name in enumerate(order):
        if name.startswith("-> "):
            assert order[place - 1].startswith(".") or order[place - 1] == "out", order
    published = order.index(f"-> {MANIFEST}")
    assert {PAIRS, SKIPPED, IMAGES, WORK} <= set(order[:published])
    assert order[-1] == "out"


def test_large_groups_of_rows_are_worked_on_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("victims.ingest.sources.MOST_PART_ROWS", 10)
    monkeypatch.setattr("victims.ingest.sources.PART_ROWS", 4)
    monkeypatch.setattr("victims.ingest.shards._READ_ROWS", 3)
    pairs = world_pairs(36)
    table = pa.table({"jpg": [p.png for p in pairs], "caption": [p.caption for p in pairs]})
    with pq.ParquetWriter(tmp_path / "a.parquet", table.schema) as writer:
        for start, stop in ((0, 3), (3, 28), (28, 31), (31, 36)):
            writer.write_table(table.slice(start, stop - start))
    asked, said = request(tmp_path / "a.parquet"), list[str]()
    found = ingested(asked, tmp_path / "out", said).folder
    assert _captions(found.root) == [pair.caption for pair in pairs]
    sources = feather.read_table(found.root / PAIRS)["source"].to_pylist()
    assert sources == [f"a.parquet#{row}" for row in range(36)]
    jobs = sources_of_work.prepare(asked, tmp_path).jobs
    assert [(j.start, j.stop, j.skip, j.take) for j in jobs] == [
        *[(0, 1, 0, 0), (1, 2, 0, 10), (1, 2, 10, 10), (1, 2, 20, 5), (2, 4, 0, 0)],
    ]
    assert [job.weight for job in jobs] == [3, 10, 10, 5, 8]


@pytest.mark.parametrize("form", ["parquet", "csv", "webdataset"])
def test_a_source_without_rows_says_so(form: str, tmp_path: Path) -> None:
    """It was "0 of 0 rows gave no pair: ."."""
    if form == "parquet":
        source = tmp_path / "a.parquet"
        pq.write_table(pa.table({"image": pa.array([], pa.binary()), "caption": [""][:0]}), source)
    elif form == "csv":
        source = write_csv(tmp_path / "a.csv", [["image", "caption"]])
    else:
        source = write_tar(tmp_path / "a.tar", [])
    with pytest.raises(GridError, match=r"a\.(parquet|csv|tar): .*no (rows|pictures and captions)"):
        ingested(request(source), tmp_path / "out")


def test_pairs_say_which_are_of_one_picture(tmp_path: Path) -> None:
    """The same pixels are one picture, whatever its files are called and in whichever part."""
    one, two, *_ = world_pairs(4)
    again = one._replace(name="00002.png", caption="again")
    # Another file of the same pixels, and another picture.
    recoded = encoded(Image.open(io.BytesIO(two.png)), compress_level=0)
    other = two._replace(name="00003.png", caption="recoded", png=recoded)
    assert recoded != two.png
    shards = write_shards(tmp_path / "in", [one, two, again, other], 2)
    found = ingested(request(shards), tmp_path / "out").folder
    assert feather.read_table(found.root / PAIRS)["picture"].to_pylist() == [0, 1, 0, 1]
    assert (found.about["pictures"], found.knows_pictures) == (2, True)
    assert digest_again(found.root) == found.digest
    table = feather.read_table(found.root / PAIRS, memory_map=False)
    wrong = table.set_column(2, "picture", pa.array([0, 1, 2, 1]))
    feather.write_feather(wrong, found.root / PAIRS, compression="uncompressed")
    assert digest_again(found.root) != found.digest, "splits depend on it"


def test_a_limit_counts_pairs_in_the_order_of_the_source(tmp_path: Path) -> None:
    pairs = world_pairs(20)
    broken = pairs[3]._replace(png=b"broken", name="00003.png")
    listed = [*pairs[:3], broken, pairs[1]._replace(name="00098.png"), *pairs[4:]]
    shards = write_shards(tmp_path / "in", listed, 5)
    found = ingested(request(shards, limit=6), tmp_path / "out").folder
    assert _captions(found.root) == [p.caption for p in [*pairs[:3], *pairs[4:7]]]
    assert found.about["skipped"] == {"corrupt_image": 1, "duplicate": 1}
    assert found.about["seen"] == 8


def test_a_changed_source_is_another_corpus(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "in", world_pairs(10), 5)
    asked, out = request(shards), tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("grid.ingest.choose", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            ingested(asked, out)
    before = (shards / "001.tar").read_bytes()
    write_shards(shards, world_pairs(11), 6)
    with pytest.raises(UsageError, match=r"other files: .*/000\.tar, .*/001\.tar changed since"):
        ingested(asked, out)
    (shards / "001.tar").write_bytes(before)
    done = tmp_path / "done"
    made = ingested(asked, done)
    assert (made.is_new, ingested(asked, done).is_new) == (True, False)
    (shards / "001.tar").touch()
    with pytest.raises(UsageError, match="its files have changed since"):
        ingested(asked, done)
    with pytest.raises(UsageError, match=r"limit: None there, 3 now"):
        ingested(request(shards, limit=3), done)


def test_a_folder_of_others_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    shards = write_shards(tmp_path / "in", world_pairs(2), 2)
    with pytest.raises(UsageError, match=r"holds other files \(mine\.txt\)"):
        ingested(request(shards), tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([["img_url", "caption"]], "no column 'image or filepath"),
        ([["image", "captoin"]], "no column 'caption or title .* Columns there: image, captoin"),
        ([["image", "caption"]], "no pictures and captions there"),
    ],
)
def test_tables_that_cannot_be_meant_are_answered(
    rows: list[list[str]], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=reason):
        ingested(request(write_csv(tmp_path / "a.csv", rows)), tmp_path / "out")
    assert not (tmp_path / "out" / WORK).exists()


def test_a_disk_that_is_too_small_is_said_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 5000})
    monkeypatch.setattr("grid.ingest.shutil.disk_usage", lambda path: usage)
    shown = write_pictures(tmp_path / "pictures", world_pairs(4))
    rows = [["image", "caption"], *([p.name, p.caption] for p in world_pairs(4))]
    asked = request(write_csv(tmp_path / "a.csv", rows), root=shown, size=64)
    # The pixels of four pairs, and once more those of the only part while it is joined.
    with pytest.raises(GridError, match=r"98\.3 kB are needed .*49\.2 kB for a part.* 5 kB are"):
        ingested(asked, tmp_path / "out")


# --- the commands


def test_the_commands_tell_what_there_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = world_pairs(20)
    shards = write_shards(tmp_path / "in", [*pairs, pairs[0]], 7)
    out = tmp_path / "corpus"
    asked = ("ingest", shards, "--out", out, "--size", 32, "--workers", 1)
    made = call(capsys, *asked)
    assert made.code == 0
    assert "skipped: duplicate" in made.out
    again = json.loads(call(capsys, *asked, "--json").out)
    assert (again["rows"], again["new"], again["skipped"]) == (20, False, {"duplicate": 1})
    sheet = tmp_path / "sheet.png"
    info = call(capsys, "corpus", "info", out, "--samples", 5, "--picture", sheet)
    assert again["digest"] in info.out
    assert "pictures         20, up to 1 pair of one" in info.out
    assert "61.4 kB of pixels" in info.out
    assert "20 pairs; joining 3 parts" in made.err
    lines = [line for line in made.out.splitlines() if line.startswith(("looked", "pairs", "skip"))]
    assert len({len(line) for line in lines}) == 1, "counts end in one column"
    assert sum(pair.caption in info.out for pair in pairs) >= 5
    with Image.open(sheet) as image:
        assert image.size[0] > image.size[1]
    told = json.loads(call(capsys, "corpus", "info", out, "--json").out)
    words = [len(pair.caption.split()) for pair in pairs]
    assert told["caption_words"]["0.5"] == np.quantile(words, 0.5)
    shared = Counter(pair.caption for pair in pairs)
    assert told["shared_captions"] == sum(n for n in shared.values() if n > 1) / 20
    assert call(capsys, "corpus", "check", out).code == 0
    with (out / IMAGES).open("r+b") as file:
        file.seek(5000)
        byte = file.read(1)
        file.seek(5000)
        file.write(bytes([byte[0] ^ 1]))
    bad = call(capsys, "corpus", "check", out)
    assert (bad.code, "Ingest it again" in bad.err) == (1, True)


def test_a_source_that_is_not_there_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "train.csv").touch()
    out = ("--out", tmp_path / "o", "--workers", 1)
    said = call(capsys, "ingest", tmp_path / "trian.csv", *out)
    assert (said.code, "Did you mean 'train.csv'" in said.err) == (2, True)
    said = call(capsys, "ingest", tmp_path / "trian", *out)
    assert said.code == 2
    assert "trian: no such file or folder" in said.err
    (tmp_path / "x.dat").touch()
    said = call(capsys, "ingest", tmp_path / "x.dat", *out)
    assert (said.code, "Give --format" in said.err) == (2, True)


def test_a_run_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    from grid import progress

    now = [0.0]
    monkeypatch.setattr("grid.progress.time.monotonic", lambda: now[0])
    monkeypatch.setattr("sys.stderr.isatty", lambda: False)
    said: list[str] = []
    line = progress.PartsProgress(40, 1000, said.append)
    for now[0] in range(200):
        line.update(parts=12, rows=100 * int(now[0]), weight=250)
    line.joined(13)
    line.close()
    assert [int(words.split()[2].replace(",", "")) // 100 for words in said] == [
        *(3, 8, 18, 38, 68, 128, 188)
    ], "soon, then more and more rarely, and a minute apart at last"
    assert said[1] == "12/40 parts, 800 rows, 100 rows/s, about 24 s to go"
    slow = progress.PartsProgress(40, 1000, said.append)
    now[0] += 10
    slow.update(parts=0, rows=3, weight=0)
    assert said[-1] == "0/40 parts, 3 rows, 0.3 rows/s", "slow is not nothing"


@pytest.mark.exhaustive
def test_ctrl_c_ends_all_workers_and_says_how_to_go_on(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "in", world_pairs(400, 224), 20)
    out = tmp_path / "out"
    command = grid_command("ingest", shards, "--out", out, "--size", 300, "--workers", 2)
    options: dict[str, Any] = {"stderr": subprocess.PIPE, "env": environment(), "text": True}
    for sign in (signal.SIGINT, signal.SIGKILL):
        with subprocess.Popen(command, start_new_session=True, **options) as process:
            before = len(list(out.rglob("*.parquet")))
            end = time.monotonic() + 60
            while len(list(out.rglob("*.parquet"))) == before and time.monotonic() < end:
                time.sleep(0.02)
            if sign == signal.SIGINT:
                os.killpg(process.pid, sign)
                assert process.stderr is not None
                said = process.stderr.read()
                assert "the same command goes on" in said
                assert "Traceback" not in said
            else:
                process.kill()
        assert process.returncode == (130 if sign == signal.SIGINT else -sign)
        # Nobody of its session is left: workers end with the process that started them.
        end = time.monotonic() + 30
        while _alive(process.pid) and time.monotonic() < end:
            time.sleep(0.05)
        assert not _alive(process.pid)
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    assert "going on:" in done.stderr
    calm = ingested(request(shards, size=300), tmp_path / "calm").folder
    assert read_folder(out).digest == calm.digest


def _alive(session: int) -> bool:
    try:
        os.killpg(session, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.exhaustive
def test_a_cluster_makes_what_one_process_makes(cluster: str, apart: None, tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "in", world_pairs(40), 5)
    one = ingested(request(shards), tmp_path / "one").folder
    there = ingested(request(shards), tmp_path / "there", address=cluster).folder
    assert (one.digest, one.rows) == (there.digest, 40)
    limited = ingested(request(shards, limit=13), tmp_path / "few", address=cluster).folder
    assert limited.rows == 13
