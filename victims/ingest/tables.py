"""Tables of pictures and captions: CSV, TSV, lines of JSON, COCO's JSON, and folders.

Each yields candidates in the order of its file; a path is as written, below the root.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from victims.errors import UsageError, near
from victims.ingest.below import Unusable, read_below
from victims.ingest.items import Item, Reason, Request, first_line, shown
from victims.ingest.table_rows import table_rows
from victims.picture_files import ENDINGS

IMAGE_COLUMNS: Final = (
    *("image", "filepath", "path", "file_name", "filename", "image_path", "file", "img"),
)
CAPTION_COLUMNS: Final = ("caption", "title", "text", "sentence", "captions")
CAPTION_FILES: Final = (
    *("captions.txt", "captions.tsv", "captions.csv", "captions.jsonl", "metadata.jsonl"),
    "metadata.csv",
)


def csv_items(path: Path, request: Request) -> Iterator[Item]:
    """A table with a header. Bytes that are no UTF-8 spoil their row alone."""
    with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        first = file.readline()
        file.seek(0)
        separator = request.separator or ("\t" if "\t" in first else ",")
        header, rows = table_rows(file, separator)
        at_image, at_caption = _columns(path, header, request)
        for row in rows:
            source = f"{shown(path.name)}:{row.line}"
            if row.fault:
                yield Item(source, reason=Reason.MALFORMED_ROW, detail=row.fault)
            elif len(row.columns) <= max(at_image, at_caption):
                detail = f"{len(row.columns)} columns of {len(header)}"
                yield Item(source, reason=Reason.MALFORMED_ROW, detail=detail)
            else:
                yield pair(source, row.columns[at_image], row.columns[at_caption])


def _columns(path: Path, header: Sequence[str], request: Request) -> tuple[int, int]:
    image = column(path, header, request.image_column, IMAGE_COLUMNS, "image")
    caption = column(path, header, request.caption_column, CAPTION_COLUMNS, "caption")
    return header.index(image), header.index(caption)


def column(path: Path, header: Sequence[str], asked: str, usual: Sequence[str], what: str) -> str:
    """The column that is asked for, or else the first of the usual ones that is there."""
    if asked and asked in header:
        return asked
    found = [name for name in usual if name in header]
    if found and not asked:
        return found[0]
    there = ", ".join(map(shown, header[:12])) or "none"
    wanted = asked or " or ".join(usual)
    raise UsageError(
        f"{path}: no column {wanted!r} for the {what}.{near(wanted, header)}"
        f" Columns there: {there}."
        f" --{what}-column names another, --separator what stands between columns."
    )


def pair(source: str, image: Any, caption: Any) -> Item:
    """A candidate of a table's row."""
    if not isinstance(image, str) or not image.strip():
        return Item(source, reason=Reason.MISSING_IMAGE, detail="no path")
    if not isinstance(caption, str) or not caption.strip():
        return Item(source, image, reason=Reason.MISSING_CAPTION, detail=shown(image))
    if not is_text(caption):
        return Item(source, image, reason=Reason.CAPTION_NOT_UTF8, detail=shown(image))
    return Item(source, image, caption.strip())


def is_text(caption: str) -> bool:
    """Whether a caption can be written in UTF-8: no halves of characters in it."""
    try:
        caption.encode()
    except UnicodeEncodeError:
        return False
    return True


def json_lines(path: Path, request: Request) -> Iterator[Item]:
    """A line of JSON for each picture, with one caption or a list of them."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            source = f"{shown(path.name)}:{number}"
            if not line.strip():
                continue
            try:
                found = json.loads(line)
                image = found[
                    column(path, list(found), request.image_column, IMAGE_COLUMNS, "image")
                ]
            except UnicodeDecodeError as error:
                yield Item(source, reason=Reason.CAPTION_NOT_UTF8, detail=first_line(error))
                continue
            except (ValueError, TypeError, UsageError, RecursionError) as error:
                yield Item(source, reason=Reason.MALFORMED_ROW, detail=first_line(error))
                continue
            wanted = (request.caption_column,) if request.caption_column else CAPTION_COLUMNS
            yield from several(source, image, next((found[n] for n in wanted if n in found), None))


def several(source: str, image: Any, caption: Any) -> Iterator[Item]:
    """A candidate for each of a picture's captions."""
    if not isinstance(caption, list):
        yield pair(source, image, caption)
    elif not caption:
        yield pair(source, image, None)
    else:
        for number, one in enumerate(caption):
            yield pair(f"{source}#{number}", image, one)


def usable(items: Iterator[Item], request: Request) -> Iterator[Item]:
    """The captions of one picture: all, or the first that can be used. What is none is counted."""
    taken = False
    for item in items:
        if item.reason is None and taken and request.captions == "first":
            continue
        taken = taken or item.reason is None
        yield item


def text_lines(path: Path, request: Request) -> Iterator[Item]:
    """Lines of a picture's name, a tab or a comma, and its caption; a header is passed over, and
    what stands between its columns stands between those of all lines."""
    with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        between = request.separator
        for number, line in enumerate(file, start=1):
            text, source = line.rstrip("\r\n"), f"{shown(path.name)}:{number}"
            separator = between or ("\t" if "\t" in text else ",")
            name, found, caption = text.partition(separator)
            if number == 1 and name.strip().lower() in IMAGE_COLUMNS:
                between = separator if found else between
                continue
            if not text.strip():
                continue
            if not found:
                wanted = {"\t": "no tab", ",": "no comma"}.get(between, f"no {between!r}")
                detail = wanted if between else "no tab or comma"
                yield Item(source, reason=Reason.MALFORMED_ROW, detail=detail)
                continue
            # Flickr's files number the captions of a picture: name.jpg#0.
            name = name.strip().partition("#")[0] if ".jpg#" in name else name.strip()
            if len(caption) > 1 and caption[0] == caption[-1] == '"':
                caption = caption[1:-1].replace('""', '"')
            yield pair(source, name, caption)


def folder_items(source: Path, request: Request) -> Iterator[Item]:
    """A folder of pictures: its file of captions, or else a text beside each picture."""
    listed = source if source.is_file() else caption_file(source)
    if listed is None:
        yield from _beside(source, request.root)
    elif listed.suffix == ".jsonl":
        yield from json_lines(listed, request)
    elif listed.suffix in (".csv", ".tsv") and _has_header(listed, request):
        yield from csv_items(listed, request)
    else:
        yield from text_lines(listed, request)


def _has_header(path: Path, request: Request) -> bool:
    """Whether the first line of a table names a column of pictures."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        names = {name.strip().lower() for name in file.readline().replace("\t", ",").split(",")}
    return bool(names & {*IMAGE_COLUMNS, request.image_column.lower()})


def caption_file(folder: Path) -> Path | None:
    """The file in a folder that holds the captions of its pictures, if there is one."""
    return next((folder / n for n in CAPTION_FILES if (folder / n).is_file()), None)


def _beside(folder: Path, root: str) -> Iterator[Item]:
    """Every picture below a folder, by name, with the lines of the text of the same stem."""
    for above, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            path = Path(above, name)
            if name.startswith(".") or path.suffix.lower() not in ENDINGS:
                continue
            image = str(path.relative_to(folder))
            try:
                text = read_below(root, str(path.absolute().with_suffix(".txt"))).decode(
                    "utf-8-sig"
                )
            except FileNotFoundError:
                yield Item(shown(image), image, reason=Reason.MISSING_CAPTION, detail="no .txt")
                continue
            except Unusable as error:
                missing = error.reason == Reason.MISSING_IMAGE
                reason = Reason.MISSING_CAPTION if missing else error.reason
                yield Item(shown(image), image, reason=reason, detail=shown(error.detail))
                continue
            except (OSError, UnicodeDecodeError) as error:
                yield Item(
                    shown(image), image, reason=Reason.CAPTION_NOT_UTF8, detail=first_line(error)
                )
                continue
            lines = [line for line in text.splitlines() if line.strip()]
            yield from several(shown(image), image, lines if len(lines) > 1 else "".join(lines))


def _known(names: Mapping[Any, Any], image: Any) -> Any:
    """The picture of an id, which may be anything that JSON can say."""
    return names.get(image) if isinstance(image, str | int) else None


def coco_items(path: Path) -> Iterator[Item]:
    """Captions in COCO's form, by the order of the annotations; then pictures without any."""
    try:
        found = json.loads(path.read_bytes())
        names = {image["id"]: image["file_name"] for image in found["images"]}
        annotations = list(found["annotations"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(
            f"{path}: is no JSON of COCO captions ({first_line(error)}): it needs `images` with id"
            " and file_name, and `annotations` with image_id and caption"
        ) from error
    captioned = set()
    for number, annotation in enumerate(annotations):
        source = f"{shown(path.name)}#{number}"
        try:
            image, caption = annotation["image_id"], annotation["caption"]
        except (KeyError, TypeError):
            detail = "an annotation needs image_id and caption"
            yield Item(source, reason=Reason.MALFORMED_ROW, detail=detail)
            continue
        if (name := _known(names, image)) is None:
            detail = f"image_id {image!r} is the id of no picture in `images`"[:300]
            yield Item(source, reason=Reason.MALFORMED_ROW, detail=shown(detail))
            continue
        captioned.add(image)
        yield pair(source, name, caption)
    for image, name in names.items():
        if image not in captioned:
            yield pair(f"{shown(path.name)}/{image}", name, None)
