"""``python -m benchmarks [NAME...] [--quick]``: measure, print a table with aims, write JSON.

The figures hold for a machine that does nothing else; the table says how busy this one was.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # Before torch is imported.

from benchmarks.common import Figure, Figures, Session, lines, machine

NAMES = (
    *("training", "overhead", "plan", "board", "augment", "stamps", "objectives"),
    *("scale", "schedule", "compact", "practice", "arithmetic", "campaign", "pipeline"),
    "heads",
)
RESULTS = Path("runs") / "benchmarks.json"
FIGURES = Path(__file__).parents[1] / "docs" / "figures"


def main_of(name: str, quick: bool) -> Callable[[], Figures]:
    """The benchmark of that name, as a function of nothing."""
    found: Callable[..., Figures] = importlib.import_module(f"benchmarks.{name}").main
    return _augment if name == "augment" else partial(found, quick=quick)


def _augment() -> Figures:
    found: Mapping[str, float] = importlib.import_module("benchmarks.augment").main()
    return {
        what: Figure(value=value, unit="x" if " over " in what else "/s")
        for what, value in found.items()
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if every benchmark ran; aims that were missed are marked, not errors."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--quick", action="store_true", help="smaller sizes, rougher figures")
    parser.add_argument("--json", type=Path, default=RESULTS, help=f"default {RESULTS}")
    parser.add_argument("--record", action="store_true", help="write docs/figures/NAME.json, too")
    given = parser.parse_args(arguments)
    if given.record and given.quick:
        parser.error("--record keeps figures for the documents, and those of --quick are none")
    unknown = [name for name in given.names if name not in NAMES]
    if unknown:
        parser.error(f"no benchmark called {unknown[0]!r}; there are {', '.join(NAMES)}")
    about, session = machine(), Session()
    print(f"{about['processor']}, {about['cores']} cores, commit {about['commit']}")
    for name in given.names or NAMES:
        session.run(name, main_of(name, given.quick))
        before, after = session.load[name]
        title = f"{name} (load {before:.1f} before, {after:.1f} after)"
        if name in session.failures:
            print(f"{title}\n  failed: {session.failures[name]}", file=sys.stderr)
        else:
            print("\n".join(lines(title, session.figures[name])), flush=True)
    session.write(given.json)
    print(f"written to {given.json}")
    for path in session.record(FIGURES) if given.record else ():
        print(f"written to {path}; `make docs` puts it into the documents")
    return 1 if session.failures else 0


if __name__ == "__main__":
    sys.exit(main())
