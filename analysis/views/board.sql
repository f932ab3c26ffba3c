-- One line per attack x rate x defense (x track, regime, model, target) and evaluation set; an
-- attack that has no rate is told apart by its count.
-- Defense seeds are averaged inside their victim seed first; the victim seed is the replicate.
-- A line shows its sound cells; only where it has none, its inert ones, then those of invalid
-- victims. Its status is the worst among its cells, so a mean over fewer seeds is never called ok.
CREATE VIEW board AS
WITH ranked AS (
    SELECT *,
           CASE WHEN rate IS NULL THEN count END AS own_count,
           list_position(['ok', 'not_applicable', 'inert', 'invalid_victim', 'skipped', 'missing',
                          'requeued', 'cancelled', 'failed_method', 'failed_infrastructure'], status) AS severity
    FROM cells
    WHERE is_planned
),
chosen AS (
    SELECT *,
           clean_top1 IS NOT NULL AND severity = min(severity) FILTER (clean_top1 IS NOT NULL)
               OVER (PARTITION BY track, regime, attack, rate, own_count, defense, model, target, eval_set)
               AS is_shown
    FROM ranked
),
seeds AS (
    SELECT track, regime, attack, rate, own_count, defense, model, target, eval_set, victim_seed,
           count(*) AS num_cells,
           count(*) FILTER (is_shown) AS num_shown,
           arg_max(status, severity) AS status,
           max(severity) AS severity,
           min(severity) FILTER (is_shown) AS shown_severity,
           arg_max(detail, severity) FILTER (status <> 'ok') AS detail,
           avg(clean_top1) FILTER (is_shown) AS clean_top1,
           avg(asr_top1) FILTER (is_shown) AS asr_top1,
           avg(asr_clean_victim_top1) FILTER (is_shown) AS asr_clean_victim_top1,
           avg(lift_top1) FILTER (is_shown) AS lift_top1,
           any_value(success) FILTER (is_shown) AS success,
           avg(hit_top1) FILTER (is_shown) AS hit_top1,
           avg(hit_clean_victim_top1) FILTER (is_shown) AS hit_clean_victim_top1,
           avg(r_acc) FILTER (is_shown) AS r_acc,
           avg(relative_cost) FILTER (is_shown) AS relative_cost,
           avg(cost_seconds) FILTER (is_shown) AS cost_seconds,
           avg(pair_views) FILTER (is_shown) AS pair_views,
           avg(auroc) FILTER (is_shown) AS found_auroc,
           avg(recall) FILTER (is_shown) AS found_recall,
           avg(precision) FILTER (is_shown) AS found_precision,
           avg(precision_bound) FILTER (is_shown) AS found_precision_bound,
           list(DISTINCT lr) FILTER (is_shown AND lr IS NOT NULL) AS lrs,
           any_value(lr_rule) FILTER (is_shown) AS lr_rule,
           any_value(tuned) AS tuned,
           min(clean_n) FILTER (is_shown) AS clean_n,
           min(asr_n) FILTER (is_shown) AS asr_n,
           min(hit_n) FILTER (is_shown) AS hit_n,
           max(count) AS count,
           any_value(rate_text) AS rate_text,
           any_value(needs) AS needs,
           any_value(phase) AS phase,
           any_value(fidelity) AS fidelity,
           bool_or(is_control) AS is_control,
           bool_or(added_later) AS added_later,
           min(position) AS position
    FROM chosen
    GROUP BY ALL
),
lines AS (
    SELECT track, regime, attack, rate, own_count, defense, model, target, eval_set,
           any_value(rate_text) AS rate_text,
           max(count) AS count,
           any_value(needs) AS needs,
           any_value(phase) AS phase,
           any_value(fidelity) AS fidelity,
           bool_or(is_control) AS is_control,
           bool_or(added_later) AS added_later,
           min(position) AS position,
           sum(num_cells)::BIGINT AS num_cells,
           sum(num_shown)::BIGINT AS num_shown,
           count(clean_top1) AS num_seeds,
           CASE min(shown_severity) WHEN 1 THEN 'ok' WHEN 3 THEN 'inert'
                WHEN 4 THEN 'invalid_victim' END AS shown_status,
           arg_max(status, severity) AS status,
           arg_max(detail, severity) FILTER (status <> 'ok') AS detail,
           avg(clean_top1) AS clean_top1,
           avg(asr_top1) AS asr_top1,
           avg(asr_clean_victim_top1) AS asr_clean_victim_top1,
           avg(lift_top1) AS lift_top1,
           any_value(success) AS success,
           avg(hit_top1) AS hit_top1,
           avg(hit_clean_victim_top1) AS hit_clean_victim_top1,
           avg(r_acc) AS r_acc,
           avg(relative_cost) AS relative_cost,
           avg(cost_seconds) AS cost_seconds,
           avg(pair_views) AS pair_views,
           avg(found_auroc) AS found_auroc,
           avg(found_recall) AS found_recall,
           avg(found_precision) AS found_precision,
           avg(found_precision_bound) AS found_precision_bound,
           list_sort(list_distinct(flatten(list(lrs) FILTER (lrs IS NOT NULL)))) AS lr,
           any_value(lr_rule) AS lr_rule,
           any_value(tuned) AS tuned,
           min(clean_n) AS clean_n,
           min(asr_n) AS asr_n,
           min(hit_n) AS hit_n,
           stddev_samp(clean_top1) / sqrt(count(clean_top1)) AS clean_error,
           stddev_samp(asr_top1) / sqrt(count(asr_top1)) AS asr_error,
           stddev_samp(hit_top1) / sqrt(count(hit_top1)) AS hit_error
    FROM seeds
    GROUP BY ALL
)
SELECT lines.* EXCLUDE (own_count, clean_error, asr_error, hit_error),
       seeds_low(clean_top1, clean_n, t * clean_error) AS clean_top1_low,
       seeds_high(clean_top1, clean_n, t * clean_error) AS clean_top1_high,
       seeds_low(asr_top1, asr_n, t * asr_error) AS asr_top1_low,
       seeds_high(asr_top1, asr_n, t * asr_error) AS asr_top1_high,
       seeds_low(hit_top1, hit_n, t * hit_error) AS hit_top1_low,
       seeds_high(hit_top1, hit_n, t * hit_error) AS hit_top1_high
FROM lines
LEFT JOIN t95 ON t95.df = least(num_seeds - 1, 30);
