"""What the words of boards mean: one table for the report's columns and for the documents."""

from __future__ import annotations

from typing import NamedTuple


class Word(NamedTuple):
    """A word, what it says, and the headings of columns that it explains."""

    name: str
    says: str
    headings: tuple[str, ...] = ()


WORDS = (
    Word(
        "sound victim",
        "an undefended victim whose attack passed its gate at that rate: by the means over victim"
        " seeds the attack took, and clean accuracy is near the clean victim's. Defenses are run on"
        " no other, and means hold no other",
    ),
    Word(
        "report, tuning, shifted",
        "evaluation sets: boards are of the report split. Gates and campaigns look at the tuning"
        " split alone. The shifted set of the embedded world is drawn like the report split, with"
        " something distracting in each picture and more noise; further sets go by their names",
    ),
    Word(
        "CA",
        "clean accuracy: the share of pictures without a trigger that get their own class (top 1)",
        ("Clean acc. %", "CA %"),
    ),
    Word(
        "ASR",
        "attack success rate: the share of triggered pictures of other classes that get the target",
        ("ASR %",),
    ),
    Word(
        "ASR of the clean victim",
        "the same stamped pictures on a victim that was trained without poison: what of an ASR is"
        " no backdoor",
        ("ASR clean victim", "ASR clean victim %"),
    ),
    Word("Lift", "ASR less that of the clean victim, in points", ("Lift",)),
    Word(
        "hit@1",
        "of attacks that stamp nothing: the share of the chosen pictures read as what was chosen"
        " for them, or of the chosen queries answered with the target",
        ("hit@1 %", "hit@1 clean victim"),
    ),
    Word(
        "R-Acc",
        "robust accuracy: the share of triggered pictures of other classes that get their own"
        " class. A defense may end an attack, so that ASR is small, and still not give this back",
        ("R-Acc", "R-Acc %"),
    ),
    Word(
        "Found",
        "of defenses that judge rows: AUROC of their suspicion, then recall and precision of the"
        ' rows that they flagged, against the truth; after "of", the highest precision that so'
        " many flagged rows can have",
        ("Found: AUROC / recall / prec. of bound %",),
    ),
    Word(
        "lr",
        "the learning rate of the defense's fits; with a question mark it was selected on"
        " held-out pairs of the data that the defense was given, never by ASR; the cost"
        " holds the search",
        ("lr",),
    ),
    Word(
        "Cost",
        "the defense's own training time over that of its victim, in device seconds; evaluation is"
        " no part of it",
        ("Cost",),
    ),
    Word(
        "Tuned",
        "trials of the search that chose the settings on the tuning split, and what they cost"
        ' beside one victim; "seen": it was tuned on this very attack; "oracle": it saw the'
        " held-out attacks, as no defender does, and stands beside the tiers",
        ("Tuned: trials / cost",),
    ),
    Word("Seeds", "how many victims, trained from different seeds, are behind a line", ("Seeds",)),
    Word(
        "Status",
        "how the worst of a line's cells ended: ok, inert (the attack lifts ASR too little to be"
        " defended), invalid victim and skipped (the gate failed), not applicable, failed,"
        " missing",
        ("Status", "Gate"),
    ),
    Word(
        "Given, Needs",
        "what a defense is handed: victim (the suspicious model), suspect (the data with the"
        " poison in it), clean (pairs that are known to be clean), ref (the public model), start"
        " (where the victim's training began), truth (which rows are poisoned; controls alone)."
        " Compare what is given the same",
        ("Given", "Needs"),
    ),
    Word(
        "Fidelity",
        "exact: as the paper has it; reading: the paper leaves something open, and this is one way"
        " to read it; adapted: changed for this setting, such as a start from a public model",
        ("Fidelity",),
    ),
    Word(
        "Phase",
        "when a defense acts: pretraining (it trains the model itself), finetuning (it repairs a"
        " victim), filtering (it drops rows, and training starts anew), inference (it judges"
        " inputs); a control is held beside defenses and never ranked with them",
        ("Phase",),
    ),
    Word(
        "Mean ASR, CA lost",
        "ASR, and the points of clean accuracy that the undefended victim has more: means over"
        " strata (a stratum is an attack at a rate) of means over victim seeds. The interval is the"
        " t interval over seeds: a seed is the same in every stratum (it sets where training"
        " starts, and in which order), so what it does to several strata is added before it is"
        " squared. Where strata have unequal numbers of seeds, Satterthwaite's degrees of freedom"
        " count; a stratum of one seed is taken to vary as the others do, which cannot be checked."
        " Strata are the board's own and no sample. As everywhere, no interval is narrower than the"
        " pictures of one model allow (of differences: if all that differ did so one way), or"
        " leaves what a share or a difference can be",
        ("Mean ASR %", "CA lost, points"),
    ),
    Word(
        "Tier",
        "letters: lines share none if two tests tell them apart, each after Holm's correction over"
        " all pairs: paired signed ranks over strata, seeds averaged, and the t test over victim"
        " seeds of the mean difference, since what a seed does to one of two equal defenses leans"
        " all strata to one side. One seed gives no letters. Within a tier lines stand by name",
        ("Tier",),
    ),
    Word(
        "Rank",
        "the middle 95 % over 10,000 draws of the whole board. In a draw every seed's effect on the"
        " board is multiplied by a normal number and scaled so that a mean follows its t interval,"
        " the same for all defenses: three seeds drawn anew would make ten boards, all too alike."
        " One seed gives no ranks",
        ("Rank",),
    ),
    Word(
        "Worst case",
        "the largest over attacks of the mean ASR; a maximum of noisy numbers lies above what it"
        " estimates, so its interval is as wide as all attacks' together. With --worst-case tiers"
        " follow it, told apart by draws of their difference about its own middle; that takes three"
        " seeds, and fewer have no letters and ranks",
        ("Worst-case ASR %",),
    ),
    Word(
        "Pointwise",
        "the share of pictures on which any attack succeeds, at any rate: per kind of victim, then"
        " over these; of defenses alone that have their pictures on record for every sound victim",
        ("Pointwise %",),
    ),
    Word(
        "Front",
        "the share of draws in which nothing is as good in accuracy and ASR and better in one",
        ("Front",),
    ),
    Word(
        "Beats finetune",
        "the share of victims that have a smaller ASR than with plain fine-tuning, the control that"
        " a repair must beat with no more data and budget: a note names those that were given, or"
        " cost, more (by over a tenth); of the victims that both have, ties by half; where a method"
        " failed it counts as undefended",
        ("Beats finetune",),
    ),
    Word(
        "Hypervolume",
        "of (CA, 1 - ASR), from 5 points below the undefended accuracy at full ASR, as a share of"
        " that box. It has no interval: noise alone makes some defense best, so it lies above what"
        " it estimates, the more the more defenses and the fewer seeds there are, and intervals of"
        " draws held the truth on half of boards with five defenses. Beside it stands by how much"
        " draws exceed it, which is about its optimism, or less",
    ),
    Word(
        "Smallest difference",
        "(t at 1 - a/2, and t at 0.8) times the standard deviation of strata's differences over the"
        " root of their number, strata less one degrees of freedom. Here a is 0.05 over the number"
        " of pairs, where Holm's correction begins; of two defenses, in grid compare, a is 0.05."
        " It is of the test over strata: what seeds vary is not in it",
    ),
    Word(
        "Standard deviations",
        "of ASR, of a defense on a stratum: between victim seeds, between defense seeds of one"
        " victim, and p(1 - p)/n of the pictures of one model, the mean over models",
    ),
    Word(
        "partial",
        "numbers on less than 95 % of the sound victims that it can be run on: no rank, and in"
        " place of means the range that the missing cells allow: of ASR from the clean victim's to"
        " the undefended one's, of accuracy from nothing lost to guessing",
    ),
)
BY_HEADING = {heading: word.says for word in WORDS for heading in word.headings}


def amount(rate: float | None, count: int | None) -> str:
    """How much was poisoned, as people say it: ``1 % (40 rows)``, or rows alone where there is no
    rate, as in targeted poisoning."""
    rows = "" if count is None else f"{count} row{'' if count == 1 else 's'}"
    if rate is None:
        return rows or "not stated"
    return f"{100 * rate:.4g} %" + (f" ({rows})" if rows and count else "")
