-- One row per (cell, eval_set, metric): a cell that ran again counts as it ended last.
-- Both filters on the partition's columns reach the files, so asking for one metric is cheap.
CREATE VIEW newest AS
SELECT *
FROM rows
QUALIFY row_number() OVER (PARTITION BY cell, eval_set, metric ORDER BY written_at DESC) = 1;

-- Pictures of a cell that was measured twice, or written twice by a run that was killed: the last.
CREATE VIEW newest_samples AS
SELECT samples.*
FROM samples
JOIN (SELECT cell, eval_set, max(written_at) AS written_at FROM samples GROUP BY ALL)
USING (cell, eval_set, written_at);
