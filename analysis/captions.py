"""Titles of figures, and what is to be said below them, which depends on what they show."""

from __future__ import annotations

TITLES = {
    "heat_map": "ASR by attack and defense",
    "trade_off": "Accuracy against safety",
    "rank_plot": "Ranks",
    "rate_curves": "Poison rates",
    "profile": "Performance profile",
    "cost": "Cost",
    "detection": "Telling poisoned rows",
}
OF_ATTACK = {
    "gallery": "Pictures of the evaluation set before and after the trigger, and what it changed:"
    " grey is no change.",
    "feature_map": "Image features of clean and triggered pictures, each model's in a plane of its"
    " own: of one victim, and of what defenses made of it. Panels are turned and mirrored so that"
    " the clean pictures lie as near as can be to where the victim has them.",
    "training": "What the last fit of each model recorded, of one victim and its defenses.",
}


def caption(name: str, num_seeds: int) -> str:
    """What to say below a figure of a board."""
    are_many = num_seeds > 1
    mean = ", mean over sound victims" if are_many else ""
    bands = "; bands from the lowest to the highest victim seed" if are_many else ""
    intervals = ", with intervals over victim seeds" if are_many else ""
    return {
        "heat_map": f"ASR of every defense on every attack{mean}; hatched is invalid, missing or"
        " failed, and a corner marks means that lack some of their victims. At the right, the clean"
        " accuracy that a defense costs.",
        "trade_off": f"Clean accuracy against ASR over all strata{intervals}. The line is the"
        " front: nothing is both more accurate and safer.",
        "rank_plot": "The interval of ranks of each defense; who shares a letter is not told"
        " apart.",
        "rate_curves": f"ASR and clean accuracy against the poison rate{bands}.",
        "profile": "The share of victims on which a defense leaves at most so much ASR; a line that"
        " ends below 100 % has none on the others: they failed or are missing.",
        "cost": "What a defense costs beside its victim's training, and the share of lift that it"
        " removes: none where it failed.",
        "detection": "How what a defense says of rows tells the poisoned ones, of one victim an"
        " attack; cover rows are left out.",
    }[name]
