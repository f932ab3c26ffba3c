-- Wilson 95 % around a share p of n images, z = 1.96; see analysis/stats.py for the same in Python.
CREATE MACRO wilson_centre(p, n) AS (p + 3.8416 / (2 * n)) / (1 + 3.8416 / n);
CREATE MACRO wilson_half(p, n) AS
    1.96 * sqrt(p * (1 - p) / n + 3.8416 / (4 * n * n)) / (1 + 3.8416 / n);
CREATE MACRO wilson_low(p, n) AS least(p, greatest(0, wilson_centre(p, n) - wilson_half(p, n)));
CREATE MACRO wilson_high(p, n) AS greatest(p, least(1, wilson_centre(p, n) + wilson_half(p, n)));

-- Over victim seeds: the t interval, never narrower than Wilson of the mean; one seed: Wilson.
-- half is t * sd / sqrt(seeds), null for one seed; the inner least and greatest skip null.
CREATE MACRO seeds_low(p, n, half) AS
    CASE WHEN p IS NOT NULL THEN greatest(0, least(wilson_low(p, n), p - half)) END;
CREATE MACRO seeds_high(p, n, half) AS
    CASE WHEN p IS NOT NULL THEN least(1, greatest(wilson_high(p, n), p + half)) END;
