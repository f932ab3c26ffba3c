"""Stages for tests of executors: they leave a note of where they ran. Importable by workers."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from grid.stages import Bench, DefendStage
from victims.keys import Key, content_key
from victims.pulse import beat


@dataclass(frozen=True)
class Note:
    """Writes ``folder/name.json``, then sleeps, then fails if told to.

    With ``beats`` it shows signs of work while it sleeps.
    """

    name: str
    folder: str
    seconds: float = 0.0
    kind: str = "corpus"
    error: str = ""
    needs_ray: bool = True
    beats: bool = False

    @property
    def key(self) -> Key:
        return content_key("note", [self.name])

    @property
    def inputs(self) -> Sequence[Key]:
        return []

    family = "note"
    work = 1.0

    def run(self, bench: Bench) -> None:
        where: dict[str, object] = {"pid": os.getpid(), "device": bench.runtime.device}
        if self.needs_ray:
            import ray

            where |= {"node": ray.get_runtime_context().get_node_id(), "gpus": ray.get_gpu_ids()}
        where["began"] = time.time()
        note = Path(self.folder, f"{self.name}.json")
        note.write_text(json.dumps(where))
        end = time.monotonic() + self.seconds
        while (left := end - time.monotonic()) > 0:
            if self.beats:
                beat()
            time.sleep(min(left, 0.5 if self.beats else left))
        note.write_text(json.dumps({**where, "ended": time.time()}))
        if self.error:
            raise ValueError(self.error)


class Spilling(DefendStage):
    """A defense that asks for more memory than there is, at every attempt."""

    def run(self, bench: Bench) -> None:
        bytearray(1 << 60)


class Hanging(DefendStage):
    """A defense that shows no sign of work at its first attempt, and works at the second."""

    def run(self, bench: Bench) -> None:
        first = Path(bench.store.root, "hung")
        if not first.exists():
            first.touch()
            time.sleep(300)
        super().run(bench)


def turned(stage: DefendStage, into: type[DefendStage]) -> DefendStage:
    """The same defense, to the same key, that does something else besides."""
    return into(**{f.name: getattr(stage, f.name) for f in fields(stage)})


@dataclass(frozen=True)
class Spill(Note):
    """Asks for more memory than there is."""

    def run(self, bench: Bench) -> None:
        bytearray(1 << 60)
