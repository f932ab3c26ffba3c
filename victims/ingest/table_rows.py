"""The rows of a table of text, none of which can swallow another.

A quote that nothing closes makes a usual reader take all that follows for one field. Here a row is
a line, unless its quotes are plainly meant: opened at a field's start, closed at a field's end, and
not around line breaks and separators both, which nobody can tell from a stray quote. A line that is
no row is one malformed row, and reading goes on with the line behind it: every line counts.
"""

from __future__ import annotations

import csv
from collections import deque
from collections.abc import Iterator
from itertools import count
from typing import Final, NamedTuple

from victims.ingest.items import first_line

MOST_LINES: Final = 100  # that a quoted field may go over
_OPEN: Final = "unexpected end of data"  # as the reader says of a quote that nothing closes
_EITHER: Final = "quotes around a line break and a separator: one row, or several"


class Row(NamedTuple):
    """A row, the line that it begins in, and why it is none."""

    line: int
    columns: list[str]
    fault: str = ""


class _Lines:
    """Lines of a file, some of them looked at ahead."""

    def __init__(self, file: Iterator[str]) -> None:
        self._file, self._ahead = file, deque[str]()
        self.number = 0  # of lines that were taken

    def ahead(self) -> Iterator[str]:
        """The lines that follow, none of them taken."""
        for place in count():
            if place == len(self._ahead):
                line = next(self._file, None)
                if line is None:
                    return
                self._ahead.append(line)
            yield self._ahead[place]

    def take(self, lines: int) -> None:
        for _ in range(lines):
            self._ahead.popleft()
        self.number += lines


def table_rows(file: Iterator[str], separator: str) -> tuple[list[str], Iterator[Row]]:
    """The header of a table and its rows, from the lines of a file with their line breaks."""
    lines = _Lines(file)
    reader = csv.reader(lines.ahead(), delimiter=separator)
    header = next(reader, [])
    lines.take(reader.line_num)
    return header, _rows(lines, separator, len(header))


def _rows(lines: _Lines, separator: str, width: int) -> Iterator[Row]:
    while (line := next(lines.ahead(), None)) is not None:
        number, text = lines.number + 1, line.rstrip("\r\n")
        if '"' not in text:
            lines.take(1)
            if text:
                yield _checked(number, text.split(separator), width)
            continue
        row, taken = _quoted(lines, separator)
        if row.fault == _EITHER or (taken > 1 and len(row.columns) != width):
            row, taken = Row(number, [], row.fault or f"{len(row.columns)} columns of {width}"), 1
        elif row.fault or len(row.columns) != width:
            # Quotes that are part of the text. An open one before a comma may also be a cut file.
            plain, is_open = text.split(separator), row.fault.endswith(_OPEN)
            if len(plain) == width and (separator == "\t" or not is_open):
                row = Row(number, plain)
        lines.take(taken)
        yield row if row.fault else _checked(number, row.columns, width)


def _quoted(lines: _Lines, separator: str) -> tuple[Row, int]:
    """The row that begins in the next line, read with quotes, and its lines: 1 if it is none."""
    number = lines.number + 1
    some = (line for line, _ in zip(lines.ahead(), range(MOST_LINES), strict=False))
    reader = csv.reader(some, delimiter=separator, strict=True)
    try:
        columns = next(reader)
    except csv.Error as error:
        return Row(number, [], first_line(error)), 1
    if any(separator in field and ("\n" in field or "\r" in field) for field in columns):
        return Row(number, [], _EITHER), 1
    return Row(number, columns), reader.line_num


def _checked(number: int, columns: list[str], width: int) -> Row:
    """A row of the header's width; empty columns behind it are let go."""
    while len(columns) > width and not columns[-1].strip():
        columns = columns[:-1]
    if len(columns) > width:
        return Row(number, columns, f"{len(columns)} columns of {width}")
    return Row(number, columns)
