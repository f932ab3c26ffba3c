-- What became of every cell: planned cells without a row are missing, cells on disk that are not
-- in the grid file are unplanned. Without a list of planned cells everything on disk is planned.
CREATE VIEW outcomes AS
WITH ended AS (
    SELECT cell, label, track, regime, attack, rate, rate_text, count, defense, needs, phase, fidelity,
           is_control, victim_seed, defense_seed, model, target, status, detail, attempts, reused,
           added_later, relative_cost, cost_seconds, victim_seconds, wall_seconds, pair_views, lr,
           lr_rule, tuned, grid_hash, written_at
    FROM newest
    WHERE metric = 'cell'
)
SELECT COALESCE(ended.cell, planned.cell) AS cell,
       COALESCE(ended.label, planned.label) AS label,
       COALESCE(ended.track, planned.track) AS track,
       COALESCE(ended.regime, planned.regime) AS regime,
       COALESCE(ended.attack, planned.attack) AS attack,
       CASE WHEN ended.cell IS NULL THEN planned.rate ELSE ended.rate END AS rate,
       COALESCE(ended.rate_text, planned.rate_text) AS rate_text,
       COALESCE(ended.count, planned.count) AS count,
       COALESCE(ended.defense, planned.defense) AS defense,
       COALESCE(ended.needs, planned.needs) AS needs,
       COALESCE(ended.phase, planned.phase) AS phase,
       COALESCE(ended.fidelity, planned.fidelity) AS fidelity,
       COALESCE(ended.is_control, planned.is_control) AS is_control,
       COALESCE(ended.victim_seed, planned.victim_seed) AS victim_seed,
       COALESCE(ended.defense_seed, planned.defense_seed) AS defense_seed,
       COALESCE(ended.model, planned.model) AS model,
       COALESCE(ended.target, planned.target) AS target,
       COALESCE(ended.status, 'missing') AS status,
       ended.detail, ended.attempts, ended.reused, ended.added_later, ended.relative_cost,
       ended.cost_seconds, ended.victim_seconds, ended.wall_seconds, ended.pair_views, ended.lr,
       ended.lr_rule, ended.tuned, ended.grid_hash, ended.written_at,
       planned.position,
       planned.cell IS NOT NULL OR (SELECT count(*) FROM planned) = 0 AS is_planned
FROM ended
FULL JOIN planned ON ended.cell = planned.cell;

-- The report set is always there, so that a grid of failures still has a board. What was found in
-- the suspect data is no accuracy: it stands beside every set.
CREATE VIEW eval_sets AS
SELECT DISTINCT eval_set FROM rows WHERE metric <> 'cell' AND eval_set NOT IN ('', 'suspect')
UNION
SELECT 'report';

-- One line per (cell, evaluation set): the outcome beside the metrics a board shows. Numbers left
-- over from an earlier success of a cell that has failed since do not count. An attack that stamps
-- nothing has no ASR: ``hit`` is its share of chosen pictures (psr) or of queries (text_hit).
CREATE VIEW cells AS
WITH metrics AS (
    SELECT cell, eval_set,
           max(value) FILTER (metric = 'clean_top1') AS clean_top1,
           max(n) FILTER (metric = 'clean_top1') AS clean_n,
           max(value) FILTER (metric = 'asr_top1') AS asr_top1,
           max(n) FILTER (metric = 'asr_top1') AS asr_n,
           max(clean_victim) FILTER (metric = 'asr_top1') AS asr_clean_victim_top1,
           max(init_model) FILTER (metric = 'asr_top1') AS asr_init_top1,
           max(metric) FILTER (value IS NOT NULL
                               AND metric IN ('asr_top1', 'psr_top1', 'text_hit_top1')) AS success,
           max(value) FILTER (metric IN ('psr_top1', 'text_hit_top1')) AS hit_top1,
           max(n) FILTER (metric IN ('psr_top1', 'text_hit_top1')) AS hit_n,
           max(clean_victim) FILTER (metric IN ('psr_top1', 'text_hit_top1'))
               AS hit_clean_victim_top1,
           max(value) FILTER (metric = 'target_rate_top1') AS target_rate_top1,
           max(value) FILTER (metric = 'r_acc') AS r_acc
    FROM newest
    WHERE metric IN ('clean_top1', 'asr_top1', 'psr_top1', 'text_hit_top1', 'target_rate_top1',
                     'r_acc')
    GROUP BY cell, eval_set
),
-- Of defenses that judge rows of the suspect data.
judgements AS (
    SELECT cell,
           max(value) FILTER (metric = 'found_auroc') AS auroc,
           max(value) FILTER (metric = 'found_recall') AS recall,
           max(value) FILTER (metric = 'found_precision') AS precision,
           max(value) FILTER (metric = 'found_precision_bound') AS precision_bound
    FROM newest
    WHERE metric IN ('found_auroc', 'found_recall', 'found_precision', 'found_precision_bound')
    GROUP BY cell
)
SELECT outcomes.*, eval_sets.eval_set,
       metrics.clean_top1, metrics.clean_n, metrics.asr_top1, metrics.asr_n,
       metrics.asr_clean_victim_top1,
       metrics.asr_top1 - metrics.asr_clean_victim_top1 AS lift_top1,
       metrics.success, metrics.hit_top1, metrics.hit_n, metrics.hit_clean_victim_top1,
       metrics.asr_init_top1, metrics.target_rate_top1, metrics.r_acc,
       judgements.auroc, judgements.recall, judgements.precision,
       judgements.precision_bound
FROM outcomes
CROSS JOIN eval_sets
LEFT JOIN judgements
       ON judgements.cell = outcomes.cell
      AND outcomes.status IN ('ok', 'inert', 'invalid_victim')
LEFT JOIN metrics
       ON metrics.cell = outcomes.cell
      AND metrics.eval_set = eval_sets.eval_set
      AND outcomes.status IN ('ok', 'inert', 'invalid_victim');
