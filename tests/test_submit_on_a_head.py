"""Runs as jobs of real clusters on this machine, as the documents write it; takes minutes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from grid.handles import read_handle
from grid.jobs import DEFAULT_ADDRESS, Jobs
from tests.grids import (
    TINY,
    grid_command,
    numbers,
    outcomes,
    run_serial,
    tiny_grid,
    write_grid_file,
)
from tests.heads import ROOT, Head, free_port, started_head
from tests.processes import wait_for
from victims.errors import GridError
from victims.store import Store

pytestmark = [pytest.mark.exhaustive, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with started_head("--num-cpus=2") as running:
        yield running


def documented(document: str = "docs/clusters.md") -> str:
    """The line of a document that submits without a command of ours."""
    text = (ROOT / document).read_text()
    (line,) = re.findall(r"^RAY_AUTH_MODE=token ray job submit .*$", text, re.MULTILINE)
    return str(line)


def test_the_readme_submits_as_the_documents_do() -> None:
    """Its line is theirs but for the grid and the places, which a preset's defaults are."""
    short = documented("README.md").removesuffix(" demo")
    assert documented().startswith(f"{short} ")


def test_ray_job_submit_works_as_the_documents_write_it(head: Head, tmp_path: Path) -> None:
    file = write_grid_file(tmp_path / "code")
    file.rename(file.with_name("mine.yaml"))
    line = documented().replace(DEFAULT_ADDRESS, head.address)
    line = line.replace("/mnt/grid", str(tmp_path / "mnt"))
    assert head.address in line
    done = subprocess.run(
        ["bash", "-c", line],
        cwd=tmp_path / "code",
        env=head.variables,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    out = tmp_path / "mnt" / "runs" / "mine"
    assert {row["status"] for row in outcomes(out).values()} == {"ok"}
    run_serial(tiny_grid(tmp_path / "code"), tmp_path / "out", tmp_path / "store")
    there, here = numbers(out), numbers(tmp_path / "out")
    assert set(there) == set(here)


def test_a_run_is_submitted_followed_stopped_and_goes_on(
    head: Head,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slow = {**TINY["recipes"], "victim": {**TINY["recipes"]["victim"], "epochs": 8000}}
    file = write_grid_file(tmp_path / "elsewhere", recipes=slow)
    out, store, code = tmp_path / "out", tmp_path / "store", tmp_path / "code"
    code.mkdir()
    words: tuple[object, ...] = ("submit", file, "--address", head.address, "--working-dir", code)
    words += ("--out", out, "--store", store, "--only", "defense=none")
    done = head.grid(capsys, monkeypatch, *words)
    assert done.code == 0, done.err
    handle = read_handle(out / "job.json")
    assert done.out.strip() == handle.job
    assert handle.hash == tiny_grid(tmp_path / "elsewhere", recipes=slow).identity_hash
    assert head.token not in (out / "job.json").read_text()
    assert "preflight passed" in done.err
    assert "follow it with: grid job logs" in done.err
    # One at a time.
    again = head.grid(capsys, monkeypatch, *words)
    assert again.code == 1
    assert f"job {handle.job} runs on these results already (running)" in again.err
    jobs = Jobs(head.address)
    with pytest.raises(GridError, match="one run at a time"):
        jobs.submit(handle.job, "true", str(code), {})
    wait_for(lambda: any((out / "logs").glob("model-*.log")), 400)
    told = head.grid(capsys, monkeypatch, "job", "status", out)
    assert (told.code, told.err) == (0, f"job {handle.job} is running\n")
    began = time.monotonic()
    stopped = head.grid(capsys, monkeypatch, "job", "stop", out / "job.json")
    assert time.monotonic() - began < 60
    assert (stopped.code, stopped.err) == (
        0,
        f"job {handle.job} was stopped; submit the grid again to go on\n",
    )
    # It ended as with Ctrl-C, and said so.
    log = head.grid(capsys, monkeypatch, "job", "logs", out)
    assert "interrupted; the same command goes on" in log.out
    assert head.grid(capsys, monkeypatch, "job", "status", out).code == 3
    # The same folder again: another job, the same artefacts.
    made = set(Store(store).keys("corpus"))
    quick = {**TINY["recipes"]}
    file = write_grid_file(tmp_path / "elsewhere", recipes=quick)
    done = head.grid(capsys, monkeypatch, *words)
    assert done.code == 0, done.err
    assert done.out.strip() == handle.job.removesuffix("1") + "2"
    end = head.grid(capsys, monkeypatch, "job", "logs", out, "--follow")
    assert end.code == 0, end.out + end.err
    assert "succeeded" in end.err
    assert {row["status"] for row in outcomes(out).values()} == {"ok"}
    assert made <= set(Store(store).keys("corpus"))
    assert not list(store.glob("preflight-*"))


def test_what_a_cluster_cannot_do_is_said_first(
    head: Head,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    resources = {"model": {"gpus": 8}}
    file = write_grid_file(tmp_path, execution={**TINY["execution"], "resources": resources})
    (tmp_path / "file").touch()
    faults = {
        tmp_path / "file": (2, f"grid: exit code 2: --store {tmp_path / 'file'}: cannot be used"),
        tmp_path / "store": (1, "grid: exit code 1: stages of kind 'model' ask for 1 CPUs and 8 G"),
    }
    words: tuple[object, ...] = ("submit", file, "--address", head.address)
    words += ("--working-dir", tmp_path, "--out", tmp_path / "out")
    last = ""
    for store, (code, cause) in faults.items():
        done = head.grid(capsys, monkeypatch, *words, "--store", store)
        last = done.err.strip().splitlines()[-1]
        assert (done.code, last[: len(cause)]) == (code, cause), done.err
        assert "Traceback" not in done.err
    status = head.grid(capsys, monkeypatch, "job", "status", tmp_path / "out")
    assert (status.code, status.err.strip()) == (1, last)


@pytest.mark.parametrize(
    ("token", "says"),
    [("f" * 64, "does not take the token"), ("", "asks for a token, and there is none here")],
)
def test_a_token_that_is_wrong_or_missing(
    head: Head, tmp_path: Path, token: str, says: str
) -> None:
    variables = {**head.variables, "RAY_AUTH_TOKEN": token, "HOME": str(tmp_path)}
    if not token:
        del variables["RAY_AUTH_TOKEN"]
    done = subprocess.run(
        ["grid", "submit", "smoke", "--address", head.address],
        env=variables,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"grid: the cluster at {head.address} {says}"), done.stderr
    assert os.listdir(tmp_path) == []  # noqa: PTH208


def test_a_handle_of_a_cluster_that_forgot(
    head: Head,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = ("job", "grid", "hash", "out", "store", "submitted")
    body = {**dict.fromkeys(names, ""), "job": "grid-mine-1", "address": head.address}
    (tmp_path / "job.json").write_text(json.dumps(body))
    done = head.grid(capsys, monkeypatch, "job", "status", tmp_path)
    assert done.code == 1
    assert "knows no job grid-mine-1" in done.err


# The one type of head that Ray's provider for tests knows.
HEAD_TYPE = "ray.head.default"


def test_a_cluster_without_workers_grows_for_a_grid(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing but waiting stages tells an autoscaler to act: a run that only waited for a node
    to appear waited in vain."""
    port = free_port()
    types = {
        HEAD_TYPE: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "worker": {
            "resources": {"CPU": 1},
            "node_config": {},
            "min_workers": 0,
            "max_workers": 1,
        },
    }
    address = subprocess.run(
        ["hostname", "-I"], capture_output=True, text=True, check=True
    ).stdout.split()[0]
    provider = {"type": "fake_multinode", "launch_multiple": True, "disable_node_updaters": True}
    stages: tuple[str, ...] = ("setup", "head_setup", "worker_setup", "initialization")
    stages += ("head_start_ray", "worker_start_ray")
    config: dict[str, Any] = {
        **{f"{name}_commands": [] for name in stages},
        **{key: [] for key in ("rsync_exclude", "rsync_filter", "cluster_synced_files")},
        **{key: {} for key in ("file_mounts", "docker")},
        "file_mounts_sync_continuously": False,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": 5,
        "cluster_name": "grows",
        "max_workers": 1,
        "provider": {**provider, "gcs_address": f"{address}:{port}"},
        "auth": {"ssh_user": "x"},
        "head_node_type": HEAD_TYPE,
        "available_node_types": types,
    }
    file = tmp_path / "cluster.json"
    file.write_text(json.dumps(config))
    options = ("--num-cpus=0", f"--autoscaling-config={file}")
    with started_head(*options, gcs_port=port, RAY_FAKE_CLUSTER="1") as head:
        grid = write_grid_file(tmp_path / "code")
        asked = grid_command("plan", grid, "--cluster", f"{address}:{port}")
        plan = subprocess.run(
            asked, capture_output=True, text=True, env=head.variables, cwd=tmp_path, check=False
        )
        assert plan.returncode == 0, plan.stdout + plan.stderr
        assert "perhaps: stages of kind 'corpus' ask for 1 CPUs" in plan.stdout
        words: tuple[object, ...] = (
            "submit",
            grid,
            "--address",
            head.address,
            "--working-dir",
            tmp_path / "code",
        )
        words += ("--out", tmp_path / "out", "--store", tmp_path / "store")
        done = head.grid(capsys, monkeypatch, *words, "--only", "defense=none rate=0")
        assert done.code == 0, done.err
        assert "The cluster may grow" in done.err
        end = head.grid(capsys, monkeypatch, "job", "logs", tmp_path / "out", "--follow")
        assert end.code == 0, end.out + end.err
        assert len(outcomes(tmp_path / "out")) == 1
