"""Results in a notebook: tables as pandas, figures to look at. No torch, no Ray.

from analysis import Results
board = Results("runs/demo").board()
board.tiers(); board.compare("finetune", "cleanclip"); board.heatmap()
"""

from __future__ import annotations

import html
import io
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.compare import Comparison, compare_in
from analysis.compare_render import cells_table, summary
from analysis.imports import imported_frame
from analysis.leaderboard import Asked, Found, load
from analysis.matrix import load_matrix
from analysis.query import plain, run_sql
from analysis.reader import read_tables
from analysis.standing_render import standing_table
from analysis.text import formed
from analysis.theme import PNG_DPI, NothingToDraw, house_style
from grid.schema.directory import results_directory
from victims.errors import unknown

if TYPE_CHECKING:
    import pandas as pd

SCREEN_DPI = 150
NO_EXHIBITS = (
    "This run kept nothing to look at. Write `evaluate: {exhibits: true}` into its grid file and"
    " run it again: models are found in the store, and are only measured anew."
)
NO_SCORES = "No defense of this board gives the rows of the suspect data a score."


class Results:
    """A results directory, by its path or the name of what ran. It is read anew at every question,
    so that a run may still be writing it."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = results_directory(directory)

    def __repr__(self) -> str:
        return f"Results({str(self.directory)!r})"

    def sql(self, query: str) -> pd.DataFrame:
        """The answer to one SELECT over the views."""
        import pandas as pd

        answer, untold = run_sql(self.directory, query)
        for text in untold:
            warnings.warn(text, stacklevel=2)
        rows = [[plain(value) for value in row] for row in answer.rows]
        return pd.DataFrame(rows, columns=answer.columns)

    def published(self, *, bundled: bool = False) -> pd.DataFrame:
        """Numbers of others that were imported here, as the SQL view `published` has them; with
        ``bundled`` also those that come along with the package. None is in any other table."""
        return imported_frame(self.directory, bundled=bundled)

    def board(self, eval_set: str = "report", **tiers: Any) -> BoardView:
        """The board; ``tiers`` are ``group``, ``worst_case`` and ``at_ca_loss``."""
        return BoardView(self.directory, Asked(eval_set=eval_set, **tiers))


class BoardView:
    """A board as it was when it was asked for."""

    def __init__(self, directory: Path, asked: Asked) -> None:
        self.directory, self.asked = directory, asked
        self._found: Found = load(directory, asked)

    def __repr__(self) -> str:
        board = self._found.board
        return f"Board({board.grid.name}, {board.eval_set}: {len(board.lines)} lines)"

    def _repr_html_(self) -> str:
        """Tiers, then what a reader must know."""
        missing = "".join(f"<p>! {html.escape(text)}</p>" for text in self._found.board.warnings)
        if self._found.tiers is None:
            return f"<p>{html.escape(repr(self))}: no sound victim has numbers yet</p>{missing}"
        return formed(standing_table(self._found.tiers), "html") + missing

    def lines(self) -> pd.DataFrame:
        """One line per attack, rate and defense."""
        import pandas as pd

        return pd.DataFrame([asdict(line) for line in self._found.board.lines])

    def tiers(self) -> pd.DataFrame:
        """One line per defense over all attacks and rates, by tier."""
        import pandas as pd

        if self._found.tiers is None:
            return pd.DataFrame()
        return pd.DataFrame(list(standing_table(self._found.tiers).values))

    def notes(self) -> list[str]:
        """What a reader must know beside the numbers."""
        tiers = self._found.tiers.notes() if self._found.tiers else []
        return [*self._found.board.warnings, *self._found.board.notes(), *tiers]

    def cells(self) -> pd.DataFrame:
        """One line per sound victim and defense, with ASR, clean accuracy and what it cost."""
        import numpy as np
        import pandas as pd

        matrix = read_tables(self.directory, lambda t: load_matrix(t, self.asked.eval_set))
        if matrix is None:
            return pd.DataFrame()
        d, s, r = (index.ravel() for index in np.indices(matrix.asr_DSR.shape))
        found = pd.DataFrame(
            {
                "defense": np.array(matrix.defenses, dtype=object)[d],
                "attack": np.array([x.attack for x in matrix.strata], dtype=object)[s],
                "rate": np.array([float(x.rate) for x in matrix.strata])[s],
                "target": np.array([x.target for x in matrix.strata], dtype=object)[s],
                "seed": np.array(matrix.seeds)[r],
                "asr": matrix.asr_DSR.ravel(),
                "clean": matrix.clean_DSR.ravel(),
                "asr_clean_victim": matrix.base_DSR.ravel(),
                "relative_cost": matrix.cost_DSR.ravel(),
                "status": matrix.status_DSR.ravel(),
            }
        )
        return found[matrix.is_sound_SR[s, r]].reset_index(drop=True)

    def sql(self, query: str) -> pd.DataFrame:
        """The answer to one SELECT over the views of its results."""
        return Results(self.directory).sql(query)

    def compare(self, first: str, second: str) -> ComparisonView:
        """Two defenses on the victims that both have."""
        return ComparisonView(compare_in(self.directory, first, second, self.asked.eval_set))

    # --- figures

    def heatmap(self) -> Drawing:
        """ASR by attack and defense; what is invalid or missing is hatched."""
        return self._drawn("heat_map")

    def curves(self) -> Drawing:
        """ASR and clean accuracy against the poison rate."""
        return self._drawn("rate_curves")

    def pareto(self) -> Drawing:
        """Clean accuracy against ASR, with the front."""
        return self._drawn("trade_off")

    def profile(self) -> Drawing:
        """The share of cells with at most so much ASR."""
        return self._drawn("profile")

    def ranks(self) -> Drawing:
        """Ranks with their intervals, and tiers."""
        return self._drawn("rank_plot")

    def cost(self) -> Drawing:
        """Cost against the lift that is removed."""
        return self._drawn("cost")

    def detection(self) -> Drawing:
        """ROC curves of what tells poisoned rows, where the run kept exhibits."""
        return self._drawn("detection")

    def pictures(self, attack: str) -> Drawing:
        """Pictures before and after an attack's trigger, where the run kept exhibits."""
        return self._of_attack(attack, "gallery")

    def features(self, attack: str) -> Drawing:
        """Where clean and triggered pictures lie for one victim and for what defenses made of it,
        where the run kept exhibits."""
        return self._of_attack(attack, "feature_map")

    def training(self, attack: str) -> Drawing:
        """What the fits of one victim and of its defenses recorded, where exhibits were kept."""
        return self._of_attack(attack, "training")

    def _of_attack(self, attack: str, name: str) -> Drawing:
        from analysis.drawing import attack_figures

        by_attack = read_tables(self.directory, attack_figures)
        if not by_attack:
            raise NothingToDraw(self._why_no_exhibits())
        if attack not in by_attack:
            raise unknown("attack with exhibits", attack, by_attack)
        if name not in by_attack[attack]:
            raise NothingToDraw(f"{attack}: the run kept nothing of this kind.")
        return Drawing(by_attack[attack][name]())

    def _drawn(self, name: str) -> Drawing:
        from analysis.drawing import figures_of

        figures = figures_of(self.directory, self.asked)
        if name == "detection" and name not in figures:
            raise NothingToDraw(self._why_no_exhibits(NO_SCORES))
        if name not in figures:
            raise NothingToDraw("No sound victim has numbers yet: there is nothing to draw.")
        return Drawing(figures[name]())

    def _why_no_exhibits(self, where_some_are: str = "No victim's exhibits are there yet.") -> str:
        """A run that was not asked for any has none; else the reason is another."""
        from analysis.exhibits import is_any

        return where_some_are if read_tables(self.directory, is_any) else NO_EXHIBITS


class Drawing:
    """A picture that a notebook shows as it is; ``figure`` is matplotlib's."""

    def __init__(self, figure: Any) -> None:
        self.figure = figure

    def save(self, path: str | Path) -> Path:
        """Write it, as what the path ends with: png, svg or pdf."""
        with house_style():
            self.figure.savefig(path, dpi=PNG_DPI)
        return Path(path)

    def _repr_png_(self) -> bytes:
        output = io.BytesIO()
        with house_style():
            self.figure.savefig(output, format="png", dpi=SCREEN_DPI)
        return output.getvalue()


class ComparisonView:
    """A comparison: ``found`` are its numbers, ``cells()`` the victims."""

    def __init__(self, found: Comparison) -> None:
        self.found = found

    def __repr__(self) -> str:
        return "\n".join(summary(self.found))

    def _repr_html_(self) -> str:
        lines = "".join(f"<p>{html.escape(line)}</p>" for line in summary(self.found))
        return lines + formed(cells_table(self.found), "html")

    def cells(self) -> pd.DataFrame:
        """One line per victim."""
        import pandas as pd

        return pd.DataFrame([asdict(cell) for cell in self.found.cells])
