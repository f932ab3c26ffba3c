"""One HTML file that stands alone: no network, no second file, readable from a disk.

Nothing that a caller says is markup: text and attributes are escaped, anchors are encoded, and
pictures are images of data, so that not even an SVG's script runs. The one script that may run is
ours, named by its hash in the content security policy. Without scripts everything can be read.
"""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from itertools import groupby
from typing import Literal, NamedTuple, TypeAlias

from analysis.text import printable

UNKNOWN = "–"
DEEPEST_HEADING = 6
INTERVAL = re.compile(r"([+-]?[\d.]+) (\[[\d.+, -]+\])(.*)", re.DOTALL)
BREAKS = re.compile(r"(?<=\w)[_@,](?=\w)")
"""Where a long name may be broken."""
HYPHENED = re.compile(r"\b\w+-\w+\b")
MOST_UNBROKEN = 12
MEDIA_TYPES = {"png": "image/png", "svg": "image/svg+xml"}


class Shown(NamedTuple):
    """A cell that sorts by something else than it shows; a sort key of NaN is a missing one."""

    text: str
    sort: float | str
    mark: Literal["", "muted", "bad", "good"] = ""


Cell: TypeAlias = str | float | Shown | None


@dataclass(frozen=True, slots=True)
class Prose:
    """Plain text; blank lines part its paragraphs. What stands between backticks can be code."""

    text: str
    has_code: bool = False


@dataclass(frozen=True, slots=True)
class Notes:
    """A list of remarks, or of warnings. What stands between backticks is code."""

    lines: Sequence[str]
    is_warning: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A column; in one of numbers, whatever is no number counts as missing when sorted."""

    name: str
    heading: str
    is_number: bool = False
    help: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table to sort, filter and copy; ``filters`` names columns of few values.

    The first column names the rows. The order of the rows is the first that a reader sees.
    """

    name: str
    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    filters: Sequence[str] = ()
    heads: Sequence[str] = ()
    """What heads each row, as rows with one head are kept together, also when they are sorted."""

    def __post_init__(self) -> None:
        names = [column.name for column in self.columns]
        if not names or len(names) != len(set(names)):
            raise ValueError(f"table {self.name!r}: columns {names}; name one or more, each once.")
        if unknown := [name for name in self.filters if name not in names]:
            raise ValueError(f"table {self.name!r}: no column {unknown} to filter by, of {names}.")
        if self.heads and len(self.heads) != len(self.rows):
            raise ValueError(
                f"table {self.name!r}: {len(self.heads)} heads for {len(self.rows)} rows; give each"
                " row one, or none at all."
            )
        for index, row in enumerate(self.rows):
            if len(row) != len(names):
                raise ValueError(
                    f"table {self.name!r}: row {index} has {len(row)} cells for"
                    f" {len(names)} columns; give each column one, None where there is nothing."
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """An image, inside the page; a wide one has a row of its own."""

    alt: str
    caption: str
    data: bytes
    kind: Literal["png", "svg"]
    is_wide: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Names and what is known of them."""

    pairs: Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """Named paragraphs, each in one or several lines; what stands between backticks is code."""

    pairs: Sequence[tuple[str, Sequence[str]]]


Block: TypeAlias = Prose | Notes | Table | Picture | Facts | Told


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A titled part of the page; ``name`` is its anchor, ``parts`` are folded until opened."""

    name: str
    title: str
    blocks: Sequence[Block]
    parts: Sequence[Section] = ()


def page(title: str, sections: Sequence[Section], *, subtitle: str = "", made: str = "") -> str:
    """The page as the text of one file, to be written as UTF-8.

    ``made`` says at its foot when and from what it was made.
    """
    _check_names(sections)
    script = _asset("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline';"
        f" script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            # The digest is base64 and the rest is ours, so that nothing here needs escaping.
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="referrer" content="no-referrer">',
            # An icon of nothing, or a browser would ask a server for one.
            '<link rel="icon" href="data:,">',
            f"<title>{_text(title)}</title>",
            f"<style>{_asset('page.css')}</style>",
            "</head>",
            "<body>",
            '<a class="skip" href="#page:main">Skip to the content</a>',
            f'<header class="head"><div><h1>{_text(title)}</h1>',
            *([f'<p class="subtitle">{_text(subtitle)}</p>'] if subtitle else []),
            "</div>",
            '<button type="button" class="theme" hidden>Dark theme</button></header>',
            f'<nav aria-label="Sections">{_links(sections)}</nav>',
            '<main id="page:main" tabindex="-1">',
            *(_section(section) for section in sections),
            "</main>",
            *([f'<footer class="foot"><p>{_text(made)}</p></footer>'] if made else []),
            f"<script>{script}</script>",
            "</body>",
            "</html>",
            "",
        ]
    )


def _asset(name: str) -> str:
    """A file that ships with this one, as it stands in the page."""
    return resources.files("analysis").joinpath("assets", name).read_text("utf-8")


def _text(text: str) -> str:
    """Text as markup that shows it, in an element or in a quoted attribute."""
    return escape(printable(text), quote=True)


def _marked(text: str) -> str:
    """Text whose ``code`` and `code` are code."""
    parts = re.split(r"``([^`]+)``|`([^`]+)`", text)
    # Text, then what stood between two backticks, then between one: again and again.
    return "".join(
        "" if part is None else _text(part) if place % 3 == 0 else f"<code>{_text(part)}</code>"
        for place, part in enumerate(parts)
    )


def _anchor(name: str) -> str:
    """A name as an id. Different names have different ids, none of which holds a colon."""
    return re.sub(r"[^A-Za-z0-9_.-]", lambda found: f"~{ord(found[0]):x}~", name)


def _check_names(sections: Sequence[Section]) -> None:
    """Anchors must lead to one place each."""
    everything = list(_all_sections(sections))
    tables = (b.name for s in everything for b in s.blocks if isinstance(b, Table))
    for what, names in (("section", (s.name for s in everything)), ("table", tables)):
        for name, count in Counter(names).items():
            if count > 1 or not name:
                raise ValueError(f"{count} x {what} {name!r}: each needs a name of its own.")


def _all_sections(sections: Iterable[Section]) -> Iterator[Section]:
    for section in sections:
        yield section
        yield from _all_sections(section.parts)


def _links(sections: Sequence[Section]) -> str:
    items = (
        f'<li><a href="#{_anchor(section.name)}">{_text(section.title)}</a>'
        f"{_links(section.parts)}</li>"
        for section in sections
    )
    return f"<ul>{''.join(items)}</ul>" if sections else ""


def _section(section: Section) -> str:
    anchor = _anchor(section.name)
    return (
        f'<section id="{anchor}" aria-labelledby="title:{anchor}">\n'
        f'<h2 id="title:{anchor}">{_text(section.title)}</h2>\n{_inside(section, 2)}</section>'
    )


def _part(part: Section, level: int) -> str:
    heading = f"h{min(level, DEEPEST_HEADING)}"
    return (
        f'<details class="part" id="{_anchor(part.name)}">\n'
        f"<summary><{heading}>{_text(part.title)}</{heading}></summary>\n"
        f'<div class="inside">{_inside(part, level)}</div></details>\n'
    )


def _inside(section: Section, level: int) -> str:
    """Blocks, pictures in a row side by side, then parts."""
    pieces = []
    for is_picture, blocks in groupby(section.blocks, lambda block: isinstance(block, Picture)):
        inside = "".join(_block(block) for block in blocks)
        pieces.append(f'<div class="pictures">{inside}</div>\n' if is_picture else inside)
    if len(section.parts) > 1:
        pieces.append('<button type="button" class="unfold" hidden>Open all</button>\n')
    return "".join([*pieces, *(_part(part, level + 1) for part in section.parts)])


def _block(block: Block) -> str:
    match block:
        case Prose():
            texts = re.split(r"\n\s*\n", block.text.strip())
            marked = _marked if block.has_code else _text
            return "".join(f"<p>{marked(text)}</p>\n" for text in texts if text)
        case Notes():
            return _notes(block)
        case Facts():
            return _list_of_facts(block.pairs, "facts")
        case Told():
            items = (
                f"<div><dt>{_marked(name)}</dt>"
                f"{''.join(f'<dd>{_marked(line)}</dd>' for line in lines)}</div>"
                for name, lines in block.pairs
            )
            return f'<dl class="told">{"".join(items)}</dl>\n'
        case Picture():
            data = base64.b64encode(block.data).decode()
            source = f"data:{MEDIA_TYPES[block.kind]};base64,{data}"
            kinds = f"picture {block.kind}" + (" wide" if block.is_wide else "")
            return (
                f'<figure class="{kinds}"><img src="{source}" alt="{_text(block.alt)}">'
                f"<figcaption>{_text(block.caption)}</figcaption></figure>\n"
            )
        case Table():
            return _table(block)


def _notes(notes: Notes) -> str:
    items = "".join(f"<li>{_marked(line)}</li>" for line in notes.lines)
    if not items:
        return ""
    if not notes.is_warning:
        return f'<ul class="notes">{items}</ul>\n'
    word = "Warning" if len(notes.lines) == 1 else "Warnings"
    return f'<div class="warning" role="note"><p class="kind">{word}</p><ul>{items}</ul></div>\n'


def _list_of_facts(pairs: Iterable[tuple[str, str]], kind: str) -> str:
    items = (f"<div><dt>{_text(n)}</dt><dd>{_text(said)}</dd></div>" for n, said in pairs)
    return f'<dl class="{kind}">{"".join(items)}</dl>\n'


def _table(table: Table) -> str:
    name = f"table:{_anchor(table.name)}"
    headings = "".join(_heading(column) for column in table.columns)
    rows = "\n".join(_rows(table))
    helps = [(column.heading, column.help) for column in table.columns if column.help]
    explained = (
        '<details class="columns"><summary>What the columns say</summary>'
        f"{_list_of_facts(helps, 'helps')}</details>\n"
    )
    return (
        f'<figure class="table" id="{name}">'
        f'<figcaption id="{name}:caption">{_text(table.caption)}</figcaption>\n'
        f"{_controls(table)}"
        # It scrolls, so that the keyboard must reach it.
        f'<div class="box" role="region" tabindex="0" aria-labelledby="{name}:caption">'
        f'<table aria-labelledby="{name}:caption"><thead><tr>{headings}</tr></thead>\n'
        f"<tbody>{rows}</tbody></table></div>\n"
        f"{explained if helps else ''}</figure>\n"
    )


def _controls(table: Table) -> str:
    """What the script brings to life; hidden where none runs."""
    picks = []
    for index, column in enumerate(table.columns):
        if column.name in table.filters:
            texts = dict.fromkeys(_shown(row[index]).text for row in table.rows)
            options = "".join(f'<option value="{_text(t)}">{_text(t)}</option>' for t in texts)
            picks.append(
                f'<label>{_text(column.heading)} <select data-column="{index}">'
                f'<option value="">all</option>{options}</select></label>'
            )
    count = len(table.rows)
    return (
        '<div class="controls" hidden><label>Filter <input type="search" autocomplete="off"'
        f' spellcheck="false"></label>{"".join(picks)}'
        '<button type="button" class="copy">Copy as CSV</button>'
        f'<p class="count" role="status" aria-live="polite">{count} of {count} rows</p></div>\n'
    )


def _rows(table: Table) -> Iterator[str]:
    """Rows, each group under its head if there are several."""
    has_heads, last = len(set(table.heads)) > 1, None
    for place, row in enumerate(table.rows):
        if has_heads and table.heads[place] != last:
            last = table.heads[place]
            yield (
                f'<tr class="group"><th scope="colgroup" colspan="{len(table.columns)}">'
                f"<span>{_text(last)}</span></th></tr>"
            )
        yield _row(table.columns, row)


def _heading(column: Column) -> str:
    kind = ' class="number"' if column.is_number else ""
    said = f' title="{_text(column.help)}"' if column.help else ""
    words = HYPHENED.sub(r'<span class="word">\g<0></span>', _text(column.heading))
    button = f'<button type="button"{said}>{words}</button>'
    return f'<th scope="col"{kind}>{button}</th>'


def _row(columns: Sequence[Column], cells: Sequence[Cell]) -> str:
    pairs = zip(columns, cells, strict=True)
    return f"<tr>{''.join(_cell(c, cell, i == 0) for i, (c, cell) in enumerate(pairs))}</tr>"


def _cell(column: Column, cell: Cell, names_row: bool) -> str:
    """A cell, with its sort key beside it; one without a key sorts last, either way."""
    text, key, mark = _shown(cell)
    is_long = column.is_number and len(text) > MOST_UNBROKEN
    kinds = ("number" if column.is_number else "", "long" if is_long else "", mark)
    classes = " ".join(filter(None, kinds))
    kind = f' class="{classes}"' if classes else ""
    if isinstance(key, float | int):
        # As the script reads it: `Infinity`, and no names of number types.
        number = "" if math.isnan(key) else repr(float(key)).replace("inf", "Infinity")
        sort = f' data-number="{number}"' if number else ""
    else:
        sort = f' data-key="{_text(key)}"' if key and not column.is_number else ""
    tag, scope = ("th", ' scope="row"') if names_row else ("td", "")
    said = BREAKS.sub(r"\g<0><wbr>", _text(text)) if names_row else _text(text)
    if column.is_number and (found := INTERVAL.match(text)):
        # It may stand below its number.
        number, interval, rest = map(_text, found.groups())
        said = f"{number} <small>{interval}</small>{rest}"
    return f"<{tag}{scope}{kind}{sort}>{said}</{tag}>"


def _shown(cell: Cell) -> Shown:
    """A cell in full: a bare number shows six digits and sorts by all of them."""
    if isinstance(cell, Shown):
        return cell
    if isinstance(cell, str):
        return Shown(cell, cell)
    if cell is None or math.isnan(cell):
        return Shown(UNKNOWN, math.nan, "muted")
    if math.isinf(cell):
        return Shown("∞" if cell > 0 else "-∞", cell)
    is_whole = float(cell).is_integer() and abs(cell) < 1e15
    return Shown(str(int(cell)) if is_whole else f"{cell:.6g}", cell)
