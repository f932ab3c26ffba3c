"""Spectral signatures: drop the rows that lie far out along their class's first direction.

Idea: poisoned rows leave a direction of large variance in the features of the class that they are
    labelled with; drop from every class the rows with the largest projections on it, and train
    again.
Reference: Tran, Li, Madry, "Spectral Signatures in Backdoor Attacks", NeurIPS 2018, arXiv
    1811.00636.
Symbols: epsilon = ``expected_rate``, the share of a class that may be poisoned; 1.5 = ``factor``;
    R = penultimate features; v = the top right singular vector of the centred ones.
Where: tau_i = ((R(x_i) - mean) v)^2 -> `scores_of`; the removal of 1.5 epsilon of every label's
    rows and the second training -> `SpectralSignatures.apply`.
Differences: none known of the algorithm; the released code looks at the target's label alone,
    which a defender does not know.
Cost: a forward pass over the suspect data, one decomposition per class, and one training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from defenses.base import (
    Between,
    Case,
    Defended,
    Defense,
    Fidelity,
    Knob,
    Need,
    Phase,
    Recipes,
    Sizes,
    Space,
    Track,
    require,
    rows_in,
    trained_without,
)
from victims.lab import Lab
from victims.selection import Penultimate
from victims.work import Work, fitted


def scores_of(feature_ND: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """tau of the rows of one class."""
    centred_ND = feature_ND.astype(np.float64) - feature_ND.mean(0, dtype=np.float64)
    _, _, right_DD = np.linalg.svd(centred_ND, full_matrices=False)
    tau_N: npt.NDArray[np.float64] = np.square(centred_ND @ right_DD[0])
    return tau_N


@dataclass(frozen=True, slots=True, kw_only=True)
class SpectralSignatures(Defense):
    name: ClassVar[str] = "spectral_signatures"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "arXiv 1811.00636"
    phase: ClassVar[Phase] = Phase.FILTERING
    tracks: ClassVar[frozenset[Track]] = frozenset({Track.SUPERVISED})
    needs: ClassVar[frozenset[Need]] = frozenset({Need.VICTIM, Need.SUSPECT_DATA, Need.START})
    fidelity: ClassVar[Fidelity] = Fidelity.EXACT
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    knob: ClassVar[Knob | None] = Knob(name="expected_rate", values=(0.01, 0.05, 0.1, 0.2, 0.3))
    space: ClassVar[Space] = {"expected_rate": Between(low=0.005, high=0.4, log=True)}

    expected_rate: float = 0.1
    factor: float = 1.5

    def check(self) -> None:
        require(
            self,
            expected_rate=(0 <= self.expected_rate < 1, "in [0, 1)"),
            factor=(
                self.factor > 0 and self._share() < 1,
                "above 0, and less than 1 / expected_rate",
            ),
        )

    def _share(self) -> float:
        """The product of the decimals as written."""
        return float(Decimal(str(self.factor)) * Decimal(str(self.expected_rate)))

    def costs(self, recipes: Recipes, sizes: Sizes) -> Work:
        kept = sizes.suspect - rows_in(self._share(), sizes.suspect)
        return Work(images=sizes.suspect) + fitted(recipes.victim, kept)

    def apply(self, lab: Lab, case: Case) -> Defended:
        self.check()
        data = case.suspect_data
        feature_ND, label_N = lab.score(Penultimate(), data, case.victim), lab.labels(data)
        suspicion, flagged = np.zeros(len(data)), np.zeros(len(data), dtype=bool)
        for label in np.unique(label_N).tolist():
            rows = np.flatnonzero(label_N == label)
            suspicion[rows] = scores_of(feature_ND[rows])
            count = rows_in(self._share(), len(rows))
            flagged[rows[np.argsort(-suspicion[rows], kind="stable")[:count]]] = True
        return Defended(
            trained_without(lab, case, flagged),
            flagged=flagged,
            suspicion=suspicion.astype(np.float32),
            notes={"dropped": float(flagged.sum())},
        )
