-- One row per record of a campaign's trial: what was measured again counts as it was measured last.
CREATE VIEW newest_trials AS
SELECT *
FROM trials
QUALIFY row_number() OVER (
    PARTITION BY search, trial, is_default, record, cell, epoch ORDER BY written_at DESC) = 1;

-- The learning curve of a trial: after every epoch that all its fits so far have reached, the mean
-- clean accuracy over the cells and the largest over attacks of the mean ASR over their cells.
CREATE VIEW curves AS
WITH attacks AS (
    SELECT search, trial, epoch, attack, sum(clean_top1) AS clean, count(*) AS num_cells,
           avg(asr_top1) AS asr
    FROM newest_trials
    WHERE record = 'epoch' AND epoch IS NOT NULL AND clean_top1 IS NOT NULL
    GROUP BY ALL
),
epochs AS (
    SELECT search, trial, epoch, sum(clean) / sum(num_cells) AS ca, max(asr) AS worst_asr,
           sum(num_cells)::BIGINT AS num_cells
    FROM attacks
    GROUP BY search, trial, epoch
)
SELECT *
FROM epochs
QUALIFY num_cells = max(num_cells) OVER (PARTITION BY search, trial);
