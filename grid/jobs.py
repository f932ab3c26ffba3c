"""Ray's Jobs API, from outside a cluster: submit, look, read the log, stop.

A Ray cluster is a shell for whoever reaches this API, so an address is taken only if the token
that goes there stays on this machine or is encrypted, and a cluster only if it asks for one.
Nothing here starts or joins a cluster.
"""

from __future__ import annotations

import http.client
import ipaddress
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from victims.errors import GridError, UsageError

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
# Ray lets these overrule the address that it is given.
OVERRULING = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
ANSWER_SECONDS = 30.0
# How long a forwarded port or a busy head may be silent while a job is followed.
SILENT_SECONDS = 120.0
# Ray tells of every step of an upload, on the terminal.
CHATTY = ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk")
ENDED = frozenset({"SUCCEEDED", "FAILED", "STOPPED"})
FORWARD = (
    "Forward its port (`ray dashboard cluster.yaml`, `kubectl port-forward`, or"
    " `ssh -L 8265:127.0.0.1:8265 HEAD`) and leave --address out"
)


class Silent(GridError):
    """A cluster that was reached before does not answer now."""


@dataclass(frozen=True, slots=True)
class JobState:
    """Where a job stands. ``code`` is the driver's own exit code, None before it has ended."""

    id: str
    status: str
    message: str = ""
    code: int | None = None
    started: float | None = None

    @property
    def has_ended(self) -> bool:
        return self.status in ENDED


def choose_address(given: str | None, insecure: bool) -> str:
    """The address of the Jobs API: as given, from the environment, or of a forwarded port."""
    named = [os.environ.get(name, "") for name in OVERRULING]
    from_environment = next((value for value in named if "://" in value), "")
    address = (given or from_environment or DEFAULT_ADDRESS).rstrip("/")
    parts = urlsplit(address)
    try:
        port = parts.port
    except ValueError as error:
        raise UsageError(f"--address {address}: {error}") from error
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.path or parts.query:
        raise UsageError(
            f"--address {address}: expected http://HOST:PORT of the head's dashboard, such as"
            f" {DEFAULT_ADDRESS}, or https://HOST"
        )
    if parts.username or parts.password:
        raise UsageError(
            "--address holds a user name or a password, which would be written to files. The token"
            " of a cluster goes into RAY_AUTH_TOKEN, or into ~/.ray/auth_token."
        )
    if parts.scheme == "http" and not _is_loopback(parts.hostname) and not insecure:
        raise UsageError(
            f"--address {address}: the token would cross the network in clear, and who reads it"
            f" owns the cluster. {FORWARD}; or give an https:// address, or --insecure."
        )
    default = 443 if parts.scheme == "https" else 80
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{parts.scheme}://{host}:{port or default}"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@contextmanager
def _our_address() -> Iterator[None]:
    """Without the variables by which Ray would go elsewhere."""
    kept = {name: os.environ.pop(name) for name in OVERRULING if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def _status_without_token(address: str) -> int:
    """What the cluster answers somebody who shows no token."""
    parts = urlsplit(address)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname or "", parts.port, timeout=ANSWER_SECONDS)
    try:
        connection.request("GET", "/api/version")
        return connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        raise GridError(
            f"nothing answers at {address} ({type(error).__name__}: {error}). Is the cluster up,"
            f" with ray[default] on its head? {FORWARD}."
        ) from error
    finally:
        connection.close()


class Jobs:
    """The jobs of one cluster, reached and let in."""

    def __init__(self, address: str, insecure: bool = False) -> None:
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        self.address = address
        try:
            import aiohttp  # noqa: F401
            import ray
            from ray.job_submission import JobSubmissionClient
        except ImportError as error:
            raise GridError(
                f"jobs need ray[default] on this machine, too ({error}). Run pip install"
                " 'ray[default,train,tune]' with the version of the cluster."
            ) from error
        for name in CHATTY:
            logging.getLogger(name).setLevel(logging.WARNING)
        status = _status_without_token(address)
        if status == 200 and not insecure:
            raise GridError(
                f"the cluster at {address} takes jobs from anybody. Start it again with"
                " RAY_AUTH_MODE=token and a token, or give --insecure."
            )
        try:
            with _our_address():
                self._client: Any = JobSubmissionClient(address)
        except Exception as error:
            raise self._refused(error) from error
        there = str(getattr(self._client, "_server_ray_version", None))
        if there != ray.__version__:
            raise GridError(
                f"Ray is {ray.__version__} here and {there} on the head at {address}. Install"
                f" ray[default,train,tune]=={there} here, or start the cluster with the other."
            )

    def _refused(self, error: Exception) -> GridError:
        kind, first = type(error).__name__, (str(error).strip().splitlines() or [""])[0]
        if kind != "AuthenticationError":
            return GridError(f"the cluster at {self.address} does not answer: {kind}: {first}")
        if "couldn't find" in first:
            return GridError(
                f"the cluster at {self.address} asks for a token, and there is none here. Put the"
                " cluster's into ~/.ray/auth_token (chmod 600), or into RAY_AUTH_TOKEN."
            )
        return GridError(
            f"the cluster at {self.address} does not take the token of this machine. It must be"
            " the one that the cluster was started with: look at RAY_AUTH_TOKEN,"
            " RAY_AUTH_TOKEN_PATH and ~/.ray/auth_token, in this order."
        )

    def _ask(self, what: Callable[[], Any], job: str = "") -> Any:
        """A request, its failures in words."""
        try:
            return what()
        except Exception as error:
            text = str(error)
            if job and "status code 404" in text:
                raise GridError(
                    f"the cluster at {self.address} knows no job {job}. It forgets jobs when it is"
                    " started again; the results that were written are still there."
                ) from error
            if type(error).__name__ == "AuthenticationError":
                raise self._refused(error) from error
            first = (text.strip().splitlines() or [""])[0]
            raise Silent(
                f"the cluster at {self.address} does not answer ({type(error).__name__}: {first})."
                f" A job that was submitted goes on. {FORWARD}."
            ) from error

    def submit(self, job: str, command: str, folder: str, variables: Mapping[str, str]) -> None:
        """Start ``command`` on the head, in a copy of ``folder``; a job's name is used once."""
        try:
            self._client.submit_job(
                entrypoint=command,
                submission_id=job,
                runtime_env={"working_dir": folder, "env_vars": dict(variables)},
            )
        except Exception as error:
            text = str(error).strip()
            if "already exists" in text:
                raise GridError(
                    f"job {job} was submitted by somebody else just now; one run at a time writes"
                    " to a results folder. Follow that one, or give another --out."
                ) from error
            if "status code 413" in text or "exceed" in text:
                raise UsageError(
                    f"--working-dir {folder}: larger than the 100 MiB that a job may send. Name"
                    " what is not code in a .gitignore there, or give another --working-dir."
                ) from error
            first = (text.splitlines() or [""])[0]
            raise GridError(
                f"the cluster at {self.address} refused the job ({type(error).__name__}: {first})"
            ) from error

    def states(self) -> list[JobState]:
        """Every submitted job that the cluster remembers."""
        found = self._ask(self._client.list_jobs)
        return [_state(details) for details in found if details.submission_id]

    def state(self, job: str) -> JobState:
        return _state(self._ask(lambda: self._client.get_job_info(job), job))

    def log(self, job: str) -> str:
        """All that the job has said so far."""
        return str(self._ask(lambda: self._client.get_job_logs(job), job))

    def stop(self, job: str, seconds: float) -> JobState:
        """End a job, and wait until it has."""
        if not self.state(job).has_ended:
            self._ask(lambda: self._client.stop_job(job), job)
        end = time.monotonic() + seconds
        while not (state := self.state(job)).has_ended:
            if time.monotonic() > end:
                raise GridError(
                    f"job {job} has not ended {seconds:.0f} s after it was told to. Look again with"
                    " grid job status."
                )
            time.sleep(0.5)
        return state

    def follow(
        self, job: str, say: Callable[[str], None], until: str = "", seconds: float = 2.0
    ) -> JobState:
        """Hand on what a job says, line by line, until it ends, or has said ``until``."""
        told, answered = 0, time.monotonic()
        while True:
            try:
                state = self.state(job)
                lines = self.log(job).split("\n")
            except Silent:
                if time.monotonic() - answered > SILENT_SECONDS:
                    raise
                time.sleep(seconds)
                continue
            answered = time.monotonic()
            # The last one may not be whole yet.
            new = lines[told:] if state.has_ended else lines[told:-1]
            told += len(new)
            for line in new:
                if line or not state.has_ended:
                    say(line)
            if state.has_ended or (until and any(until in line for line in new)):
                return state
            time.sleep(seconds)


def _state(details: Any) -> JobState:
    return JobState(
        id=str(details.submission_id),
        status=str(getattr(details.status, "value", details.status)),
        message=details.message or "",
        code=details.driver_exit_code,
        started=details.start_time / 1000 if details.start_time else None,
    )
