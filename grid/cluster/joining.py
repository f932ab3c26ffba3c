"""The Ray cluster that this process joins, or starts: with our defaults, and said plainly if none
answers."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from victims.errors import GridError

# Ray's and Train's own defaults, unless the user has set the variable.
ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",
    "RAY_TRAIN_CALLBACKS": "grid.cluster.guard.ReservationGuard",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # The thread of a trial that was ended has so long to go away before its actor is used again;
    # with Tune's own 2 seconds, on a busy machine, the trial that waits for it fails.
    "TUNE_FUNCTION_THREAD_TIMEOUT_S": "60",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


def load_ray() -> Any:
    """Ray, with our defaults in the environment."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray

    return ray


def attach(ray: Any, options: dict[str, Any]) -> None:
    """Join a cluster: the one whose address is among the options, or that RAY_ADDRESS names."""
    address = options.get("address") or os.environ["RAY_ADDRESS"]
    host, colon, port = address.rpartition(":")
    try:
        if colon and port.isdigit() and "/" not in host:
            # Ray itself asks for minutes before it gives up.
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        ray.init(**options)
    except (OSError, RuntimeError, ValueError) as error:
        first = str(error).strip().split("\n")[0]
        named = "RAY_ADDRESS=" if address == os.environ.get("RAY_ADDRESS") else ""
        without = "unset RAY_ADDRESS to run on this machine alone" if named else "leave it out"
        raise GridError(
            f"no Ray cluster answers at {named}{address} ({first}). Start it, correct the address,"
            f" or {without}."
        ) from error


@contextlib.contextmanager
def joined(address: str) -> Iterator[None]:
    """This process as part of the cluster at an address, for work that is no grid's."""
    ray = load_ray()
    variables = {name: os.environ[name] for name in ENVIRONMENT}
    options = {"log_to_driver": False, "logging_level": "error", "address": address}
    is_ours = not ray.is_initialized()
    if is_ours:
        attach(ray, {**options, "runtime_env": {"env_vars": variables}})
        protect_token()
    try:
        yield
    finally:
        if is_ours:
            ray.shutdown()


def protect_token() -> None:
    """Ray writes its token readable by everyone; a Ray cluster is a shell."""
    token = Path.home() / ".ray" / "auth_token"
    with contextlib.suppress(OSError):
        if token.exists() and token.stat().st_mode & 0o077:
            token.chmod(0o600)
