"""Hand-made rows for tests of the board: cells that look as a run would have written them."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from grid.schema.columns import CELL
from grid.schema.status import Status

EPOCH = datetime(2026, 1, 1, tzinfo=UTC)
MEASURED = (Status.OK, Status.INERT, Status.INVALID_VICTIM)
NEEDS: Mapping[str, list[str]] = {
    "none": [],
    "finetune": ["victim", "clean_data"],
    "cleanclip": ["victim", "clean_data"],
    "roclip": ["suspect_data", "start"],
    "oracle_filter": ["suspect_data", "start", "truth"],
}


def cell_columns(
    attack: str = "badnet",
    rate: str | None = "0.01",
    defense: str = "none",
    seed: int = 0,
    **more: object,
) -> dict[str, Any]:
    """What grid.json and every row of a cell share."""
    defaults: dict[str, Any] = {
        "track": "clip_finetune",
        "regime": "F",
        "attack": attack,
        "rate": None if rate is None else float(rate),
        "rate_text": rate,
        "count": None if rate is None else round(float(rate) * 4096),
        "defense": defense,
        "needs": NEEDS.get(defense, ["victim"]),
        "phase": "control" if "filter" in defense else "finetuning",
        "fidelity": "exact" if defense != "roclip" else "reading",
        "is_control": "filter" in defense,
        "victim_seed": seed,
        "defense_seed": 0,
        "model": "tiny",
        "target": "banana",
    }
    defaults.update({key: value for key, value in more.items() if key in defaults})
    key = more.get("cell", f"{attack}-{rate}-{defense}-{seed}-{defaults['defense_seed']}")
    label = f"{attack}/{rate or 'targeted'}/{defense}/s{seed}"
    return {"cell": key, "label": more.get("label", label), **defaults}


def cell_rows(
    attack: str = "badnet",
    rate: str | None = "0.01",
    defense: str = "none",
    seed: int = 0,
    *,
    clean: float = 0.95,
    asr: float = 0.9,
    clean_victim: float = 0.02,
    hit: str | None = None,
    r_acc: float = 0.1,
    n: int = 1000,
    status: str = "ok",
    detail: str | None = None,
    minutes: float = 0,
    eval_set: str = "report",
    **more: object,
) -> list[dict[str, Any]]:
    """All rows of one cell: its outcome and, if it was measured, its metrics.

    ``hit`` names the metric of an attack that stamps nothing: it has the value given as ``asr``,
    and ASR does not apply.
    """
    shared = {
        **cell_columns(attack, rate, defense, seed, **more),
        "written_at": EPOCH + timedelta(minutes=minutes),
        "grid": "demo",
        "grid_hash": "0123456789abcdef",
        "added_later": False,
        "attack_params": "{}",
        "defense_params": "{}",
        "num_rows": 4096,
        "corpus_digest": "c0ffee",
        "status": status,
        "detail": detail,
        "attempts": 1,
        "cost_seconds": 0.0 if defense == "none" else 3.0,
        "victim_seconds": 12.0,
        "relative_cost": 0.0 if defense == "none" else 0.25,
        **{key: value for key, value in more.items() if key not in {c.name for c in CELL}},
    }
    rows = [{**shared, "metric": "cell", "eval_set": ""}]
    if status in MEASURED:
        for metric, share, baseline in (
            ("clean_top1", clean, None),
            (hit or "asr_top1", asr, clean_victim),
            ("r_acc", r_acc, None),
            ("target_rate_top1", 0.01, None),
        ):
            successes = round(share * n)
            rows.append(
                {
                    **shared,
                    "metric": metric,
                    "eval_set": eval_set,
                    "value": successes / n,
                    "n": n,
                    "successes": successes,
                    "clean_victim": baseline,
                }
            )
    if hit and status in MEASURED:
        absent = {"metric": "asr_top1", "eval_set": eval_set, "status": "not_applicable"}
        rows.append({**shared, **absent})
    return rows


def trial_row(number: int = 0, record: str = "trial", **more: object) -> dict[str, Any]:
    """One record of a campaign's search."""
    return {
        "written_at": EPOCH,
        "started_at": EPOCH,
        "campaign": "demo",
        "search": "search-0",
        "defense": "cleanclip",
        "objective": "tuned",
        "number": number,
        "trial": f"trial-{number}",
        "record": record,
        "status": "ok",
        "settings": "{}",
        "is_default": number == 0,
        **more,
    }


def exhibit_rows(cell: str) -> dict[str, list[dict[str, Any]]]:
    """Exhibits of a cell, one row of each kind."""
    shown = {"cell": cell, "image": 1, "label": 3}
    place = {"kind": "clean", "x": 0.5, "y": -0.5, "projection": "pca"}
    roc = {"score": "", "false_positive": 0.5, "true_positive": 1.0, "auroc": 0.75}
    return {
        "fits": [{"cell": cell, "epoch": 1, "name": "clip", "value": 2.5}],
        "rocs": [{"cell": cell, **roc}],
        "features": [{**shown, **place}],
        "pictures": [{**shown, "clean": b"png", "triggered": b"png"}],
    }
