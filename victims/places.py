"""Where a store is: what a path or a URI names, opened, and how it may be shown.

A URI may carry what nobody else should read, in its user part or behind its question mark. It is
shown through `shown` alone, everywhere: in messages, records, logs and files.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from victims.errors import UsageError, near

# What may stand behind the question mark of an S3 address. Credentials come from the environment.
S3_OPTIONS = ("endpoint_override", "region", "scheme")
SCHEMES = ("abfs", "file", "gs", "hdfs", "s3", "viewfs")
CONNECT_SECONDS, REQUEST_SECONDS = 10, 60


@dataclass(frozen=True, slots=True)
class Place:
    """An opened address: a folder of this machine, or a prefix of another file system."""

    root: str
    shown: str
    remote: Any = None  # a pyarrow.fs.FileSystem
    # The same for every spelling of the same place: with or without credentials, say.
    identity: str = ""


def is_uri(address: str) -> bool:
    return "://" in address


def shown(address: str | Path) -> str:
    """An address without what may be secret: no user part, and nothing behind the path."""
    text = str(address)
    if not is_uri(text):
        return text
    scheme, _, rest = text.partition("://")
    path = rest.split("?")[0].split("#")[0]
    # A password may hold a slash that nobody has escaped, so the last @ ends it.
    return f"{scheme}://{path.rpartition('@')[2]}"


def open_place(address: str) -> Place:
    """Open a path or a URI. What is no address of a store is said without its secrets."""
    if "\0" in address:
        raise UsageError(f"--store {address!r}: a path holds no NUL")
    if not is_uri(address):
        root = str(Path(address).resolve())
        return Place(root.rstrip("/"), address, identity=root)
    scheme = address.partition("://")[0]
    if scheme not in SCHEMES:
        raise UsageError(
            f"--store {shown(address)}: no file system is called {scheme!r}."
            f"{near(scheme, SCHEMES)} Known: {', '.join(SCHEMES)}, or a path without '://'."
        )
    if scheme == "file":
        return _folder(address)
    return _bucket(address) if scheme == "s3" else _other(address)


def _folder(address: str) -> Place:
    # Nothing but the path: a folder's name may hold a question mark.
    host, slash, path = address.removeprefix("file://").partition("/")
    if host not in ("", "localhost") or not slash:
        raise UsageError(
            f"--store {shown(address)}: a file URI has three slashes before an absolute path, such"
            " as file:///data/store; a relative path is given without file://"
        )
    root = str(Path(f"/{unquote(path)}").resolve())
    return Place(root.rstrip("/"), address, identity=root)


def _bucket(address: str) -> Place:
    """An S3 bucket, or one that speaks like S3 at ``endpoint_override``."""
    import pyarrow.fs as pafs

    where = shown(address)
    try:
        parts = urlsplit(address)
        given = dict(parse_qsl(parts.query, keep_blank_values=True, strict_parsing=True))
    except ValueError as error:
        given, parts = {}, urlsplit(where)
        if "?" in address:
            raise UsageError(
                f"--store {where}: what stands behind '?' must read name=value&name=value, with"
                f" {', '.join(S3_OPTIONS)} for names"
            ) from error
    for name in given:
        if name not in S3_OPTIONS:
            raise UsageError(
                f"--store {where}: unknown option {name!r}.{near(name, S3_OPTIONS)} Known:"
                f" {', '.join(S3_OPTIONS)}; credentials come from the environment"
                " (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)."
            )
    if given.get("scheme", "https") not in ("http", "https"):
        raise UsageError(f"--store {where}: scheme must be http or https")
    user, at, bucket = parts.netloc.rpartition("@")
    if not bucket:
        raise UsageError(f"--store {where}: no bucket in it; write s3://BUCKET/PREFIX")
    options: dict[str, Any] = {**given, **_credentials(user if at else "", where)}
    if "region" not in options and (region := _region(bucket, given)):
        options["region"] = region
    remote = pafs.S3FileSystem(
        **options,
        # Small files in one PUT instead of the three requests of an upload in parts.
        allow_delayed_open=True,
        connect_timeout=CONNECT_SECONDS,
        request_timeout=REQUEST_SECONDS,
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=3),
    )
    prefix = unquote(parts.path).strip("/")
    root = f"{bucket}/{prefix}" if prefix else bucket
    return Place(root, where, remote, f"s3 {given.get('endpoint_override', '')} {root}")


def _credentials(user: str, where: str) -> dict[str, str]:
    if not user:
        return {}
    name, colon, secret = user.partition(":")
    if not colon:
        raise UsageError(
            f"--store {where}: before the @ stand an access key and its secret, as KEY:SECRET;"
            " better, leave both to the environment"
        )
    return {"access_key": unquote(name), "secret_key": unquote(secret)}


def _region(bucket: str, given: Mapping[str, str]) -> str:
    """The region that a bucket of AWS's own is in, unless the environment names one."""
    import pyarrow.fs as pafs

    for name in ("AWS_REGION", "AWS_DEFAULT_REGION"):
        if os.environ.get(name):
            return os.environ[name]
    if given.get("endpoint_override") or os.environ.get("AWS_ENDPOINT_URL"):
        return ""
    try:
        return str(pafs.resolve_s3_region(bucket))
    except OSError as error:
        raise UsageError(
            f"--store s3://{bucket}: no such bucket at AWS, or AWS cannot be reached. Correct the"
            " name, set AWS_REGION, or give endpoint_override for another object store."
            f" ({str(error).strip()})"
        ) from error


def _other(address: str) -> Place:
    import pyarrow as pa
    import pyarrow.fs as pafs

    where = shown(address)
    try:
        remote, root = pafs.FileSystem.from_uri(address)
    except (pa.ArrowException, OSError, ValueError) as error:
        # What Arrow says may repeat the whole address.
        said = str(error).replace(address, where)
        if any(part in said for part in _secret_parts(address)):
            said = type(error).__name__
        raise UsageError(f"--store {where}: cannot be opened ({said})") from error
    return Place(root.rstrip("/"), where, remote, where)


def _secret_parts(address: str) -> list[str]:
    rest = address.partition("://")[2]
    path, _, query = rest.partition("?")
    user = path.rpartition("@")[0]
    return [part for part in (query, user, *user.split(":")) if part]
