-- One row per (cell, eval_set, metric): a cell that ran again counts as it ended last.
-- Both filters on the partition's columns reach the files, so asking for one metric is cheap.
CREATE VIEW newest AS
SELECT *
FROM rows
QUALIFY row_number() OVER (PARTITION BY cell, eval_set, metric ORDER BY written_at DESC) = 1;
