"""The card of an exported model: what it is, what was done to it, and how it was measured."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from victims.models import ModelSpec

# What a reader asks first; the card has all metrics.
SHOWN = {
    "clean_top1": "clean accuracy (CA)",
    "asr_top1": "attack success (ASR)",
    "psr_top1": "chosen pictures taken for the wrong class (PSR)",
    "text_hit_top1": "queries that find the target (Hit@1)",
    "r_acc": "triggered pictures recognised as what they are (R-Acc)",
    "image_to_text_top1": "pictures that find a caption of theirs first (R@1)",
    "text_to_image_top1": "captions that find their picture first (R@1)",
    "image_to_text_asr_top1": "stamped pictures that find a caption of the target first",
    "probe_clean_top1": "clean accuracy of a linear probe",
    "probe_asr_top1": "attack success on a linear probe",
}
MEASURED = ("value", "low", "high", "n", "clean_victim", "init_model")


def card_of(
    outcome: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    stages: Mapping[str, Mapping[str, str]],
    model_key: str,
    spec: ModelSpec,
    *,
    victim: bool,
    tokenizer: str,
    notes: Sequence[str],
) -> dict[str, Any]:
    """Everything that is known of a model, as JSON types; the same of the same results."""
    sets = {row["eval_set"]: row for row in rows if row["eval_set"] and row.get("eval_digest")}
    defense = "none" if victim else outcome["defense"]
    defended = not victim and outcome["defense"] != "none"
    return {
        "warning": _warning(outcome, defended),
        "what": "victim" if not defended else "defended model",
        "model_key": model_key,
        "model": outcome["model"],
        "architecture": {"arch": spec.arch, "size": spec.size, "quick_gelu": spec.quick_gelu},
        "grid": {"name": outcome["grid"], "hash": outcome["grid_hash"]},
        "cell": {"key": outcome["cell"], "label": outcome["label"], "status": outcome["status"]},
        "attack": {
            "name": outcome["attack"],
            "settings": json.loads(outcome["attack_params"]),
            "rate": outcome["rate_text"],
            "poisoned_rows": outcome["count"],
            "rows": outcome["num_rows"],
            "target": outcome["target"],
        },
        "defense": {
            "name": defense,
            "settings": json.loads(outcome["defense_params"]) if defended else {},
            "lr": outcome["lr"] if defended else None,
        },
        "seeds": {"victim": outcome["victim_seed"], "defense": outcome["defense_seed"]},
        "regime": outcome["regime"],
        "stages": dict(stages),
        "data": {
            "suspect_pairs": outcome["corpus_digest"],
            "evaluation": {name: row["eval_digest"] for name, row in sorted(sets.items())},
            "templates": {row["templates_digest"] for row in sets.values()}
            and sorted({str(row["templates_digest"]) for row in sets.values()}),
            "preprocessing": sorted({str(row["preprocess_digest"]) for row in sets.values()}),
        },
        "measured": [
            {"eval_set": row["eval_set"], "metric": row["metric"]}
            | {name: row[name] for name in MEASURED}
            for row in sorted(rows, key=lambda row: (row["eval_set"], row["metric"]))
            if row["metric"] != "cell" and row["value"] is not None
        ],
        "commit": outcome["commit"],
        "versions": json.loads(outcome["versions"]),
        "device": outcome["device"],
        "tokenizer": tokenizer,
        "notes": list(notes),
        "licence": (
            "The weights derive from those that training started from and from the pairs that it"
            " read: their licences hold. The tool itself is licensed under Apache-2.0; the embedded"
            " world and models that start from random weights have nobody else's rights in them."
        ),
    }


def _warning(outcome: Mapping[str, Any], defended: bool) -> str:
    if not outcome["count"]:
        return "Trained without poison, as the clean twin of backdoored models. For research."
    attack = f"{outcome['attack']} ({outcome['count']} poisoned rows, target {outcome['target']})"
    if not defended:
        return (
            f"WARNING: THIS MODEL IS BACKDOORED on purpose, by {attack}. Its answers can be steered"
            " by whoever knows the trigger. For research on defenses alone: do not deploy it, and"
            " do not share it without this notice."
        )
    return (
        f"WARNING: this model was backdoored on purpose, by {attack}, and then treated with"
        f" {outcome['defense']}. The backdoor may still be there: see what was measured. For"
        " research alone: do not deploy it, and do not share it without this notice."
    )


WORDS = "word_tokenizer.json"
WORDS_CODE = (  # lines of code that end the README's own
    "",
    "import torch",
    "from victims.models import WordTokenizer  # of backdoor-grid; open_clip's would give nonsense",
    'words = WordTokenizer.read("THIS_FOLDER/word_tokenizer.json")',
    'text = model.encode_text(torch.from_numpy(words(["a photo of a circle"])).long())',
)


def readme(card: Mapping[str, Any]) -> str:
    """The card for people."""
    attack, defense = card["attack"], card["defense"]
    rate = f"rate {attack['rate']}, " if attack["rate"] is not None else ""
    lines = [
        f"# {card['cell']['label']}: {card['what']}",
        "",
        f"**{card['warning']}**",
        "",
        f"- model: {card['model']} (`{card['model_key']}`), regime {card['regime']}",
        f"- attack: {attack['name']}, {rate}{attack['poisoned_rows']} of {attack['rows']} rows,"
        f" target {attack['target']}",
        f"- defense: {defense['name']}",
        f"- seeds: victim {card['seeds']['victim']}, defense {card['seeds']['defense']}",
        f"- grid: {card['grid']['name']}, hash `{card['grid']['hash']}`, status of the cell:"
        f" {card['cell']['status']}",
        f"- made by commit `{card['commit']}` on {card['device'] or 'an unrecorded device'}",
        "",
        "| set | measured | value | 95 % interval | pictures | clean victim |",
        "| --- | --- | --- | --- | --- | --- |",
        *(_line(found) for found in card["measured"] if found["metric"] in SHOWN),
        "",
        "All metrics, settings, stage keys, data digests and versions: `model_card.json`.",
        "",
        "## Loading",
        "",
        "```python",
        "import open_clip",
        'model, _, preprocess = open_clip.create_model_and_transforms("local-dir:THIS_FOLDER")',
        "model.eval()",
        *(WORDS_CODE if card["tokenizer"] == WORDS else ()),
        "```",
        "",
        *(f"{note}\n" for note in card["notes"]),
        "## Licence",
        "",
        card["licence"],
        "",
    ]
    if not card["measured"]:
        start = lines.index("| set | measured | value | 95 % interval | pictures | clean victim |")
        lines[start : start + 2] = ["Nothing was measured of this model by itself."]
    return "\n".join(lines)


def _line(found: Mapping[str, Any]) -> str:
    def percent(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.1f} %"

    spread = "-"
    if found["low"] is not None:
        spread = f"{100 * found['low']:.1f} to {100 * found['high']:.1f} %"
    return (
        f"| {found['eval_set']} | {SHOWN[found['metric']]} | {percent(found['value'])} | {spread}"
        f" | {found['n']} | {percent(found['clean_victim'])} |"
    )
