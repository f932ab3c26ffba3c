"""`grid view`: the board of a results directory in a browser of this machine, a page at a time, and
what its run is doing. Read-only, on loopback alone, and only for who names this machine."""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qs, urlsplit

from analysis.files import FilesChanged, listed
from analysis.leaderboard import Asked
from analysis.query import plain
from analysis.reader import Tables, read_tables
from analysis.report import report
from grid.campaign_status import campaign_status, campaign_status_words
from grid.places import CAMPAIGN_FILE, GRID_FILE
from grid.schema.columns import SCHEMAS
from grid.schema.status import STATUS_WORDS, Status
from grid.status import status_of
from grid.status_words import status_words
from victims.errors import GridError

HOST = "127.0.0.1"
OWN_NAMES = re.compile(r"(127\.0\.0\.1|localhost)(:\d{1,5})?", re.IGNORECASE)
ASSETS = {
    "/": ("view.html", "text/html"),
    "/view.js": ("view.js", "text/javascript"),
    "/view.css": ("view.css", "text/css"),
}
HEADINGS = {
    "attack": ("Attack", "text"),
    "rate": ("Rate", "rate"),
    "defense": ("Defense", "text"),
    "clean_top1": ("CA %", "percent"),
    "asr_top1": ("ASR %", "percent"),
    "asr_top1_low": ("ASR from", "percent"),
    "asr_top1_high": ("to", "percent"),
    "asr_clean_victim_top1": ("ASR of the clean victim %", "percent"),
    "lift_top1": ("Lift, points", "percent"),
    "r_acc": ("R-Acc %", "percent"),
    "relative_cost": ("Cost", "number"),
    "num_seeds": ("Seeds", "whole"),
    "status": ("Status", "status"),
}
"""The columns of a page: what people call them, and how their values are written."""
COLUMNS = tuple(HEADINGS)
FILTERS = ("attack", "defense", "status")
MOST_ROWS, KEPT_SECONDS = 500, 5.0
OWN_PAGES = (None, "same-origin", "none")
"""What a browser says of who asks, unless another page does: a newer one always says it."""
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:;"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
FRAMED = "frame-ancestors 'none'"
TRIES = 20
T = TypeVar("T")


class Busy(GridError):
    """A run writes faster than can be read."""


class Viewed:
    """A results directory as it was some seconds ago at most; one question at a time."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._lock, self._drawing = threading.Lock(), threading.Lock()
        self._without: dict[Path, str] = {}
        # After a first collision with a busy writer: what is held no merge can take away.
        self._in_memory = False
        self._tables: Tables | None = None
        self._opened = 0.0
        self._state: object = None
        self._sets: list[str] = []
        self._choices: dict[str, dict[str, list[str]]] = {}
        self._drawn: tuple[object, str] | None = None

    def rows(self, given: Mapping[str, str]) -> dict[str, Any]:
        """Some lines of the board. ``sort`` names a column, after a minus downwards; an attack, a
        defense or a status leaves those of others out."""
        offset, limit = _whole(given, "offset", 0), _whole(given, "limit", 100)
        eval_set, sort = given.get("set") or "report", given.get("sort", "")
        if sort.removeprefix("-") not in ("", *COLUMNS):
            raise GridError(f"no column {sort.removeprefix('-')!r}. There: {', '.join(COLUMNS)}.")
        where, values = ["eval_set = ?"], [eval_set]
        for name in FILTERS:
            if text := given.get(name, ""):
                where.append(f"{name} = ?")
                values.append(text)
        order = "position, attack, rate, defense"
        if sort:
            way = "DESC" if sort.startswith("-") else "ASC"
            order = f"{sort.removeprefix('-')} {way} NULLS LAST, {order}"
        listed = ", ".join(COLUMNS)
        some = f"FROM shown WHERE {' AND '.join(where)}"

        def asked(tables: Tables) -> tuple[list[str], int, list[tuple[Any, ...]]]:
            if eval_set not in self._choices:
                self._choices[eval_set] = _choices(tables, eval_set)
            (total,) = tables.query(f"SELECT count(*) {some}", *values).rows[0]
            found = tables.query(
                f"SELECT {listed} {some} ORDER BY {order} LIMIT ? OFFSET ?",
                *values,
                min(limit, MOST_ROWS),
                offset,
            ).rows
            return self._sets, total, found

        sets, total, found = self._read(asked)
        lines = [[plain(value) for value in row] for row in found]
        return {
            "columns": COLUMNS,
            "headings": [heading for heading, _ in HEADINGS.values()],
            "kinds": [kind for _, kind in HEADINGS.values()],
            "choices": self._choices.get(eval_set, {}),
            "words": STATUS_WORDS,
            "rows": lines,
            "total": total,
            "offset": offset,
            "sets": sets,
            "set": eval_set,
        }

    def status(self) -> dict[str, Any]:
        """What the run, or the campaign, is doing."""
        if not (self.directory / GRID_FILE).is_file():
            if (self.directory / CAMPAIGN_FILE).is_file():
                found = campaign_status(self.directory)
                words = campaign_status_words(found).splitlines()
                about = {"name": found["campaign"], "state": found["state"]}
                return {**about, "planned": 0, "ended": 0, "words": words, "running": []}
            raise GridError(f"{self.directory}: no run of a grid is there")
        found = status_of(self.directory)
        words = status_words(found).splitlines()
        waiting = ("running", Status.MISSING, Status.CANCELLED, Status.REQUEUED)
        ended = sum(n for state, n in found["cells"].items() if state not in waiting)
        return {
            "name": found["grid"],
            "state": found["state"],
            "planned": found["planned"],
            "ended": ended,
            "words": words,
            "running": [line for line in words if line.startswith(("running:", "submitted:"))],
        }

    def report(self) -> str:
        """The report as one page; the one drawn last, where nothing has been written since."""
        # Of tables of its own: it takes long, and pages of rows must not wait for it.
        with self._drawing:
            state = _state(self.directory)
            if self._drawn is None or self._drawn[0] != state:
                text = read_tables(self.directory, lambda tables: report(tables, Asked()))
                self._drawn = state, text
            return self._drawn[1]

    def close(self) -> None:
        with self._lock:
            self._forget()

    def _read(self, read: Callable[[Tables], T]) -> T:
        """What ``read`` makes of the results; looks again if a run has merged files meanwhile."""
        for _ in range(TRIES):
            with self._lock:
                try:
                    return read(self._open())
                except FilesChanged as changed:
                    self._without |= changed.damaged
                    self._forget()
                    self._in_memory = True
        raise Busy("files keep changing; try again")

    def _open(self) -> Tables:
        if self._tables is not None and time.monotonic() - self._opened <= KEPT_SECONDS:
            return self._tables
        state = _state(self.directory)
        if self._tables is None or state != self._state:
            self._forget()
            tables = Tables(self.directory, without=self._without, in_memory=self._in_memory)
            self._tables = tables
            # Once, and not for every page: of a hundred thousand cells a board takes seconds.
            tables.query("CREATE TABLE shown AS FROM board")
            self._sets = [name for (name,) in tables.query("FROM eval_sets ORDER BY 1").rows]
            self._state = state
        self._opened = time.monotonic()
        return self._tables

    def _forget(self) -> None:
        if self._tables is not None:
            self._tables.close()
            self._tables, self._choices = None, {}


def _state(directory: Path) -> object:
    """What tells whether anything was written since: the files, their sizes and times."""
    found = []
    for path in (directory / GRID_FILE, *(p for kind in SCHEMAS for p in listed(directory / kind))):
        with contextlib.suppress(OSError):  # merged meanwhile, or not there
            about = path.stat()
            found.append((path, about.st_size, about.st_mtime_ns))
    return found


def _choices(tables: Tables, eval_set: str) -> dict[str, list[str]]:
    """What a page can be asked to show alone."""
    listed = ", ".join(f"list(DISTINCT {name})" for name in FILTERS)
    (found,) = tables.query(f"SELECT {listed} FROM shown WHERE eval_set = ?", eval_set).rows  # noqa: S608
    return {name: sorted(filter(None, own or ())) for name, own in zip(FILTERS, found, strict=True)}


def _whole(given: Mapping[str, str], name: str, default: int) -> int:
    text = given.get(name, "")
    if text and not (text.isdecimal() and len(text) < 10):
        raise GridError(f"{name} is a whole number, found {text[:20]!r}")
    return int(text) if text else default


def serve(directory: Path, port: int) -> ThreadingHTTPServer:
    """A server on loopback, not yet serving; port 0 takes any that is free."""
    viewed = Viewed(directory)

    class Handler(BaseHTTPRequestHandler):
        server_version, sys_version = "grid-view", ""

        def do_GET(self) -> None:
            try:
                if not self._is_meant():
                    words = "this view is of one machine alone"
                    self._send(HTTPStatus.FORBIDDEN, "text/plain", words)
                    return
                self._try_to_answer()
            except ConnectionError:
                self.close_connection = True  # who asked is gone

        def _try_to_answer(self) -> None:
            status = HTTPStatus.BAD_REQUEST
            try:
                parts = urlsplit(self.path)
                given = {name: values[-1] for name, values in parse_qs(parts.query).items()}
            except ValueError as error:
                words = f"this address cannot be read: {error}"
            else:
                try:
                    self._answer(parts.path, given)
                    return
                except ConnectionError:
                    raise
                except Busy as error:
                    status, words = HTTPStatus.SERVICE_UNAVAILABLE, str(error)
                except GridError as error:
                    words = str(error)
                # Whatever it is, who looks at a page must be told, and the server goes on.
                except Exception as error:
                    status = HTTPStatus.INTERNAL_SERVER_ERROR
                    words = f"this cannot be answered: {type(error).__name__}: {error}"
            self._send(status, "application/json", json.dumps({"error": words}))

        def _answer(self, path: str, given: Mapping[str, str]) -> None:
            if path in ASSETS:
                name, kind = ASSETS[path]
                asset = resources.files("analysis") / "assets" / name
                self._send(HTTPStatus.OK, kind, asset.read_text("utf-8"))
            elif self.headers.get("Sec-Fetch-Site") not in OWN_PAGES:
                words = "another page asked for this: open the view itself"
                self._send(HTTPStatus.FORBIDDEN, "text/plain", words)
            elif path == "/status":
                self._send(HTTPStatus.OK, "application/json", json.dumps(viewed.status()))
            elif path == "/rows":
                self._send(HTTPStatus.OK, "application/json", json.dumps(viewed.rows(given)))
            elif path == "/report":
                # The page brings a policy of its own, which lets its own script alone run; that no
                # other page may frame it can be said here alone.
                self._send(HTTPStatus.OK, "text/html", viewed.report(), policy=FRAMED)
            else:
                body = json.dumps({"error": "nothing is here"})
                self._send(HTTPStatus.NOT_FOUND, "application/json", body)

        def _is_meant(self) -> bool:
            """Whether the browser asked for this machine by its own name: a page from elsewhere
            may have had its name point here."""
            return OWN_NAMES.fullmatch(self.headers.get("Host") or "") is not None

        def _send(self, status: HTTPStatus, kind: str, text: str, policy: str = POLICY) -> None:
            body = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.send_header("Content-Security-Policy", policy)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *values: Any) -> None:
            """Requests of one's own browser are no news."""

    server = ThreadingHTTPServer((HOST, port), Handler)
    server.daemon_threads = True
    return server
