-- Usage by what a plan bills it by, where that is not a sum: the number of events, the largest, the latest, how many
-- different values an attribute had; and of levels their average and their integral over time.

-- What a stream stood at, as gauges and sums that may fall (UpDownCounter) tell it. Not additive: never in usage_point, and
-- so in no sum. Rows are only ever added; a stream has one value at a time. They are few, one for each stream and interval,
-- and are kept for ever.
CREATE TABLE usage_level (
    time        timestamptz NOT NULL,
    recorded_at timestamptz NOT NULL DEFAULT now(),
    stream      uuid        NOT NULL,
    series      uuid        NOT NULL,
    part        smallint    NOT NULL,  -- the time's nanoseconds below 1 us
    account     text        NOT NULL,
    tenant      text        NOT NULL,
    value       numeric     NOT NULL,
    PRIMARY KEY (account, time, stream, part)
);

-- PUBLIC. Single levels as they were told.
CREATE VIEW usage_levels AS
SELECT l.tenant, l.account, s.meter, s.unit, l.time, l.value, s.attributes, l.stream, l.recorded_at
FROM usage_level l
JOIN usage_series s ON s.account = l.account AND s.series = l.series;

-- One account and one range, `[starts, ends)`. `declared` has an entry for each meter, {"aggregation": …, "of": …, "across":
-- …, "stale_after": seconds}, as a plan's document has them under "aggregations". One row for each meter and unit with
-- points or levels in the range. `quantity` is NULL where there is a `problem`: never a number that is too small. `unnamed`: of a unique meter, the quantity of what
-- lacks the attribute and so is no value.
--
-- Unique values come from the hours (and from points beside whole hours): a value counts if its usage in the range adds up
-- to more than nothing, whatever corrections it took. The others look at single points, and so need points that stand
-- for something. What was taken from running totals does not: its pieces depend on when totals were sent and came. Nor
-- do the SDK's points, which are sums of an interval that grows while a collector cannot be reached.
--
-- A level holds from its time until its stream's next, but no longer than `stale_after`, and what is outside the range is
-- cut off: a process that died goes on for that long. The account's level at a time is the sum over all streams; with
-- `across` "latest" the streams of one series tell of the same thing, and the last that any of them told holds. `max` is the
-- largest level of the range, `latest` the level at the last sample, `integral` the levels times their hours, `average` that
-- by the whole range: where nothing holds there is 0. The last two are rounded to 18 decimals. (A
-- quotient has as many decimals as its dividend: 40 are far more than any tie at the 18th needs to be told from one.)
--
-- With its owner's rights, as the views: readers of the public views have none on the tables.
CREATE FUNCTION usage_aggregated(
    in_tenant text, in_account text, starts timestamptz, ends timestamptz, declared jsonb
) RETURNS TABLE (
    meter text, unit text, aggregation text, quantity numeric, points bigint, unnamed numeric, problem text
)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = tallymark, pg_temp AS $$
WITH wanted AS (
    SELECT s.series, s.meter, s.unit, d.value ->> 'aggregation' AS aggregation, s.attributes ->> (d.value ->> 'of') AS named,
           d.value ->> 'across' AS across,
           make_interval(secs => coalesce((d.value ->> 'stale_after')::integer, 300)) AS stale
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
), sampled AS (
    SELECT w.meter, w.unit, w.stale, CASE w.across WHEN 'latest' THEN l.series ELSE l.stream END AS holder, l.time,
           (array_agg(l.value ORDER BY l.part DESC, l.value DESC))[1] AS value,
           count(*) FILTER (WHERE l.time >= starts) AS samples
    FROM usage_level l
    JOIN wanted w ON w.series = l.series AND w.aggregation IN ('max', 'latest', 'average', 'integral')
    WHERE l.account = in_account AND l.tenant = in_tenant AND l.time < ends
      AND l.time > starts - (SELECT max(wanted.stale) FROM wanted) AND l.time > starts - w.stale
    GROUP BY 1, 2, 3, 4, 5
), held AS (
    SELECT s.meter, s.unit, s.value, s.samples, greatest(s.time, starts) AS since,
           least(lead(s.time) OVER (PARTITION BY s.meter, s.unit, s.holder ORDER BY s.time), s.time + s.stale, ends) AS until
    FROM sampled s
), changes AS (
    SELECT x.meter, x.unit, x.at, sum(x.value) AS value
    FROM (
        SELECT h.meter, h.unit, h.since AS at, h.value FROM held h WHERE h.until > h.since
        UNION ALL
        SELECT h.meter, h.unit, h.until, -h.value FROM held h WHERE h.until > h.since
    ) x
    GROUP BY x.meter, x.unit, x.at
), steps AS (
    SELECT c.meter, c.unit, c.at, sum(c.value) OVER (PARTITION BY c.meter, c.unit ORDER BY c.at) AS level FROM changes c
), of_levels AS (
    SELECT h.meter, h.unit, sum(h.samples)::bigint AS samples, max(h.since) AS last,
           sum(h.value * extract(epoch FROM h.until - h.since)) AS seconds
    FROM held h WHERE h.until > h.since
    GROUP BY h.meter, h.unit
), of_steps AS (
    SELECT s.meter, s.unit, max(s.level) AS largest, max(s.level) FILTER (WHERE s.at = l.last) AS latest
    FROM steps s JOIN of_levels l ON l.meter = s.meter AND l.unit = s.unit
    WHERE s.at < ends
    GROUP BY s.meter, s.unit
), found AS (
    SELECT m.meter, m.unit, m.aggregation, coalesce(u.points, 0) + coalesce(l.samples, 0) AS points,
           CASE m.aggregation WHEN 'unique' THEN coalesce(u.unnamed, 0) ELSE 0 END AS unnamed,
           l.seconds IS NOT NULL AS has_levels, d.edge_dropped,
           CASE m.aggregation
               WHEN 'count' THEN o.points
               WHEN 'max' THEN coalesce(t.largest, o.largest)
               WHEN 'latest' THEN coalesce(t.latest, o.latest)
               WHEN 'unique' THEN u.different
               WHEN 'average' THEN trim_scale(round(round(l.seconds, 40) / nullif(extract(epoch FROM ends - starts), 0), 18))
               WHEN 'integral' THEN trim_scale(round(round(l.seconds, 40) / 3600, 18))
           END::numeric AS quantity,
           CASE
               WHEN m.aggregation NOT IN ('count', 'max', 'latest', 'unique', 'average', 'integral')
                   THEN format('this version of the database does not know the aggregation %s', m.aggregation)
               WHEN m.aggregation IN ('average', 'integral') AND u.points > 0
                   THEN 'it is made of levels, as gauges and UpDownCounters tell them, and some of its points are increases:'
                        ' bill those by sum or unique'
               WHEN l.seconds IS NOT NULL AND u.points > 0
                   THEN 'it has both increases and levels: give them two names'
               WHEN m.aggregation IN ('count', 'max', 'latest') AND u.points > 0 AND starts < b.points_from
                   OR d.edge_dropped AND l.seconds IS NULL
                   THEN format('points before %s have been dropped',
                               to_char(b.points_from AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"'))
               WHEN o.is_part
                   THEN 'it needs points that stand for one event each, and some are running totals or sums that the SDK'
                        ' made over an interval: bill those by sum or unique'
           END AS problem
    FROM (SELECT DISTINCT wanted.meter, wanted.unit, wanted.aggregation FROM wanted) m
    CROSS JOIN bounds b
    CROSS JOIN LATERAL (
        SELECT m.aggregation NOT IN ('average', 'integral')
           AND (starts < least(b.points_from, b.first_hour, ends)
                OR greatest(b.first_hour, b.last_hour) < least(b.points_from, ends)) AS edge_dropped
    ) d
    LEFT JOIN of_points o ON o.meter = m.meter AND o.unit = m.unit
    LEFT JOIN of_values u ON u.meter = m.meter AND u.unit = m.unit
    LEFT JOIN of_levels l ON l.meter = m.meter AND l.unit = m.unit
    LEFT JOIN of_steps t ON t.meter = m.meter AND t.unit = m.unit
)
SELECT f.meter, f.unit, f.aggregation, CASE WHEN f.problem IS NULL THEN f.quantity END, f.points, f.unnamed, f.problem
FROM found f
WHERE f.points > 0 OR f.has_levels OR f.edge_dropped
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
