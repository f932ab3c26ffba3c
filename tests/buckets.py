"""An S3-compatible object store on loopback: moto's, behind a layer that counts and misbehaves."""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.request import Request, urlopen

import pyarrow.fs as pafs

from victims.store import Store

BUCKET = "grids"


class Asked(NamedTuple):
    """One request."""

    method: str
    path: str
    query: str
    user: str = ""

    @property
    def what(self) -> str:
        """GET of an object and GET of a listing are two things."""
        return "LIST" if "list-type" in self.query else self.method


class Bucket:
    """A running server with one bucket, and what was asked of it."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.asked: list[Asked] = []
        # Whether to answer this request, by its number, with 503.
        self.refuses: Callable[[int, Asked], bool] = lambda number, asked: False
        self.refused = 0

    @property
    def endpoint(self) -> str:
        return f"127.0.0.1:{self.port}"

    def uri(self, prefix: str, user: str = "", bucket: str = BUCKET) -> str:
        return f"s3://{user}{bucket}/{prefix}?endpoint_override={self.endpoint}&scheme=http"

    def store(self, prefix: str, cache: Path) -> Store:
        return Store(self.uri(prefix), cache=cache)

    def files(self) -> Any:
        """The bucket behind a store's back."""
        return pafs.S3FileSystem(
            endpoint_override=self.endpoint, scheme="http", allow_bucket_creation=True
        )

    def names(self, prefix: str) -> list[str]:
        """Every object below a prefix, empty ones that stand for folders included."""
        selector = pafs.FileSelector(f"{BUCKET}/{prefix}", recursive=True, allow_not_found=True)
        found = self.files().get_file_info(selector)
        return sorted(info.path for info in found if info.type == pafs.FileType.File)

    def replace(self, name: str, content: bytes) -> None:
        with self.files().open_output_stream(name) as file:
            file.write(content)

    @contextmanager
    def counted(self) -> Iterator[Counter[str]]:
        """What is asked within the block, by method."""
        before, found = len(self.asked), Counter[str]()
        yield found
        found.update(asked.what for asked in self.asked[before:])

    def allow_only_known_users(self, *, after: int) -> None:
        """Check who asks, after so many requests."""
        url = f"http://{self.endpoint}/moto-api/reset-auth"
        plain = {"Content-Type": "text/plain"}
        request = Request(url, data=str(after).encode(), headers=plain, method="POST")
        urlopen(request).close()  # noqa: S310


Wsgi = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


@contextmanager
def serve_bucket() -> Iterator[Bucket]:
    """A server for the length of the block; it listens on loopback alone."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Silent(WSGIRequestHandler):
        def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
            """Say nothing."""

    backend: Wsgi = DomainDispatcherApplication(create_backend_app)

    def layer(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        method, path = str(environ["REQUEST_METHOD"]), str(environ["PATH_INFO"])
        signed = re.search(r"Credential=([^/]+)/", str(environ.get("HTTP_AUTHORIZATION", "")))
        user = signed[1] if signed else ""
        asked = Asked(method, path, str(environ.get("QUERY_STRING", "")), user)
        if not path.startswith("/moto-api"):
            bucket.asked.append(asked)
            if bucket.refuses(len(bucket.asked), asked):
                bucket.refused += 1
                start("503 Slow Down", [("Content-Length", "0")])
                return [b""]
        return backend(environ, start)

    server = make_server("127.0.0.1", 0, layer, threaded=True, request_handler=Silent)
    bucket = Bucket(server.server_port)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        bucket.files().create_dir(BUCKET)
        yield bucket
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
