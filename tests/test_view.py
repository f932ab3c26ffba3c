"""The view: pages of rows and live progress, on loopback alone, in a real browser."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pytest

from benchmarks.board import made_cells, write_results
from grid.view import Viewed, serve
from tests.boards import steady, write_board
from tests.finished import Finished
from tests.grids import call, environment, grid_command
from tests.processes import wait_for

if TYPE_CHECKING:
    from playwright.sync_api import Browser

ATTACKS = ("badnet", "blended", "sig")
HOSTILE = "<img src=x onerror=window.hit=1>"
ASR = {"none": steady(0.9), "finetune": steady(0.4), HOSTILE: steady(0.2)}


def listening(folder: Path) -> Iterator[ThreadingHTTPServer]:
    server = serve(folder, 0)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ThreadingHTTPServer]:
    folder = tmp_path_factory.mktemp("board")
    rates = [f"{i / 1000:g}" for i in range(1, 41)]
    write_board(folder, ASR, attacks=ATTACKS, rates=rates, seeds=[0])
    yield from listening(folder)


@pytest.fixture
def live(finished: Finished) -> Iterator[ThreadingHTTPServer]:
    yield from listening(finished.out)


def ask(server: ThreadingHTTPServer, path: str, host: str | None = None) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    headers = {} if host is None else {"Host": host}
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    is_json = (answer.getheader("Content-Type") or "").startswith("application/json")
    return answer.status, json.loads(text) if is_json else text


def test_rows_come_a_page_at_a_time(board: ThreadingHTTPServer) -> None:
    code, first = ask(board, "/rows?limit=50")
    assert (code, first["total"], len(first["rows"])) == (200, 360, 50)
    _, last = ask(board, "/rows?limit=50&offset=350")
    assert len(last["rows"]) == 10
    place = first["columns"].index("asr_top1")
    _, small = ask(board, "/rows?sort=asr_top1&limit=3")
    assert [row[place] for row in small["rows"]] == [0.2] * 3
    _, large = ask(board, "/rows?sort=-asr_top1&limit=3")
    assert [row[place] for row in large["rows"]] == [0.9] * 3
    _, some = ask(board, f"/rows?attack=sig&defense={quote(HOSTILE)}")
    assert some["total"] == 40
    assert {row[0] for row in some["rows"]} == {"sig"}
    assert some["choices"]["attack"] == sorted(ATTACKS), "lists offer what a filter can take"
    assert dict(zip(some["columns"], some["headings"], strict=True))["asr_top1"] == "ASR %"
    assert ask(board, "/rows?limit=9999")[1]["rows"] == ask(board, "/rows?limit=500")[1]["rows"]


@pytest.mark.parametrize(
    ("path", "code", "says"),
    [
        ("/rows?sort=asr_top1;drop", 400, "no column"),
        ("/rows?offset=-1", 400, "offset is a whole number"),
        ("/rows?limit=99999999999", 400, "limit is a whole number"),
        ("/rows?attack=%27%20OR%201=1%20--", 200, ""),
        ("/../../etc/passwd", 404, "nothing is here"),
        ("/rows.parquet", 404, "nothing is here"),
        ("/status", 400, "no run of a grid is there"),
    ],
)
def test_what_is_asked_amiss_is_refused(
    path: str, code: int, says: str, board: ThreadingHTTPServer, tmp_path: Path
) -> None:
    if path == "/status":
        for server in listening(tmp_path):
            assert says in ask(server, path)[1]["error"]
        return
    found, answer = ask(board, path)
    assert found == code
    assert says in json.dumps(answer)
    if code == 200:
        assert answer["total"] == 0, "what is typed is a text and no SQL"


@pytest.mark.parametrize(
    ("host", "code"),
    [
        *[(name, 200) for name in ("localhost", "127.0.0.1", "LOCALHOST:PORT", "127.0.0.1:PORT")],
        *[(name, 403) for name in ("evil.example:80", "evil.example", "localhost.evil.example")],
        *[(name, 403) for name in ("127.0.0.1:x:y", "127.0.0.1@evil.example", "")],
    ],
)
def test_only_this_machine_is_answered(host: str, code: int, board: ThreadingHTTPServer) -> None:
    assert board.server_address[0] == "127.0.0.1"
    assert ask(board, "/rows", host=host.replace("PORT", str(board.server_port)))[0] == code


def test_whatever_happens_is_answered(
    board: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = f"localhost:{board.server_port}"
    with socket.create_connection(("127.0.0.1", board.server_port), timeout=60) as connection:
        connection.sendall(f"GET http://[/x HTTP/1.0\r\nHost: {own}\r\n\r\n".encode())
        head, _, body = connection.makefile().read().partition("\n\n")
    assert head.startswith("HTTP/1.0 400")
    assert "this address cannot be read" in json.loads(body)["error"]

    def broken(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(Viewed, "rows", broken)
    assert ask(board, "/rows") == (500, {"error": "this cannot be answered: RuntimeError: a bug"})


def test_another_page_can_start_nothing_and_frame_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image of /report on any page had a report drawn."""
    drawn: list[object] = []

    def draw(*given: object) -> str:
        drawn.append(given)
        return "the report"

    monkeypatch.setattr("grid.view.report", draw)
    write_board(tmp_path, ASR, attacks=ATTACKS[:1], seeds=[0])
    for server in listening(tmp_path):

        def asked(path: str, site: str, port: int = server.server_port) -> tuple[int, str | None]:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            connection.request("GET", path, headers={"Sec-Fetch-Site": site})
            answer = connection.getresponse()
            answer.read()
            connection.close()
            return answer.status, answer.getheader("Content-Security-Policy")

        for site in ("cross-site", "same-site"):
            assert {asked(path, site)[0] for path in ("/report", "/rows", "/status")} == {403}
            assert asked("/", site)[0] == 200, "a link may lead here"
        assert not drawn
        assert asked("/report", "same-origin") == (200, "frame-ancestors 'none'")
        assert asked("/report", "none")[0] == 200
        assert len(drawn) == 1, "nothing was written since"


def test_pages_of_results_that_stay_are_read_once(tmp_path: Path) -> None:
    """Every page of a hundred thousand cells made the whole board again, three times."""
    write_board(tmp_path, ASR, attacks=ATTACKS[:2], seeds=[0])
    viewed = Viewed(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("grid.view.KEPT_SECONDS", -1.0)
        before = viewed.rows({})["total"]
        tables = viewed._tables
        assert viewed.rows({"sort": "-asr_top1"})["total"] == before
        assert viewed._tables is tables
        write_board(tmp_path, ASR, attacks=ATTACKS[:3], seeds=[0])
        assert viewed.rows({})["total"] > before
        assert viewed._tables is not tables
    viewed.close()


def test_rows_do_not_wait_for_a_report(
    board: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_drawing, may_end = threading.Event(), threading.Event()

    def slow(*_: object) -> str:
        is_drawing.set()
        assert may_end.wait(60)
        return "the report"

    monkeypatch.setattr("grid.view.report", slow)
    answers: list[Any] = []
    asking = threading.Thread(target=lambda: answers.append(ask(board, "/report")))
    asking.start()
    try:
        assert is_drawing.wait(60)
        assert ask(board, "/rows?limit=1")[0] == 200
        assert answers == []
    finally:
        may_end.set()
        asking.join()
    assert answers == [(200, "the report")]


def test_a_finished_run_tells_its_progress(live: ThreadingHTTPServer) -> None:
    code, found = ask(live, "/status")
    assert code == 200
    assert (found["planned"], found["ended"], found["state"]) == (4, 4, "ended")
    code, text = ask(live, "/report")
    assert code == 200
    assert "Where defenses stand" in text


def test_the_command_serves_until_it_is_interrupted(finished: Finished) -> None:
    with subprocess.Popen(
        grid_command("view", finished.out, "--port", "0"),
        env=environment(PYTHONUNBUFFERED="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            address = process.stdout.readline().strip()
            assert address.startswith("http://127.0.0.1:")
            port = int(address.rstrip("/").rpartition(":")[2])
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            connection.request("GET", "/")
            assert connection.getresponse().status == 200
            connection.close()
        finally:
            process.send_signal(signal.SIGINT)
        wait_for(lambda: process.poll() is not None)
        assert process.communicate()[1] == "", "it is how a view ends, and no mishap"
    assert process.returncode == 0


def test_a_port_that_is_taken_is_said(
    board: ThreadingHTTPServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = call(capsys, "view", tmp_path, "--port", board.server_port)
    assert (done.code, "give another --port" in done.err) == (2, True)
    assert call(capsys, "view", tmp_path / "nowhere").code == 2


def test_a_browser_pages_sorts_and_filters(
    browser: Browser, board: ThreadingHTTPServer, tmp_path: Path
) -> None:
    from playwright.sync_api import expect

    heard: list[str] = []
    own = f"http://127.0.0.1:{board.server_port}/"
    context = browser.new_context()
    shown = context.new_page()
    shown.on("pageerror", lambda error: heard.append(str(error)))
    shown.on("request", lambda request: heard.append(request.url))
    shown.goto(own)
    place = shown.locator("#place")
    expect(shown.locator("#rows tr")).to_have_count(100)
    expect(place).to_have_text("1 to 100 of 360")
    shown.locator("#on").click()
    expect(place).to_have_text("101 to 200 of 360")
    shown.locator("thead button", has_text="ASR %").first.click()
    expect(shown.locator("th[aria-sort=ascending]")).to_have_count(1)
    expect(place).to_have_text("1 to 100 of 360")
    assert shown.locator("#rows tr").first.locator("td").nth(2).inner_text() == HOSTILE
    assert shown.locator("#rows tr").first.locator("td").nth(4).inner_text() == "20.0"
    assert shown.locator("#rows tr").first.locator("td").nth(1).inner_text() == "0.1 %"
    shown.locator("select[name=attack]").select_option("sig")
    expect(place).to_have_text("1 to 100 of 120")
    assert shown.locator("#back").inner_text() == "Previous"
    assert shown.evaluate("window.hit") is None
    context.close()
    assert [said for said in heard if not said.startswith((own, "data:"))] == []


@pytest.mark.exhaustive
def test_a_hundred_thousand_cells_are_paged_in_seconds(tmp_path: Path) -> None:
    write_results(tmp_path, "made", "0" * 12, made_cells(100_000), 27)
    for server in listening(tmp_path):
        began = time.monotonic()
        _, first = ask(server, "/rows")
        opened = time.monotonic() - began
        assert first["total"] == 20_000
        began = time.monotonic()
        _, second = ask(server, "/rows?offset=19900&sort=-asr_top1")
        assert len(second["rows"]) == 100
        assert opened < 60
        assert time.monotonic() - began < 20
