"""Runs as jobs of a Ray cluster: what is refused before anything leaves, what travels, what is
said. `test_submit_on_a_head.py` does it."""

from __future__ import annotations

import shlex
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from grid import preflight, submit
from grid.handles import Handle, find_handle, read_handle
from grid.jobs import DEFAULT_ADDRESS, Jobs, JobState, choose_address
from grid.machines import Machine
from grid.progress import Progress
from grid.registry import grid_source
from tests.grids import call, tiny_grid, write_grid_file
from tests.heads import free_port
from victims.errors import GridError, UsageError
from victims.store import Store

# Where a token may go.


@pytest.fixture(autouse=True)
def _no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("given", "is_taken"),
    [
        ("http://127.0.0.1:8265", True),
        ("http://127.8.9.10:8265", True),
        ("http://[::1]:8265", True),
        ("http://localhost:8265/", True),
        ("https://ray.example.org", True),
        ("http://ray.example.org:8265", False),
        ("http://10.0.0.7:8265", False),
        ("http://127.0.0.1.example.org:8265", False),
        ("http://localhost@example.org:8265", False),
    ],
)
def test_a_token_leaves_the_machine_only_encrypted(given: str, is_taken: bool) -> None:
    if is_taken:
        assert choose_address(given, insecure=False).startswith(given.rstrip("/"))
        return
    with pytest.raises(UsageError, match=r"in clear|user name"):
        choose_address(given, insecure=False)
    if "@" not in given:
        assert choose_address(given, insecure=True) == given


@pytest.mark.parametrize(
    "given", ["127.0.0.1:8265", "ray://127.0.0.1:10001", "http://", "http://h:x", "http://h/a"]
)
def test_what_is_no_address_is_refused(given: str) -> None:
    with pytest.raises(UsageError, match="--address"):
        choose_address(given, insecure=True)


def test_the_address_given_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_address(None, insecure=False) == DEFAULT_ADDRESS
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.7:6379")  # of a cluster, not of its dashboard
    assert choose_address(None, insecure=False) == DEFAULT_ADDRESS
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:9")
    assert choose_address(None, insecure=False) == "http://127.0.0.1:9"
    assert choose_address("http://127.0.0.1:7", insecure=False) == "http://127.0.0.1:7"


def test_where_nothing_answers_is_said_with_what_to_do(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRID_HOME", str(tmp_path))
    done = call(capsys, "submit", "smoke", "--address", f"http://127.0.0.1:{free_port()}")
    assert done.code == 1
    assert done.err.startswith("grid: nothing answers at http://127.0.0.1:")
    assert "ray dashboard" in done.err
    assert list(tmp_path.iterdir()) == []


def test_a_cluster_that_asks_for_no_token_is_refused() -> None:
    class Open(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Open)
    serving = threading.Thread(target=server.serve_forever)
    serving.start()
    try:
        with pytest.raises(GridError, match="takes jobs from anybody"):
            Jobs(f"http://127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
        serving.join()
        server.server_close()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--out", "runs/mine"), "--out runs/mine: give an absolute path"),
        (("--store", "store"), "--store store: give an absolute path"),
        (("--address", "http://10.0.0.7:8265"), "or --insecure"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_asked(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], says: str
) -> None:
    done = call(capsys, "submit", "smoke", *words)
    assert done.code == 2
    assert says in done.err


# What travels.


def listing(folder: str) -> list[str]:
    """What Ray would pack of a folder."""
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import create_package

    target = Path(folder).parent / "package.zip"
    target.unlink(missing_ok=True)
    excludes = get_runtime_env_default_excludes()
    create_package(folder, target, include_gitignore=True, excludes=excludes)
    with zipfile.ZipFile(target) as packed:
        return sorted(name for name in packed.namelist() if not name.endswith("/"))


def test_a_grid_file_from_elsewhere_travels_with_what_is_not_ignored(tmp_path: Path) -> None:
    inside = write_grid_file(tmp_path / "code" / "grids")
    outside = write_grid_file(tmp_path / "elsewhere")
    code = tmp_path / "code"
    (code / ".gitignore").write_text("runs/\n")
    (code / "plugin.py").touch()
    for ignored in ("runs", ".venv"):
        (code / ignored).mkdir()
        (code / ignored / "large").touch()
    with submit.baggage(str(inside), code) as (folder, name):
        assert (folder, name) == (str(code), "grids/tiny.yaml")
    with submit.baggage("smoke", code) as (folder, name):
        assert (folder, name) == (str(code), "smoke")
    with submit.baggage(str(outside), code) as (folder, name):
        assert name == "submitted/tiny.yaml"
        assert Path(folder, name).read_bytes() == outside.read_bytes()
        assert listing(folder) == [
            ".gitignore",
            "grids/tiny.yaml",
            "plugin.py",
            "submitted/tiny.yaml",
        ]
    assert not Path(folder).exists()
    with pytest.raises(UsageError, match="--working-dir"), submit.baggage("smoke", code / "no"):
        pass


def test_the_command_survives_a_shell() -> None:
    words = submit.job_command("a b.yaml", "/o ut", "s3://b/p?x=1&y=2", "defense=none rate<0.02")
    options = ["--out", "/o ut", "--store", "s3://b/p?x=1&y=2", "--only", "defense=none rate<0.02"]
    assert shlex.split(words) == ["grid", "run", "a b.yaml", "--preflight", *options]
    assert shlex.split(submit.job_command("demo", None, None, None))[-1] == "--preflight"


def test_one_job_at_a_time_writes_to_a_folder() -> None:
    prefix = submit.job_prefix("my grid", "/mnt/runs/mine")
    assert prefix.startswith("grid-my-grid-")
    assert prefix == submit.job_prefix("my grid", "/mnt/runs/../runs/mine/")
    assert prefix != submit.job_prefix("my grid", "/mnt/runs/other")
    assert prefix != submit.job_prefix("my grid", None)
    ended = [JobState(f"{prefix}-{n}", "SUCCEEDED") for n in (1, 10, 9)]
    others = [JobState(f"{submit.job_prefix('other', None)}-7", "RUNNING")]
    assert submit.next_job(prefix, []) == f"{prefix}-1"
    assert submit.next_job(prefix, [*ended, *others]) == f"{prefix}-11"
    with pytest.raises(GridError, match=rf"{prefix}-11 runs on these results already \(pending\)"):
        submit.next_job(prefix, [*ended, JobState(f"{prefix}-11", "PENDING")])


def test_the_hash_is_that_of_the_grid_or_is_left_to_the_cluster(tmp_path: Path) -> None:
    file = write_grid_file(tmp_path)
    assert submit.grid_hash(grid_source(str(file))) == tiny_grid(tmp_path).identity_hash
    # Its pictures are on the cluster, and no error here.
    other = tmp_path / "files.yaml"
    other.write_text("data: {cifar10: {root: /mnt/grid/data}}\n")
    assert submit.grid_hash(grid_source(str(other))) == ""
    broken = write_grid_file(tmp_path / "broken", rates=[2])
    with pytest.raises(UsageError, match="rates"):
        submit.grid_hash(grid_source(str(broken)))


# The handle.

HANDLE = Handle(
    job="grid-mine-1",
    address="http://127.0.0.1:8265",
    grid="mine",
    hash="0123456789ab",
    out="/mnt/runs/mine",
    store="",
    submitted="2026-01-02T03:04:05+00:00",
)


def test_a_handle_is_found_by_every_name_of_its_run(tmp_path: Path) -> None:
    path = HANDLE.write(tmp_path / "mine")
    assert read_handle(path) == HANDLE
    for named in ("mine", "grids/mine.yaml", str(path), str(tmp_path / "mine")):
        assert find_handle(named, tmp_path) == path
    with pytest.raises(UsageError, match=r"'mien' was submitted.*Did you mean 'mine'\?"):
        find_handle("mien", tmp_path)
    assert submit.handle_folder(str(tmp_path / "there"), Path("x")) == tmp_path / "there"
    assert submit.handle_folder("/no/such/folder", Path("x")) == Path("x")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"job": "x"}'])
def test_a_file_that_is_no_handle(tmp_path: Path, text: str) -> None:
    path = tmp_path / "job.json"
    path.write_text(text)
    with pytest.raises(UsageError, match="not a handle of `grid submit`"):
        read_handle(path)


# What is said of an end.

BEGIN = "Running entrypoint for job j: grid run mine.yaml\n"
TRACE = (
    "Traceback (most recent call last):\n"
    '  File "x.py", line 1, in <module>\n    import nothing\n'
    "ModuleNotFoundError: No module named 'nothing'\n"
)


@pytest.mark.parametrize(
    ("code", "log", "says", "exits"),
    [
        (1, f"{BEGIN}a caution\ngrid: no tea left\n", "exit code 1: no tea left [job j]", 1),
        (1, f"{BEGIN}{TRACE}", "exit code 1: ModuleNotFoundError: No module named 'nothing'", 1),
        (2, f"{BEGIN}grid: mine.yaml:3: bad\n", "exit code 2: mine.yaml:3: bad", 2),
        (3, f"{BEGIN}a board\n", "exit code 3: the grid is not complete, or a method failed", 3),
        (4, f"{BEGIN}a board\n", "exit code 4: the victims of an attack failed their gate", 4),
        (127, f"{BEGIN}/bin/sh: 1: grid: not found\n", "(put the environment's bin folder", 1),
        (137, f"{BEGIN}", "exit code 137: it said nothing (killed, perhaps for want of", 1),
    ],
)
def test_the_first_word_about_a_failure_is_its_cause(
    code: int, log: str, says: str, exits: int
) -> None:
    state = JobState("j", "FAILED", "Job entrypoint command failed with exit code ...", code)
    words, exit_code = submit.verdict(state, log)
    assert says in words.splitlines()[0]
    assert exit_code == exits
    assert "Traceback" not in words


def test_a_job_whose_driver_never_started_says_why() -> None:
    state = JobState("j", "FAILED", f"runtime_env setup failed:\n{TRACE}", None)
    words, code = submit.verdict(state, "")
    assert words.startswith("ModuleNotFoundError: No module named 'nothing': job j failed before")
    assert code == 1
    assert submit.verdict(JobState("j", "STOPPED"), "")[1] == 3
    assert submit.verdict(JobState("j", "RUNNING"), "") == ("job j is running", 0)


def test_a_log_has_a_line_soon_and_then_one_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    """However often a run looks: a job's log is read by people, and kept."""
    now = [0.0]
    monkeypatch.setattr("grid.progress.time.monotonic", lambda: now[0])
    monkeypatch.setattr("sys.stderr.isatty", lambda: False)
    said: list[float] = []
    progress = Progress(10, lambda line: said.append(now[0]))
    for now[0] in (0.5 * tick for tick in range(2 * 3600 + 1)):
        progress.update(cells_left=5, stages_done=1, stages_planned=2, running=["a"])
    progress.close()
    assert said == [10.0 + 60.0 * minute for minute in range(60)]


# Nodes that are not fit: each with its cause and what to do.

NODE = Machine("id", "farm-7 (10.0.0.7)", 2.0)
SAME = {"Python": "3.11.7", "ray": "2.60.0", "ray[default]": "installed"}
FINE: dict[str, Any] = {"facts": SAME, "store": "", "cuda": "", "absent": []}


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (
            {**FINE, "facts": {**SAME, "Python": "3.12.1"}},
            "Python is 3.12.1, and 3.11.7 where the driver runs. Use one image",
        ),
        ({**FINE, "store": "OSError: read-only"}, "cannot write to the store /s (OSError: read"),
        ({**FINE, "cuda": "torch finds no CUDA device"}, "advertises 2 GPUs, and torch finds no"),
        ({**FINE, "absent": ["/data"]}, "cannot read /data, which the grid takes data from"),
        (ModuleNotFoundError("No module named 'grid'"), "this tool cannot be imported there"),
        (TimeoutError("no answer in 180 s"), "does not run a task (TimeoutError: no answer in"),
    ],
)
def test_a_node_that_is_not_fit_is_named_with_its_cause(answer: Any, says: str) -> None:
    (fault,) = preflight.own_faults(NODE, answer, SAME, "/s")
    assert fault.startswith(f"node {NODE.name}: {says}")
    assert preflight.own_faults(NODE, FINE, SAME, "/s") == []


def test_a_store_is_written_read_elsewhere_and_left_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "SHOW_SECONDS", 0.0)
    store = Store(tmp_path / "store")
    before = sorted(tmp_path.rglob("*"))
    data = [str(tmp_path), str(tmp_path / "data")]
    said = preflight.look_around(store.uri, "preflight-x/a", 0, data)
    assert said["absent"] == data[1:]
    assert (said["store"], said["cuda"]) == ("", "")
    assert said["facts"] == preflight.facts()
    assert preflight.read_back(store.uri, "preflight-x/a") == ""
    # Read and deleted: what another node does not find is not shared.
    assert preflight.read_back(store.uri, "preflight-x/a") == "it is not there"
    preflight._clean_up(store.uri, "preflight-x")
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "file").touch()
    assert preflight.look_around(str(tmp_path / "file"), "preflight-x/a", 0)["store"]


def test_data_are_looked_for_unless_the_store_has_what_is_made_of_them(tmp_path: Path) -> None:
    from grid.stages import CorpusStage, FileModelStage
    from victims.labelled_files import LabelledFiles
    from victims.models import ModelSpec
    from victims.pretrained import Weights

    spec = LabelledFiles(
        dataset="cifar10", root="/data/cifar", fingerprint="f", size=32, split="suspect", num_rows=1
    )
    corpus, weights = (
        CorpusStage(spec),
        FileModelStage(ModelSpec(), Weights(sha256="0" * 64, path="/w.safetensors")),
    )
    store = Store(tmp_path / "store")
    assert preflight.data_places([corpus, weights], store) == ["/data/cifar", "/w.safetensors"]
    store.get_or_make(corpus.key, lambda scratch: {})
    assert preflight.data_places([corpus, weights], store) == ["/w.safetensors"]


def test_the_same_check_without_a_cluster_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    done = call(capsys, "run", "smoke", "--preflight", "--executor", "serial")
    assert done.code == 2
    assert "--executor serial has none" in done.err


def test_a_store_s_user_part_would_stand_in_logs() -> None:
    with pytest.raises(UsageError, match="user part") as told:
        submit.check_places(None, "s3://ME:SECRET@bucket/store")
    assert "SECRET" not in str(told.value)
    submit.check_places(None, "s3://bucket/store@2")
