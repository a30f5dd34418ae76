-- Running totals that a file of meters takes from other people's telemetry belong to their source: the sender's stream and
-- the meter. Whom the file bills for them may change while they run, and then they count on from where they were.

-- Sources, for whoever writes their totals: one transaction at a time has a source's row. Not by account, since that is what
-- may change.
CREATE TABLE usage_source (
    source      uuid        NOT NULL PRIMARY KEY,  -- 128 bits over tenant, the sender's stream, meter and quantity
    tenant      text        NOT NULL,
    recorded_at timestamptz NOT NULL DEFAULT now()
);

-- Of a total that a file of meters took: its source, and how the increase that ends in it is billed: to the row's account
-- and stream, as this series. Without a series it is billed as nothing: an earlier version did, and later ones count from
-- it. `value` is what was measured times `factor`; `since_ns` is what the file said since when it counts, 0 if nothing.
ALTER TABLE usage_sample
    ADD COLUMN source uuid,
    ADD COLUMN series uuid,
    ADD COLUMN factor numeric,
    ADD COLUMN since_ns bigint;
CREATE INDEX usage_sample_source ON usage_sample (source, start_ns, time_ns) WHERE source IS NOT NULL;

-- Levels before `levels_from` have been dropped, but for the last one of each stream: it reaches into the time after.
ALTER TABLE usage_kept ADD COLUMN levels_from timestamptz NOT NULL DEFAULT '-infinity';

-- As of points: a level of a time that has been dropped cannot be told from one that was there. The lock is shared by
-- writers; who drops takes it alone.
CREATE FUNCTION usage_level_is_kept() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    kept timestamptz;
BEGIN
    PERFORM pg_advisory_xact_lock_shared(hashtextextended('tallymark.usage_kept', 0));
    SELECT levels_from INTO kept FROM tallymark.usage_kept;
    IF kept > '-infinity' AND EXISTS (SELECT FROM told WHERE told.time < kept) THEN
        RAISE EXCEPTION 'levels before % have been dropped: an older one cannot be told from one that was there', kept
            USING ERRCODE = 'datetime_field_overflow';
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER usage_level_is_kept AFTER INSERT ON usage_level
    REFERENCING NEW TABLE AS told FOR EACH STATEMENT EXECUTE FUNCTION usage_level_is_kept();

-- As it was (0012), and a range that begins before levels were dropped is refused like one of points.
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
    LEFT JOIN levels_dropped g ON g.meter = m.meter AND g.unit = m.unit
    LEFT JOIN of_steps t ON t.meter = m.meter AND t.unit = m.unit
)
SELECT f.meter, f.unit, f.aggregation, CASE WHEN f.problem IS NULL THEN f.quantity END, f.points, f.unnamed, f.problem
FROM found f
WHERE f.points > 0 OR f.has_levels OR f.edge_dropped
$$;
