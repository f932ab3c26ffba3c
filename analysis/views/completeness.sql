-- How many planned cells ended how; unplanned are cells on disk that the grid file does not list.
CREATE VIEW completeness AS
SELECT CASE WHEN is_planned THEN status ELSE 'unplanned' END AS outcome, count(*) AS num_cells
FROM outcomes
GROUP BY ALL;
