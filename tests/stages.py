"""Stages for tests of executors: they leave a note of where they ran. Importable by workers."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from grid.stages import Bench
from victims.keys import Key, content_key


@dataclass(frozen=True)
class Note:
    """Writes ``folder/name.json``, then sleeps, then fails if told to."""

    name: str
    folder: str
    seconds: float = 0.0
    kind: str = "corpus"
    error: str = ""
    needs_ray: bool = True

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
        Path(self.folder, f"{self.name}.json").write_text(json.dumps(where))
        time.sleep(self.seconds)
        if self.error:
            raise ValueError(self.error)
