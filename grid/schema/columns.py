"""The columns of every kind of table, each with its type and what it means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

SCHEMA_VERSION = 1


class Column(NamedTuple):
    """One column: its type word, whether null is refused, and what it means."""

    name: str
    type: str
    required: bool
    meaning: str


def _columns(text: str) -> tuple[Column, ...]:
    """Lines ``name type meaning``; ``!`` after the type refuses null."""
    split = (line.split(maxsplit=2) for line in text.strip().splitlines())
    return tuple(Column(n, t.rstrip("!"), t.endswith("!"), m) for n, t, m in split)


CELL = _columns("""
    cell            string!   cell key
    label           string!   the cell's name on the command line
    track           string!   clip fine-tune, clip from scratch, classifier, ...
    regime          string!   F (from the reference weights) or S (from scratch)
    attack          string!   label on the board
    rate            float64   poisoned share of all rows; null for targeted poisoning
    rate_text       string    the rate as exact decimal text, as the user wrote it
    count           int64     realised poisoned rows
    defense         string!   label on the board; "none" is a defense
    needs           strings!  what the defender is given
    phase           string!   pretraining, filtering, finetuning, inference, control
    fidelity        string!   exact, reading, adapted
    is_control      bool!     a control of the experiment, not a proposal
    victim_seed     int64!    the replicate
    defense_seed    int64!    nested inside the victim seed
    model           string!   architecture
    target          string!   target class name, or a rule such as label + 1
""")

ROW = (
    _columns("""
    schema_version  int16!    filled by the writer
    written_at      timestamp! filled by the writer when absent
    grid            string!   name of the grid
    grid_hash       string!   hash of the grid file
    added_later     bool!     the cell joined the grid after its first run
""")
    + CELL
    + _columns("""
    attack_params   string!   JSON
    defense_params  string!   JSON
    cover_count     int64     cover rows, never inside count
    num_rows        int64     rows of the clean corpus
    corpus_digest   string    the corpus
    eval_set        string!   report, shifted, tuning, ...; empty for metric "cell"
    eval_digest     string    the evaluation images
    preprocess_digest string  the preprocessing object
    templates_digest string   the prompt templates
    metric          string!   "cell" carries the outcome; clean_top1, asr_top1, r_acc, ...
    value           float64   the metric; shares as 0 to 1
    n               int64     denominator
    successes       int64     numerator of a share, otherwise null
    low             float64   Wilson 95 %
    high            float64   Wilson 95 %
    clean_victim    float64   the same metric of the same stamped images on the clean victim
    init_model      float64   the same on the weights the recipe starts from
    status          string!   see Status
    detail          string    why, in one line
    attempts        int32     the most at the victim, its defense or a measurement
    reused          bool      nothing had to be computed
    victim_key      string    store key
    data_key        string    store key
    trigger_key     string    store key
    defended_key    string    store key
    measure_key     string    store key
    cost_seconds    float64   device seconds of the defense's own training
    victim_seconds  float64   device seconds of its victim's training
    relative_cost   float64   cost_seconds / victim_seconds
    pair_views      int64     pairs forwarded by the defense
    lr              float64   learning rate of the defense's fits; null where it trains nothing
    lr_rule         string    fixed, select (chosen on held-out pairs), or own: the method's fields
    lr_curve        string    JSON: the choices, each with its rates and their metric
    tuned           string    JSON: the campaign that chose the settings, its cost, what it saw
    knob            string    JSON: of which settings of a defense this is one, by which field
    notes           string    JSON: numbers that the defense tells about its run
    peak_memory_bytes int64   of the defense's training
    wall_seconds    float64   of the defense's training
    device          string    cpu, cuda:NVIDIA ..., ...
    threads         int32     CPU threads of the process
    commit          string    of this project
    versions        string    JSON: package to version
""")
)

STAGE = _columns("""
    schema_version  int16!    filled by the writer
    written_at      timestamp! filled by the writer when absent
    key             string!   store key
    kind            string!   what the stage makes
    name            string!   for people
    inputs          strings!  keys of the stages it reads
    seconds         float64!  wall seconds
    started_at      timestamp! UTC
    ended_at        timestamp! UTC
    reused          bool!     found in the store
    device_seconds  float64   the part spent training
    pair_views      int64     pairs forwarded
    peak_memory_bytes int64   of the stage
    device          string    cpu, cuda:..., ...
    threads         int32     CPU threads
    host            string    machine
    pid             int64     process
    attempt         int32     counted from 1
    commit          string    of this project
    versions        string    JSON: package to version
""")

ATTEMPT = _columns("""
    schema_version  int16!    filled by the writer
    written_at      timestamp! filled by the writer when absent
    key             string!   store key of the stage
    attempt         int32!    counted from 1
    outcome         string!   ok, failed_method, failed_infrastructure
    error           string    first line of the error
    seconds         float64   wall seconds
    host            string    machine
    pid             int64     process
    started_at      timestamp! UTC
""")

SAMPLE = _columns("""
    schema_version  int16!    filled by the writer
    written_at      timestamp! filled by the writer when absent
    cell            string!   cell key
    eval_set        string!   report, shifted, ...
    image           int64!    row of the evaluation set
    label           int32!    true class
    clean_prediction int32!   on the untouched image
    triggered_prediction int32! on the stamped image, those of the target class among them
    clean_true_rank int32!    rank of the true class, 0 is first
    triggered_target_rank int32! rank of the target on the stamped image
    clean_target_rank int32!  rank of the target on the untouched image
""")

TRIAL = _columns("""
    schema_version  int16!    filled by the writer
    written_at      timestamp! filled by the writer when absent
    campaign        string!   name of the campaign
    search          string!   key of what suggests settings and judges them, without the budget
    defense         string!   label of the defense whose settings are searched
    objective       string!   label of what is searched for
    number          int32!    place in the order of its search, from 0
    trial           string!   key of all that was to be measured for these settings
    record          string!   trial: its end; cell: the end of a cell; epoch: one of a fit
    status          string!   ok, stopped (before its end), failed
    reason          string    why it was stopped or failed
    settings        string!   JSON: name to value, as the search space names them
    is_default      bool!     the settings that the defense has anyway
    cell            int32     place of the cell among those of the trial, from 0
    attack          string    of the cell
    rate_text       string    of the cell
    seed            int64     of the cell's victim
    epoch           int32     epochs fitted for the cell so far
    clean_top1      float64   of the cell, on the tuning split
    clean_n         int64     pictures behind it
    asr_top1        float64   of the cell, on the tuning split
    asr_n           int64     pictures behind it
    victim_clean    float64   of the undefended victim
    victim_asr      float64   of the undefended victim
    change          float64   share of clean pictures that the victim answers otherwise
    ca              float64   mean of clean_top1 over the cells so far
    ca_loss         float64   mean of victim_clean - clean_top1 over the cells so far
    worst_asr       float64   largest over attacks of the mean ASR over their cells so far
    mean_asr        float64   over attacks
    score           float64   what the search makes small
    is_feasible     bool      whether the objective's limits hold so far
    device_seconds  float64   of the defense's training, wherever it ran
    spent_seconds   float64   of this run, wall
    defended_key    string    of the cell
    measure_key     string    of the cell
    started_at      timestamp! UTC
""")

_OF_CELL = _columns("""
    schema_version  int16!    filled by the writer
    written_at      timestamp! filled by the writer when absent
    cell            string!   cell key
""")

FIT = _OF_CELL + _columns("""
    epoch           int32!    of the last fit of the cell's model, from 1
    name            string!   a term of its loss, its learning rate, ...
    value           float64   mean over the epoch
""")

ROC = _OF_CELL + _columns("""
    score           string!   name of the defense's score; empty if it has one alone
    false_positive  float64!  share of the clean rows at or above a threshold
    true_positive   float64!  share of the poisoned rows there; cover rows are left out
    auroc           float64   of the whole curve
""")

FEATURE = _OF_CELL + _columns("""
    image           int64!    row of the evaluation set
    label           int32!    true class
    kind            string!   clean, triggered, or target: a clean picture of the target's class
    x               float64!  place of its image feature in the plane of this cell's model
    y               float64!  the same
    projection      string!   pca or tsne
""")

PICTURE = _OF_CELL + _columns("""
    image           int64!    row of the evaluation set
    label           int32!    true class
    class_name      string    its name
    clean           binary!   PNG
    triggered       binary!   PNG, with the trigger
""")

IMPORTED = _columns("""
    schema_version  int16!    filled by the writer
    written_at      timestamp! filled by the writer: when it was imported
    import_name     string!   what the import is called; of several the newest counts
    provenance      string!   imported: somebody else measured it
    kind            string!   what the file was read as
    source_file     string!   its name
    source_sha256   string!   of its bytes
    source_line     int32!    where in it the number stands
    imported_by     string!   who imported it
    paper           string!   who measured it
    identifier      string!   arXiv id or DOI
    table           string!   where the paper prints it
    attack          string!   ours, or as the paper writes it
    attack_as_written bool!   the name is the paper's own
    rate            float64   poisoned share; null where the paper gives a count, or neither
    rate_text       string    the rate as exact decimal text
    count           int64     poisoned rows
    defense         string!   ours, or as the paper writes it
    defense_as_written bool!  the name is the paper's own
    dataset         string!   what was tested on
    model           string!   architecture
    setting         string!   what is special about it; may be empty
    metric          string!   as in rows, or as the paper writes it
    metric_as_written bool!   the name is the paper's own
    variant         string!   over which images the metric was counted
    geometry        string!   crop, squash, not stated
    relation        string!   = or a bound
    printed         string!   the value as it is printed
    unit            string!   what it is printed in: %, share, or of a metric as written
    value           float64!  percents and shares as 0 to 1
""")

KINDS: Mapping[str, tuple[Column, ...]] = {
    "rows": ROW,
    "samples": SAMPLE,
    "stages": STAGE,
    "attempts": ATTEMPT,
    "trials": TRIAL,
    "fits": FIT,
    "rocs": ROC,
    "features": FEATURE,
    "pictures": PICTURE,
}

SCHEMAS: Mapping[str, tuple[Column, ...]] = {**KINDS, "imported": IMPORTED}
"""What was measured here, and apart from it what others measured: no reader puts them together."""
