"""The store on a real S3-compatible server: the same promises as on a disk, and few requests.

Every artefact lies in a bucket that two machines share; here they are two stores, each with a
cache of its own.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from grid.cache import pin_key
from grid.collect import DAY, collect
from grid.execution import Execution
from grid.executors import Executor, start_executor
from grid.run import run_grid
from grid.work import Ended, execute, is_machines
from tests.buckets import BUCKET, Asked, Bucket, serve_bucket
from tests.grids import call, numbers, records, run_serial, tiny_grid, write_grid_file
from tests.stages import Note
from victims.errors import UsageError
from victims.keys import content_key
from victims.patience import TRIES, Unreachable
from victims.recipe import Runtime
from victims.store import Damaged, Store

KEY = content_key("thing", "one")


SECRET = "".join(["wJalr", "XUtn", "FEMI"])
DRIVER = "AKIATESTING"
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": DRIVER,
    "AWS_SECRET_ACCESS_KEY": SECRET,
    "AWS_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@pytest.fixture(scope="module")
def server() -> Iterator[Bucket]:
    with pytest.MonkeyPatch.context() as patch:
        # Before anything asks: without credentials the client looks for a cloud around it.
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        with serve_bucket() as bucket:
            yield bucket


@pytest.fixture
def bucket(server: Bucket) -> Iterator[Bucket]:
    yield server
    server.refuses = lambda number, asked: False
    server.allow_only_known_users(after=10**9)


@pytest.fixture
def two(bucket: Bucket, tmp_path: Path) -> tuple[Store, Store]:
    """Two machines and one prefix."""
    return bucket.store(tmp_path.name, tmp_path / "here"), bucket.store(
        tmp_path.name, tmp_path / "there"
    )


def make(folder: Path) -> dict[str, Any]:
    (folder / "a.txt").write_text("alpha")
    (folder / "b.bin").write_bytes(bytes(1000))
    return {"rows": [1, 2]}


def never(folder: Path) -> dict[str, Any]:
    raise AssertionError("it was made although it was there")


def text_of(store: Store) -> str:
    return store.need(KEY).path("a.txt").read_text()


def put(text: str) -> Any:
    return lambda path: path.write_text(text)


def test_what_one_machine_publishes_another_reads(two: tuple[Store, Store]) -> None:
    here, there = two
    assert (KEY in there, there.get(KEY), there.keys("thing")) == (False, None, set())
    made = here.get_or_make(KEY, make)
    found = there.get_or_make(KEY, never)
    assert (made.meta, made.files) == (found.meta, found.files)
    assert text_of(there) == "alpha"
    assert found.folder.is_relative_to(there.cache)
    assert (KEY in there, there.keys("thing"), there.keys("other")) == (True, {KEY}, set())
    there.discard(KEY, "for the test")
    assert (KEY in here, here.keys("thing")) == (False, set())
    # What a warm process remembers is not taken for what is in the bucket.
    here.get_or_make(KEY, make)
    assert KEY in there
    # An emptied cache costs the way to the bucket and nothing else.
    shutil.rmtree(here.cache)
    assert text_of(here) == "alpha"


def test_objects_changed_behind_our_back(
    two: tuple[Store, Store], bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = two
    for content, says in ((b"alp", "3 bytes of 5"), (b"alphb", "does not match its digest")):
        made = here.get_or_make(KEY, make)
        name = f"{BUCKET}/{tmp_path.name}/data/{KEY}/{made.folder.name}/a.txt"
        bucket.replace(name, content)
        assert made.path("a.txt").read_text() == "alpha"  # our own copy was whole
        with pytest.raises(Damaged, match=says):
            text_of(there)
        assert KEY not in there
        here = bucket.store(tmp_path.name, here.cache)
    here.get_or_make(KEY, make)
    manifest = f"{BUCKET}/{tmp_path.name}/manifests/thing/{KEY}.json"
    bucket.replace(manifest, b"{")
    with pytest.raises(Damaged, match="unreadable manifest"):
        there.get(KEY)
    bucket.replace(manifest, b" " * 5000)
    monkeypatch.setattr("victims.store.MAX_BYTES", 4000)
    with bucket.counted() as asked, pytest.raises(Damaged, match="unreadable manifest"):
        there.get(KEY)
    assert asked["GET"] == 1
    assert text_of_again(there) == "alpha"


def text_of_again(store: Store) -> str:
    return store.get_or_make(KEY, make).path("a.txt").read_text()


def test_two_writers_of_one_key(two: tuple[Store, Store], bucket: Bucket, tmp_path: Path) -> None:
    here, there = two

    def overtaken(folder: Path) -> dict[str, Any]:
        there.get_or_make(KEY, make)
        return make(folder)

    first = here.get_or_make(KEY, overtaken)
    assert first.path("a.txt").read_text() == text_of(there) == "alpha"
    third = bucket.store(tmp_path.name, tmp_path / "third").need(KEY)
    assert third.folder.name == first.folder.name, "the later manifest wins"


def test_a_checkpoint_is_resumed_elsewhere(two: tuple[Store, Store], bucket: Bucket) -> None:
    here, there = two
    assert there.load_partial(KEY, "fit") is None
    here.save_partial(KEY, "fit", put("one"))
    here.save_partial(KEY, "fit", put("two"))
    found = there.load_partial(KEY, "fit")
    assert found is not None
    assert found.read_text() == "two"
    there.drop_partial(KEY)
    assert here.load_partial(KEY, "fit") is None
    with bucket.counted() as asked:
        there.drop_partial(KEY)
    assert not asked, "what was never begun needs no dropping"


def test_what_things_cost_in_requests(
    two: tuple[Store, Store], bucket: Bucket, tmp_path: Path
) -> None:
    """Each number once was larger: folders were made, sizes asked for, uploads done in parts."""
    here, there = two
    with bucket.counted() as asked:
        assert here.get(KEY) is None
    assert asked == {"HEAD": 1}
    with bucket.counted() as asked:
        here.get_or_make(KEY, make)
    assert asked == {"HEAD": 1, "PUT": 3}, "is it there; two files; the manifest"
    with bucket.counted() as asked:
        assert there.need(KEY).meta == {"rows": [1, 2]}
    assert asked == {"HEAD": 1, "GET": 1}, "to know of an artefact fetches none of its files"
    with bucket.counted() as asked:
        text_of(there)
        text_of(there)
    assert asked == {"HEAD": 1, "GET": 1}
    with bucket.counted() as asked:
        assert KEY in there
        there.keys("thing")
    assert asked == {"HEAD": 1, "LIST": 1}
    with bucket.counted() as asked:
        here.save_partial(KEY, "fit", put("one"))
    assert asked == {"PUT": 1}
    assert not [name for name in bucket.names(tmp_path.name) if name.endswith("/")]


def test_garbage_in_a_bucket_is_collected_once_no_upload_can_be_under_way(
    two: tuple[Store, Store], bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = two

    def overtaken(folder: Path) -> dict[str, Any]:
        there.get_or_make(KEY, make)
        return make(folder)

    pinned = here.get_or_make(KEY, overtaken)  # and the attempt that lost
    here.save_partial(KEY, "fit", put("of what is finished"))
    pin_key(here, KEY)
    unneeded, lost, stopped = (content_key("thing", n) for n in ("old", "lost", "stopped"))
    here.get_or_make(unneeded, make)
    bucket.replace(f"{BUCKET}/{tmp_path.name}/data/{lost}/{'0' * 12}/a.txt", b"half an upload")
    there.save_partial(stopped, "fit", put("of what no run needs"))
    before = bucket.names(tmp_path.name)

    def told(**options: Any) -> list[tuple[str, str]]:
        found = collect(bucket.store(tmp_path.name, tmp_path / "third"), [], **options)
        return sorted((item["key"], item["what"]) for item in found["garbage"])

    assert told() == [(unneeded, "artefact")], "nobody knows what still goes on"
    # Its files cannot be made to look a day old.
    monkeypatch.setattr("grid.collect.UPLOAD_SECONDS", -DAY)
    rests = [(KEY, "attempt"), (KEY, "checkpoint"), (lost, "attempt"), (stopped, "checkpoint")]
    every = sorted([(unneeded, "artefact"), *rests])
    assert told() == every
    assert bucket.names(tmp_path.name) == before, "a rehearsal"
    assert told(delete=True) == every
    left = [name for name in bucket.names(tmp_path.name) if not name.endswith("/")]
    folder = f"{BUCKET}/{tmp_path.name}"
    assert left == [
        *(f"{folder}/data/{KEY}/{pinned.folder.name}/{name}" for name in ("a.txt", "b.bin")),
        f"{folder}/manifests/thing/{KEY}.json",
        f"{folder}/pins/{KEY}.json",
        f"{folder}/store.json",
    ]
    assert text_of(bucket.store(tmp_path.name, tmp_path / "fourth")) == "alpha"
    assert told() == []


# --- addresses


def test_no_bucket_no_credentials_no_server(bucket: Bucket, tmp_path: Path) -> None:
    """One clear error each, which says nothing secret; a worker that meets it is not to blame."""
    with pytest.raises(UsageError, match="there is no such bucket; make it") as error:
        Store(bucket.uri("x", bucket="nowhere", user=f"AKIA:{SECRET}@"))
    assert SECRET not in str(error.value)
    bucket.allow_only_known_users(after=0)
    with pytest.raises(UsageError, match="access denied: set AWS_ACCESS_KEY_ID") as error:
        Store(bucket.uri("x"))
    assert isinstance(error.value, Unreachable)
    outcome = execute(Note("a", str(tmp_path), needs_ray=False), bucket.uri("x"), Runtime(), "")
    assert outcome.ended is Ended.INFRASTRUCTURE
    assert "access denied" in outcome.message


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("s3://", "no bucket in it; write s3://BUCKET/PREFIX"),
        ("s3:///prefix", "no bucket in it"),
        ("s3://b/p?endpoint=x", r"unknown option 'endpoint'.*Did you mean 'endpoint_override'"),
        ("s3://b/p?scheme=ftp", "http or https"),
        ("s3://b/p?SECRET", "must read name=value"),
        ("s3://SECRET@b/p?scheme=http", "KEY:SECRET"),
        ("s3a://u:SECRET@b/p", r"no file system is called 's3a'.* Did you mean 's3'"),
        ("file://folder/store", "three slashes"),
        ("hdfs://u:SECRET@/x?SECRET=1", "cannot be opened"),
    ],
)
def test_an_address_that_is_none(address: str, says: str) -> None:
    with pytest.raises(UsageError, match=says) as error:
        Store(address.replace("SECRET", SECRET))
    assert SECRET not in str(error.value)
    assert error.value.code == 2


def test_a_folder_by_uri_and_with_spaces(tmp_path: Path) -> None:
    folder = tmp_path / "my store?"
    Store(folder).get_or_make(KEY, make)
    for address in (f"file://{folder}", f"file://{folder}".replace(" ", "%20"), str(folder)):
        assert text_of(Store(address)) == "alpha"
        assert Store(address).local


@pytest.mark.exhaustive
def test_a_server_that_stays_away_is_the_machines_fault(bucket: Bucket, tmp_path: Path) -> None:
    """So the driver tries the stage again, and on another machine where there is one."""
    store = bucket.store(tmp_path.name, tmp_path / "here")
    store.patience.sleep = lambda seconds: None
    bucket.refuses = lambda number, asked: asked.method == "HEAD"
    with pytest.raises(Unreachable, match=r"s3://grids/.* does not answer, after 4 tries") as error:
        store.get(KEY)
    assert is_machines(error.value)
    assert "scheme=" not in str(error.value)


# --- grids


def slips(number: int, asked: Any) -> bool:
    """Answers 503 to one request now and then, and to a long row of them once."""
    return number % 7 == 0 or 40 <= number < 46


@pytest.mark.slow
def test_a_grid_in_a_faulty_bucket_has_the_numbers_of_one_on_disk(
    bucket: Bucket, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setenv("GRID_HOME", str(tmp_path / "home"))
    file = write_grid_file(tmp_path, defenses=["none"])
    bucket.refuses = slips
    uri = bucket.uri(f"{tmp_path.name}/grid", user=f"AKIATESTING:{SECRET}@")
    out = tmp_path / "out"
    words = ("run", file, "--out", out, "--store", uri, "--executor", "serial")
    done = call(capsys, *words)
    assert done.code == 0, done.err
    assert bucket.refused > 10
    run_serial(tiny_grid(tmp_path, defenses=["none"]), tmp_path / "calm", tmp_path / "store")
    assert numbers(out) == numbers(tmp_path / "calm")
    assert {a["outcome"] for a in records(out, "attempts")} == {"ok"}
    # Asked again, and for its plan, which is remembered with the store's address.
    again = call(capsys, *words)
    assert "nothing to run" in again.err
    plan = call(capsys, "plan", file, "--out", out, "--store", uri)
    assert " 0 to run" in plan.out
    said = done.out + done.err + again.out + again.err + plan.out + plan.err
    assert "store: s3://grids/" in said
    for secret in (SECRET, "AKIATESTING", "endpoint_override"):
        assert secret not in said
        for path in [p for p in out.rglob("*") if p.is_file()]:
            assert secret.encode() not in path.read_bytes(), path


@pytest.fixture
def apart_nodes(bucket: Bucket, tmp_path: Path) -> Iterator[dict[str, Path]]:
    """Two nodes that share nothing but the bucket: each has a home, and so a cache, of its own."""
    import ray
    from ray.cluster_utils import Cluster

    ray.shutdown()
    homes = {name: tmp_path / name for name in ("left", "right")}
    head = {"num_cpus": 0, "num_gpus": 0, "include_dashboard": False}
    made = Cluster(initialize_head=True, head_node_args=head)
    try:
        for home in homes.values():
            variables = {"GRID_HOME": str(home), "AWS_ACCESS_KEY_ID": f"AKIA{home.name.upper()}"}
            made.add_node(num_cpus=1, num_gpus=0, env_vars=variables)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RAY_ADDRESS", made.address)
            patch.setenv("GRID_HOME", str(tmp_path / "driver"))
            yield homes
    finally:
        ray.shutdown()
        made.shutdown()  # type: ignore[no-untyped-call]


@pytest.mark.exhaustive
@pytest.mark.timeout(900)
def test_nodes_that_share_nothing_but_the_bucket(
    apart_nodes: dict[str, Path], bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(name: str, execution: Execution, store: str, runtime: Runtime, logs: str) -> Executor:
        return start_executor(name, execution, store, runtime, "/nowhere/logs")

    monkeypatch.setattr("grid.scheduler.start_executor", start)
    grid, out, uri = tiny_grid(tmp_path), tmp_path / "out", bucket.uri(f"{tmp_path.name}/grid")
    bucket.refuses = lambda number, asked: number % 11 == 0
    said: list[str] = []
    report = run_grid(grid, out, uri, say=said.append)
    assert report.code == 0, said
    assert bucket.refused > 10
    # Both nodes worked, and each fetched what the other had made.
    files = {n: {p.name for p in h.glob("cache/*/*")} for n, h in apart_nodes.items()}
    assert all(len(keys) > 3 for keys in files.values()), files
    assert files["left"] & files["right"]
    assert len({row["pid"] for row in records(out, "stages")}) == 2
    run_serial(grid, tmp_path / "calm", tmp_path / "store")
    assert numbers(out) == numbers(tmp_path / "calm")
    # The driver's own cache is a cache: without it the board's rows are read again.
    shutil.rmtree(tmp_path / "driver")
    again = run_grid(grid, tmp_path / "again", uri, executor="serial", say=said.append)
    assert (again.code, again.stages_run) == (0, 0)
    assert numbers(tmp_path / "again") == numbers(out)


class Outage:
    """Once a certain request has come, its user is refused so many in a row."""

    def __init__(self, user: str, begins: Callable[[Asked], bool], length: int) -> None:
        self.user, self.begins, self.left = user, begins, length
        self.has_begun = False

    def __call__(self, number: int, asked: Asked) -> bool:
        if asked.user != self.user or not self.left:
            return False
        self.has_begun = self.has_begun or self.begins(asked)
        self.left -= self.has_begun
        return self.has_begun


# What one operation of a store asks before it gives up: each of its tries is three of Arrow's.
GIVES_UP = 3 * TRIES


@pytest.mark.exhaustive
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("apart_nodes")
def test_outages_of_a_node_and_of_the_driver_change_no_number(
    bucket: Bucket, tmp_path: Path
) -> None:
    """A node's stage fails and is tried again; the driver gives up, and a second run goes on."""
    grid, out, uri = tiny_grid(tmp_path), tmp_path / "out", bucket.uri(f"{tmp_path.name}/grid")
    said: list[str] = []
    # The second half of the node's outage is waited for.
    node = Outage("AKIALEFT", lambda asked: asked.method == "PUT", GIVES_UP + GIVES_UP // 2)
    driver = Outage(DRIVER, lambda asked: "/data/measure-" in asked.path, GIVES_UP)
    bucket.refuses = lambda number, asked: node(number, asked) or driver(number, asked)
    with pytest.raises(Unreachable, match="does not answer, after 4 tries"):
        run_grid(grid, out, uri, say=said.append)
    assert driver.left == 0
    report = run_grid(grid, out, uri, say=said.append)
    assert (report.code, node.left) == (0, 0), said
    attempts = records(out, "attempts")
    failed = [a for a in attempts if a["outcome"] != "ok"]
    assert len(failed) == 1
    assert failed[0]["outcome"] == "failed_infrastructure"
    assert "does not answer, after 4 tries" in failed[0]["error"]
    assert (failed[0]["key"], "ok") in {(a["key"], a["outcome"]) for a in attempts}
    run_serial(grid, tmp_path / "calm", tmp_path / "store")
    assert numbers(out) == numbers(tmp_path / "calm")
