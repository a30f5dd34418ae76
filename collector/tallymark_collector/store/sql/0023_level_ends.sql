-- A stream of levels may say itself that it has ended (OpenTelemetry's "no recorded value", Prometheus' staleness marker). It
-- has a row of value 0 then, with a `part` of -1001 less the time's nanoseconds below 1 us; a level that it has at that very
-- time counts instead. Of a level that a file of meters took, the row has its source: whatever comes late is put before or
-- after it. (Rows of a part from -1000 to -1 end what is billed as something else from then on: 0017_level_sources.sql.)
--
-- What follows is usage_aggregated as 0016_own_usage.sql has it, with `told` to `sampled`. With `across` "latest" the
-- streams of one series tell of the same thing. There an end counts once no other one of them lives: whoever takes the
-- place of a process that has ended has told by then what both stand at.
CREATE OR REPLACE FUNCTION usage_aggregated(
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
           k.points_from, k.levels_from
    FROM usage_kept k
), single AS (
    SELECT w.meter, w.unit, p.time, p.quantity,
           s.temporality <> 1 OR s.scope = 'tallymark' OR p.start_time < p.time AS is_part
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
           bool_or(v.quantity > 0 AND position('REDACTED' IN v.named) > 0) AS redacted,
           coalesce(sum(v.quantity) FILTER (WHERE v.named IS NULL), 0) AS unnamed
    FROM (
        SELECT w.meter, w.unit, w.named, sum(p.quantity) AS quantity, sum(p.points) AS points
        FROM pieces p JOIN wanted w ON w.series = p.series
        GROUP BY w.meter, w.unit, w.named
    ) v
    GROUP BY v.meter, v.unit
), told AS (
    SELECT w.meter, w.unit, w.stale, w.across, l.series, l.stream, l.time, l.part, l.value
    FROM usage_level l
    JOIN wanted w ON w.series = l.series AND w.aggregation IN ('max', 'latest', 'average', 'integral')
    WHERE l.account = in_account AND l.tenant = in_tenant AND l.time < ends
      AND l.time > starts - (SELECT max(wanted.stale) FROM wanted) AND l.time > starts - w.stale
), living AS (
    -- Of what tells of the same thing: until when each that was told would hold by itself. What has ended holds nothing.
    SELECT t.*, CASE WHEN t.part >= 0 THEN least(
               lead(t.time) OVER (PARTITION BY t.series, t.stream ORDER BY t.time, t.part), t.time + t.stale
           ) END AS until
    FROM told t
    WHERE t.across = 'latest'
), counted AS (
    SELECT t.meter, t.unit, t.stale, t.stream AS holder, t.time, t.part, t.value FROM told t
    WHERE t.across IS DISTINCT FROM 'latest'
    UNION ALL
    -- While another one lives, what was told last holds, whoever of them has ended; and where nobody tells anything until
    -- then, it ends with the one that lives longest.
    SELECT x.meter, x.unit, x.stale, x.series, x.at, x.part, x.value
    FROM (
        SELECT z.*, CASE WHEN z.part <= -1001 AND z.living > z.time THEN z.living ELSE z.time END AS at
        FROM (
            SELECT y.*, max(y.until) OVER (PARTITION BY y.series ORDER BY y.time) AS living,
                   lead(y.time) OVER (PARTITION BY y.series ORDER BY y.time, y.part, y.stream) AS next
            FROM living y
        ) z
    ) x
    WHERE x.at = x.time OR (x.at < ends AND (x.next IS NULL OR x.next >= x.at))
), sampled AS (
    SELECT c.meter, c.unit, c.stale, c.holder, c.time,
           (array_agg(c.value ORDER BY c.part DESC, c.value DESC))[1] AS value,
           count(*) FILTER (WHERE c.time >= starts) AS samples
    FROM counted c
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
    -- Where nothing is told it stands at 0, at the beginning too, which matters to levels below.
    SELECT s.meter, s.unit, CASE WHEN min(s.at) > starts THEN greatest(max(s.level), 0) ELSE max(s.level) END AS largest,
           max(s.level) FILTER (WHERE s.at = l.last) AS latest
    FROM steps s JOIN of_levels l ON l.meter = s.meter AND l.unit = s.unit
    WHERE s.at < ends
    GROUP BY s.meter, s.unit
), levels_dropped AS (
    -- Of each stream its last level from before stays, which tells that there were some.
    SELECT DISTINCT w.meter, w.unit
    FROM bounds b
    JOIN usage_level l ON l.account = in_account AND l.tenant = in_tenant AND l.time < b.levels_from
    JOIN wanted w ON w.series = l.series AND w.aggregation IN ('max', 'latest', 'average', 'integral')
    WHERE starts < b.levels_from
), found AS (
    SELECT m.meter, m.unit, m.aggregation, coalesce(u.points, 0) + coalesce(l.samples, 0) AS points,
           CASE m.aggregation WHEN 'unique' THEN coalesce(u.unnamed, 0) ELSE 0 END AS unnamed,
           l.seconds IS NOT NULL OR g.meter IS NOT NULL AS has_levels, d.edge_dropped,
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
                   OR d.edge_dropped AND l.seconds IS NULL AND g.meter IS NULL
                   THEN format('points before %s have been dropped',
                               to_char(b.points_from AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"'))
               WHEN g.meter IS NOT NULL
                   THEN format('levels before %s have been dropped',
                               to_char(b.levels_from AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"'))
               WHEN m.aggregation = 'unique' AND u.redacted
                   THEN 'values of its attribute were redacted because they are credentials: how many different ones they'
                        ' were nobody knows. Have it name them in an attribute that is no secret'
               WHEN o.is_part
                   THEN 'it needs points that stand for one event each, and some are running totals or sums over an'
                        ' interval, each of which may be many events: bill those by sum or unique'
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
    LEFT JOIN levels_dropped g ON g.meter = m.meter AND g.unit = m.unit
    LEFT JOIN of_steps t ON t.meter = m.meter AND t.unit = m.unit
)
SELECT f.meter, f.unit, f.aggregation, CASE WHEN f.problem IS NULL THEN f.quantity END, f.points, f.unnamed, f.problem
FROM found f
WHERE f.points > 0 OR f.has_levels OR f.edge_dropped
$$;
