"""Jobs on the cores of this machine: processes that end with the one that started them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any

from victims.errors import GridError

# What a worker process knows of its pool: a number to count in, and whether to stop.
_pool: list[Any] = []
LOOK_SECONDS = 0.5


def _begin(counter: Any, stop: Any) -> None:
    """Runs in every worker first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, who says stop
    _pool[:] = [counter, stop]
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def tick() -> None:
    """One more row, from within a worker."""
    counter = _pool[0]
    with counter.get_lock():
        counter.value += 1


def stopped() -> bool:
    """Whether the pool wants no more, from within a worker."""
    return bool(_pool[1].is_set())


def map_locally(
    function: Callable[..., Any],
    arguments: Iterable[tuple[Any, ...]],
    workers: int,
    look: Callable[[int], None],
    preload: str,
) -> Generator[Any]:
    """``function(*one)`` for each of the arguments on so many processes; answers as they come.

    ``look`` hears twice a second how many rows the workers have counted. Who stops asking for
    answers stops the workers, which need no longer for it than for a row.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([preload])  # slow imports once, not once a worker
    counter, stop = context.Value("q", 0), context.Event()
    waiting, running = iter(arguments), set[Future[Any]]()
    pool = ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(counter, stop))
    try:
        while True:
            for one in islice(waiting, 2 * workers - len(running)):
                running.add(pool.submit(function, *one))
            if not running:
                return
            done, running = wait(running, LOOK_SECONDS, FIRST_COMPLETED)
            look(int(counter.value))
            for future in done:
                yield future.result()
    except BrokenProcessPool as error:
        raise GridError(
            "a worker process was killed, maybe for memory: the same command goes on where this"
            " one stopped; --workers takes fewer"
        ) from error
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)
