-- Usage by what a plan bills it by, where that is not a sum: the number of events, the largest, the latest, how many
-- different values an attribute had.

-- One account and one range, `[starts, ends)`. `declared` has an entry for each meter, {"aggregation": …, "of": …}, as a
-- plan's document has them under "aggregations". One row for each meter and unit with points in the range. `quantity` is
-- NULL where there is a `problem`: never a number that is too small. `unnamed`: of a unique meter, the quantity of what
-- lacks the attribute and so is no value.
--
-- Unique values come from the hours (and from points beside whole hours): a value counts if its usage in the range adds up
-- to more than nothing, whatever corrections it took. The others look at single points, and so need points that stand
-- for something. What was taken from running totals does not: its pieces depend on when totals were sent and came. Nor
-- do the SDK's points, which are sums of an interval that grows while a collector cannot be reached.
--
-- With its owner's rights, as the views: readers of the public views have none on the tables.
CREATE FUNCTION usage_aggregated(
    in_tenant text, in_account text, starts timestamptz, ends timestamptz, declared jsonb
) RETURNS TABLE (
    meter text, unit text, aggregation text, quantity numeric, points bigint, unnamed numeric, problem text
)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = tallymark, pg_temp AS $$
WITH wanted AS (
    SELECT s.series, s.meter, s.unit, d.value ->> 'aggregation' AS aggregation, s.attributes ->> (d.value ->> 'of') AS named
    FROM jsonb_each(declared) d
    JOIN usage_series s ON s.account = in_account AND s.tenant = in_tenant AND s.meter = d.key
), bounds AS (
    SELECT date_bin('1 hour', starts + interval '1 hour' - interval '1 microsecond', 'epoch') AS first_hour,
           date_bin('1 hour', ends, 'epoch') AS last_hour,
           (SELECT points_from FROM usage_kept) AS points_from
), single AS (
    SELECT w.meter, w.unit, p.time, p.quantity, s.temporality <> 1 OR s.scope = 'tallymark' AS is_part
    FROM usage_point p
    JOIN wanted w ON w.series = p.series AND w.aggregation IN ('count', 'max', 'latest')
    JOIN usage_stream s ON s.account = p.account AND s.stream = p.stream
    WHERE p.account = in_account AND p.tenant = in_tenant AND p.time >= starts AND p.time < ends
      AND EXISTS (SELECT FROM wanted WHERE wanted.aggregation IN ('count', 'max', 'latest'))
), of_points AS (
    SELECT x.meter, x.unit, count(*) AS points, max(x.quantity) AS largest,
           max(x.quantity) FILTER (WHERE x.time = x.latest) AS latest, bool_or(x.is_part) AS is_part
    FROM (SELECT single.*, max(single.time) OVER (PARTITION BY single.meter, single.unit) AS latest FROM single) x
    GROUP BY x.meter, x.unit
), pieces AS (
    SELECT h.series, h.quantity, h.points
    FROM usage_hour_current h, bounds b
    WHERE h.account = in_account AND h.tenant = in_tenant AND h.bucket >= b.first_hour AND h.bucket < b.last_hour
    UNION ALL
    SELECT p.series, p.quantity, 1
    FROM usage_point p, bounds b
    WHERE p.account = in_account AND p.tenant = in_tenant AND p.time >= starts AND p.time < least(b.first_hour, ends)
    UNION ALL
    SELECT p.series, p.quantity, 1
    FROM usage_point p, bounds b
    WHERE p.account = in_account AND p.tenant = in_tenant AND p.time >= greatest(b.first_hour, b.last_hour) AND p.time < ends
), of_values AS (
    SELECT v.meter, v.unit, count(v.named) FILTER (WHERE v.quantity > 0) AS different, sum(v.points)::bigint AS points,
           coalesce(sum(v.quantity) FILTER (WHERE v.named IS NULL), 0) AS unnamed
    FROM (
        SELECT w.meter, w.unit, w.named, sum(p.quantity) AS quantity, sum(p.points) AS points
        FROM pieces p JOIN wanted w ON w.series = p.series
        GROUP BY w.meter, w.unit, w.named
    ) v
    GROUP BY v.meter, v.unit
), found AS (
    SELECT m.meter, m.unit, m.aggregation, coalesce(u.points, 0) AS points,
           CASE m.aggregation WHEN 'unique' THEN coalesce(u.unnamed, 0) ELSE 0 END AS unnamed,
           d.edge_dropped,
           CASE m.aggregation
               WHEN 'count' THEN o.points
               WHEN 'max' THEN o.largest
               WHEN 'latest' THEN o.latest
               WHEN 'unique' THEN u.different
           END::numeric AS quantity,
           CASE
               WHEN m.aggregation NOT IN ('count', 'max', 'latest', 'unique')
                   THEN format('this version of the database does not know the aggregation %s', m.aggregation)
               WHEN d.edge_dropped OR m.aggregation <> 'unique' AND starts < b.points_from
                   THEN format('points before %s have been dropped',
                               to_char(b.points_from AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"'))
               WHEN o.is_part
                   THEN 'it needs points that stand for one event each, and some are running totals or sums that the SDK'
                        ' made over an interval: bill those by sum or unique'
           END AS problem
    FROM (SELECT DISTINCT wanted.meter, wanted.unit, wanted.aggregation FROM wanted) m
    CROSS JOIN bounds b
    CROSS JOIN LATERAL (
        SELECT starts < least(b.points_from, b.first_hour, ends)
            OR greatest(b.first_hour, b.last_hour) < least(b.points_from, ends) AS edge_dropped
    ) d
    LEFT JOIN of_points o ON o.meter = m.meter AND o.unit = m.unit
    LEFT JOIN of_values u ON u.meter = m.meter AND u.unit = m.unit
)
SELECT f.meter, f.unit, f.aggregation, CASE WHEN f.problem IS NULL THEN f.quantity END, f.points, f.unnamed, f.problem
FROM found f
WHERE f.points > 0 OR f.edge_dropped
$$;
REVOKE EXECUTE ON FUNCTION usage_aggregated(text, text, timestamptz, timestamptz, jsonb) FROM PUBLIC;

-- PUBLIC. Usage by billing period of what its plan bills by something else than a sum, by the version of the plan that
-- prices the period (billing/records.py has the same rule).
CREATE VIEW usage_by_period_aggregated AS
SELECT b.tenant, b.account, b.period_start, b.period_end, b.plan, u.meter, u.unit, u.aggregation, u.quantity, u.points,
       u.problem
FROM billing_period b
CROSS JOIN LATERAL (
    SELECT v.document -> 'aggregations' AS declared
    FROM plan_version v
    WHERE v.tenant = b.tenant AND v.plan = b.plan
    ORDER BY v.applied_at < b.period_end DESC, CASE WHEN v.applied_at < b.period_end THEN -v.version ELSE v.version END
    LIMIT 1
) v
CROSS JOIN LATERAL usage_aggregated(b.tenant, b.account, b.period_start, b.period_end, v.declared) u
WHERE v.declared IS NOT NULL;
