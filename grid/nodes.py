"""YAML to nodes that know their line: the values of a grid file before anything reads them.

The text becomes `Node`s by our own hand from PyYAML's parse events, so that every value knows its
line, no tag constructs anything, ``off`` stays a word and ``1e-5`` is a number (YAML 1.2's core
rules). Aliases share nodes; a node's size counts them written out, which bounds what a small
hostile file can become.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from victims.errors import UsageError, near

Scalar = None | bool | int | float | str

MAX_BYTES = 1_000_000
MAX_NODES = 20_000
MAX_DEPTH = 20
MAX_DIGITS = 40

_INT = re.compile(r"[-+]?[0-9][0-9_]*")
FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_SPECIAL = re.compile(r"[-+]?\.(inf|nan)", re.IGNORECASE)
_WORDS = {"": None, "~": None, "null": None, "true": True, "false": False}


OTHERWISE = {
    **dict.fromkeys(("lrate", "learning_rate", "rate_of_learning"), "lr"),
    **dict.fromkeys(("bs", "batch", "batchsize"), "batch_size"),
    **{"wd": "weight_decay", "warmup": "warmup_steps", "num_epochs": "epochs", "arch": "model"},
    **{"poison_rates": "rates", "poison_rate": "rates", "num_seeds": "seeds"},
}
"""What others call our keys, where the spelling does not tell."""


@dataclass(frozen=True, slots=True)
class Where:
    """A place in a file. ``line`` counts from 1; 0 is unknown."""

    file: str = ""
    line: int = 0
    path: str = ""

    def at(self, part: str | int, line: int = 0) -> Where:
        """The place of a key or of an item below this one."""
        if isinstance(part, int):
            path = f"{self.path}[{part}]"
        else:
            path = f"{self.path}.{part}" if self.path else part
        return Where(self.file, line or self.line, path)

    def __str__(self) -> str:
        file = f"{self.file}:{self.line}" if self.file and self.line else self.file
        return ": ".join(part for part in (file, self.path) if part)

    def error(self, message: str) -> UsageError:
        # A message may begin with what its place ends with, such as a method's name.
        message = message.removeprefix(f"{self.path.rpartition('.')[2]}: ")
        place = str(self)
        return UsageError(f"{place}: {message}" if place else message)


@dataclass(frozen=True, slots=True)
class Node:
    """A value of a file. ``text`` is a scalar as written; ``line`` is that of its key, if any."""

    data: Scalar | tuple[Node, ...] | Mapping[str, Node]
    text: str = ""
    line: int = 0
    size: int = 1


@dataclass(frozen=True, slots=True)
class Raw:
    """A node and its place. A field of this type is handed over undecoded."""

    node: Node
    where: Where = field(default_factory=Where)

    @classmethod
    def of(cls, data: Any, where: Where) -> Raw:
        """Plain data (mappings, lists, scalars), all of it at one place."""
        return cls(_node(data, where.line), where)

    def error(self, message: str) -> UsageError:
        return self.where.error(message)

    def items(self) -> dict[str, Raw]:
        data = self.node.data
        if not isinstance(data, Mapping):
            raise self.error(f"expected a mapping (key: value), got {self.show()}")
        return {name: Raw(node, self.where.at(name, node.line)) for name, node in data.items()}

    def elements(self) -> list[Raw]:
        data = self.node.data
        if not isinstance(data, tuple):
            raise self.error(f"expected a list, such as [{self.show()}], got {self.show()}")
        return [Raw(node, self.where.at(i, node.line)) for i, node in enumerate(data)]

    def only(self, names: Iterable[str]) -> Raw:
        """This mapping with no keys but ``names``."""
        wanted = set(names)
        kept = {name: item.node for name, item in self.items().items() if name in wanted}
        return Raw(dataclasses.replace(self.node, data=kept), self.where)

    def without(self, *names: str) -> Raw:
        return self.only(self.items().keys() - set(names))

    def over(self, defaults: Mapping[str, Any]) -> Raw:
        """This mapping on top of ``defaults``, which are plain data."""
        below = {name: _node(value, self.where.line) for name, value in defaults.items()}
        own = {name: item.node for name, item in self.items().items()}
        return Raw(dataclasses.replace(self.node, data=below | own), self.where)

    def under(self, values: Mapping[str, Any]) -> Raw:
        """This mapping with ``values``, which are plain data, in place of its own."""
        own = {name: item.node for name, item in self.items().items()}
        above = {name: _node(value, self.where.line) for name, value in values.items()}
        return Raw(dataclasses.replace(self.node, data=own | above), self.where)

    def check_keys(self, known: Iterable[str]) -> None:
        names = list(known)
        for name, item in self.items().items():
            if name not in names:
                place = dataclasses.replace(self.where, line=item.where.line)
                table = ", ".join(names) if names else "nothing can be set here"
                meant = OTHERWISE.get(name)
                hint = f" Did you mean {meant!r}?" if meant in names else near(name, names)
                raise place.error(f"unknown key {name!r}.{hint} Known: {table}.")

    def plain(self) -> Any:
        data = self.node.data
        if isinstance(data, Mapping):
            return {name: item.plain() for name, item in self.items().items()}
        return [item.plain() for item in self.elements()] if isinstance(data, tuple) else data

    def show(self) -> str:
        """The value in a few words, for a message."""
        data = self.node.data
        if isinstance(data, Mapping):
            return "a mapping"
        if isinstance(data, tuple):
            return "a list"
        if data is None:
            return "nothing"
        text = repr(data) if isinstance(data, str) else self.node.text
        return text if len(text) <= 60 else f"{text[:57]}..."


def _node(data: Any, line: int) -> Node:
    if isinstance(data, Enum):
        data = data.value
    if isinstance(data, Mapping):
        return Node({str(key): _node(value, line) for key, value in data.items()}, line=line)
    if isinstance(data, Sequence) and not isinstance(data, str | bytes):
        return Node(tuple(_node(value, line) for value in data), line=line)
    if data is None or isinstance(data, bool | int | float | str):
        return Node(data, str(data).lower() if isinstance(data, bool) else str(data), line)
    raise TypeError(f"a {type(data).__name__} is not plain data: {data!r}")


def read_text(path: Path) -> str:
    """A grid file's text: UTF-8, of a size a person could have meant."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror or error})") from error
    if len(content) > MAX_BYTES:
        raise UsageError(f"{path}: larger than {MAX_BYTES:,} bytes; is this a grid file?")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UsageError(
            f"{path}:{line}: not UTF-8 text (byte {error.start} is 0x{content[error.start]:02x})."
            " Is this a grid file? Save it as UTF-8."
        ) from error


def parse(text: str, file: str) -> Raw:
    """The one document of a YAML text."""
    try:
        node = _Composer(yaml.parse(text, Loader=yaml.SafeLoader), file).document()
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise Where(file, line).error(f"not text: {error.reason}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = ", ".join(part for part in (error.context, error.problem) if part)
        line = mark.line + 1 if mark is not None else 0
        raise Where(file, line).error(f"not YAML: {problem}") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        # An escape such as "\UFFFFFFFF" is beyond PyYAML's own checks.
        raise Where(file).error(f"not YAML: {error}") from error
    return Raw(node, Where(file, node.line))


def _line(event: Any) -> int:
    line: int = event.start_mark.line + 1
    return line


class _Composer:
    """Parse events to nodes."""

    def __init__(self, events: Iterator[Any], file: str) -> None:
        self.events, self.file = events, file
        self.anchors: dict[str, Node] = {}
        self.count = 0

    def error(self, event: Any, message: str) -> UsageError:
        return Where(self.file, _line(event)).error(message)

    def document(self) -> Node:
        next(self.events)  # the stream's start
        if not isinstance(next(self.events), yaml.DocumentStartEvent):
            raise Where(self.file).error("the file is empty; a grid file is a mapping")
        node = self.node(next(self.events), 0)
        next(self.events)  # the document's end
        after = next(self.events)
        if not isinstance(after, yaml.StreamEndEvent):
            raise self.error(after, "a second document ('---'); a grid file has one")
        return node

    def node(self, event: Any, depth: int) -> Node:
        line = _line(event)
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in self.anchors:
                raise self.error(event, f"alias *{event.anchor} has no anchor before it")
            node = dataclasses.replace(self.anchors[event.anchor], line=line)
            self.spend(event, node.size)
            return node
        if event.tag is not None:
            raise self.error(event, f"tag {event.tag!r}: a grid file has no tags; write the value")
        if depth > MAX_DEPTH:
            raise self.error(event, f"nested more than {MAX_DEPTH} deep")
        self.spend(event, 1)
        if isinstance(event, yaml.ScalarEvent):
            event.value.encode()  # refuses lone surrogates, which no later stage could write
            node = Node(self.scalar(event), event.value, line)
        elif isinstance(event, yaml.SequenceStartEvent):
            children = tuple(self.children(yaml.SequenceEndEvent, depth))
            node = Node(children, "", line, 1 + sum(child.size for child in children))
        else:
            entries = self.mapping(depth)
            node = Node(entries, "", line, 1 + sum(child.size for child in entries.values()))
        if event.anchor is not None:
            self.anchors[event.anchor] = node
        return node

    def spend(self, event: Any, size: int) -> None:
        self.count += size
        if self.count > MAX_NODES:
            raise self.error(event, f"more than {MAX_NODES:,} values, aliases written out")

    def children(self, end: type[Any], depth: int) -> Iterator[Node]:
        while not isinstance(event := next(self.events), end):
            yield self.node(event, depth + 1)

    def mapping(self, depth: int) -> dict[str, Node]:
        entries: dict[str, Node] = {}
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            if not isinstance(event, yaml.ScalarEvent):
                raise self.error(event, "a key must be a word")
            name, line = event.value, _line(event)
            event.value.encode()
            if name in entries:
                first = entries[name].line
                raise self.error(event, f"key {name!r} is given twice (first in line {first})")
            value = self.node(next(self.events), depth + 1)
            entries[name] = dataclasses.replace(value, line=line)
        return entries

    def scalar(self, event: Any) -> Scalar:
        text: str = event.value
        if not event.implicit[0]:
            return text
        if text.lower() in _WORDS:
            return _WORDS[text.lower()]
        is_int, is_float = _INT.fullmatch(text), FLOAT.fullmatch(text)
        if (is_int or is_float) and len(text) > MAX_DIGITS:
            raise self.error(event, f"a number of more than {MAX_DIGITS} characters")
        if is_int:
            return int(text.replace("_", ""))
        if is_float:
            return float(text.replace("_", ""))
        return float(text.replace(".", "", 1)) if _SPECIAL.fullmatch(text) else text
