"""The run, the cell and the store that an export names: found, or missed, before torch is there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from grid.chains import Chains, ListedCell, read_chains
from grid.places import GRID_FILE, home
from victims.errors import UsageError, near
from victims.places import is_uri, shown


@dataclass(frozen=True, slots=True, kw_only=True)
class Sought:
    """A cell of a run, with what the run's cells rest on and where its artefacts lie."""

    results: Path
    chains: Chains
    cell: ListedCell
    store: str


def sought(results: Path, wanted: str, store: str | None) -> Sought:
    """A cell by its label or key; ``store`` in place of the run's own."""
    chains = read_chains(_run(results))
    cell = _cell(chains.cells, wanted, results)
    uri = store or chains.store
    if not is_uri(uri) and not (Path(uri) / "store.json").is_file():
        if store is not None:
            raise UsageError(f"--store {shown(uri)}: no store is there; --store names another")
        raise UsageError(
            f"{results}: its run kept its models in {uri!r}, and no store is there."
            " --store says where it lies now."
        )
    return Sought(results=results, chains=chains, cell=cell, store=uri)


def _run(results: Path) -> Path:
    if (results / GRID_FILE).is_file():
        return results
    runs = sorted(path.parent.name for path in home().glob(f"*/{GRID_FILE}"))
    told = f" Runs in {home()}: {', '.join(runs)}." if runs else ""
    raise UsageError(
        f"--in {results}: no run of a grid is there (no {GRID_FILE}).{near(results.name, runs)}"
        f"{told}"
    )


def _cell(cells: Sequence[ListedCell], wanted: str, results: Path) -> ListedCell:
    for cell in cells:
        if wanted in (cell.label, cell.key):
            return cell
    labels = [cell.label for cell in cells]
    raise UsageError(
        f"no cell called {wanted!r} among the {len(cells)} of {results}.{near(wanted, labels)}"
        f" One of them is {labels[0] if labels else 'none'}; `grid check` and `grid explain` name"
        " them."
    )
