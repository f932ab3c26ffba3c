"""Which settings of a search mattered: permutation importance in a small random forest.

The forest predicts a trial's ``score`` or ``ca`` from its settings. How well it does so on trials
that a tree has not seen (out-of-bag R2) says how far its answer is to be trusted: near 0, or
below, it has learnt nothing that carries over.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from analysis.campaigns import SearchResult

MIN_TRIALS = 8
NUM_TREES = 100
REPEATS = 10
TELLING_R2 = 0.2


class Bar(NamedTuple):
    """How much R2 falls when a setting's values are shuffled among the trials, and its spread."""

    setting: str
    fall: float
    deviation: float


class Importance(NamedTuple):
    """Bars of the settings that varied, the largest first; or ``refusal`` says why there are none.

    ``fit_r2`` is the out-of-bag R2 of the forest.
    """

    target: str
    num_trials: int
    fit_r2: float | None
    bars: list[Bar]
    refusal: str | None = None

    @property
    def is_telling(self) -> bool:
        """Whether the forest predicts trials that it has not seen."""
        return self.fit_r2 is not None and self.fit_r2 > TELLING_R2

    @property
    def words(self) -> str:
        """How well the forest fits, or why there is none."""
        if self.fit_r2 is None:
            return self.refusal or "unknown"
        return f"{round(self.fit_r2, 2) + 0.0:.2f}"


def importance(search: SearchResult, target: str, seed: int = 0) -> Importance:
    """The importance of a search's settings for ``score`` or ``ca`` of its complete trials."""
    values: list[tuple[Mapping[str, Any], float]] = []
    for trial in search.complete:
        if trial.is_default:
            continue  # its settings are not among those that were drawn
        value = {"score": trial.score, "ca": trial.ca}[target]
        if value is not None and math.isfinite(value):
            values.append((trial.settings, value))
    return forest_importance([s for s, _ in values], [v for _, v in values], target, seed)


def forest_importance(
    settings: Sequence[Mapping[str, Any]], values: Sequence[float], target: str, seed: int = 0
) -> Importance:
    """The importance of each setting for the values; pure, and the same for the same seed."""
    names, table = encode(settings)
    if len(values) < MIN_TRIALS:
        return _refused(target, len(values), f"{len(values)} complete trials, {MIN_TRIALS} needed")
    if not names:
        return _refused(target, len(values), "no setting varied")
    if max(values) == min(values):
        return _refused(target, len(values), f"{target} is the same in all trials")
    import numpy as np
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.inspection import permutation_importance

    inputs, wanted = np.asarray(table, float), np.asarray(values, float)
    forest = RandomForestRegressor(
        NUM_TREES, min_samples_leaf=2, oob_score=True, random_state=seed, n_jobs=1
    )
    forest.fit(inputs, wanted)
    found = permutation_importance(
        forest, inputs, wanted, n_repeats=REPEATS, random_state=seed, n_jobs=1
    )
    falls = zip(names, found.importances_mean, found.importances_std, strict=True)
    bars = [Bar(name, float(fall), float(deviation)) for name, fall, deviation in falls]
    bars.sort(key=lambda bar: (-bar.fall, bar.setting))
    return Importance(target, len(values), float(forest.oob_score_), bars)


def encode(settings: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[float]]]:
    """Names of the settings that varied, and a row per trial: each value's place among its kind.

    Trees ask only whether a value lies above another, so places serve as well as the numbers and
    need no scale; words have the order of the alphabet, and what is not given comes first.
    """
    names = list(dict.fromkeys(name for given in settings for name in given))
    columns: dict[str, list[float]] = {}
    for name in names:
        keys = [_order(given.get(name)) for given in settings]
        places = {key: float(place) for place, key in enumerate(sorted(set(keys)))}
        if len(places) > 1:
            columns[name] = [places[key] for key in keys]
    return list(columns), [list(row) for row in zip(*columns.values(), strict=True)]


def _order(value: Any) -> tuple[int, float, str]:
    """Sorts values of any kind: nothing, then numbers (yes and no among them), then the rest."""
    if value is None:
        return 0, 0.0, ""
    if isinstance(value, bool | int | float):
        return 1, float(value), ""
    return 2, 0.0, value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def _refused(target: str, num_trials: int, why: str) -> Importance:
    return Importance(target, num_trials, None, [], why)
