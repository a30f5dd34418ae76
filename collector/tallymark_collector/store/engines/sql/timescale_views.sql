-- The views over continuous aggregates: those of the migration that brought the days, but for which days have marks. Made
-- again after every migration, since one of those may have made the plain ones again, and when the aggregates take the
-- place of the collector's tables. GROUP BY where one would write DISTINCT: TimescaleDB's SkipScan fails on that ("ScanKey
-- for skip qual not found", 2.29.2).

-- Days that have an hour with a mark: an hour and its day are made again before the mark goes.
CREATE OR REPLACE VIEW usage_day_marked AS
SELECT tenant, account, date_bin('24 hours', bucket, 'epoch') AS bucket FROM usage_dirty;

-- Clean hours from the hours, hours with marks from the points: one statement, one snapshot, never a stale sum.
CREATE OR REPLACE VIEW usage_hour_current AS
SELECT h.tenant, h.account, h.bucket, h.series, h.quantity, h.points
FROM usage_hour h
WHERE NOT EXISTS (
    SELECT FROM usage_dirty d
    WHERE d.account = h.account AND d.bucket = h.bucket AND d.tenant = h.tenant
)
UNION ALL
SELECT p.tenant, p.account, d.bucket, p.series, sum(p.quantity), count(*)
FROM (SELECT tenant, account, bucket FROM usage_dirty GROUP BY 1, 2, 3) d
JOIN usage_point p
  ON p.account = d.account AND p.tenant = d.tenant
 AND p.time >= d.bucket AND p.time < d.bucket + interval '1 hour'
GROUP BY p.tenant, p.account, d.bucket, p.series;

-- Days without a mark from the days, the others from their hours, and hours with marks from the points. '24 hours': for
-- timestamptz '1 day' is a day of the session's time zone, which may have 23 or 25. OFFSET 0: hours and points are looked
-- up for one mark after the other, never all of them read and compared with the marks.
CREATE OR REPLACE VIEW usage_day_current AS
SELECT y.tenant, y.account, y.bucket, y.series, y.quantity, y.points::bigint AS points
FROM usage_day y
WHERE NOT EXISTS (
    SELECT FROM usage_day_marked d
    WHERE d.account = y.account AND d.bucket = y.bucket AND d.tenant = y.tenant
)
UNION ALL
SELECT m.tenant, m.account, m.bucket, m.series, sum(m.quantity), sum(m.points)::bigint
FROM (
    SELECT d.tenant, d.account, d.bucket, h.series, h.quantity, h.points
    FROM (SELECT tenant, account, bucket FROM usage_day_marked GROUP BY 1, 2, 3) d
    CROSS JOIN LATERAL (
        SELECT account, tenant, bucket, series, quantity, points FROM usage_hour
        WHERE account = d.account AND tenant = d.tenant
          AND bucket >= d.bucket AND bucket < d.bucket + interval '24 hours'
        OFFSET 0
    ) h
    WHERE NOT EXISTS (
        SELECT FROM usage_dirty w
        WHERE w.account = h.account AND w.bucket = h.bucket AND w.tenant = h.tenant
    )
    UNION ALL
    SELECT d.tenant, d.account, date_bin('24 hours', d.bucket, 'epoch'), p.series, p.quantity, 1
    FROM (SELECT tenant, account, bucket FROM usage_dirty GROUP BY 1, 2, 3) d
    CROSS JOIN LATERAL (
        SELECT series, quantity FROM usage_point
        WHERE account = d.account AND tenant = d.tenant AND time >= d.bucket AND time < d.bucket + interval '1 hour'
        OFFSET 0
    ) p
) m
GROUP BY m.tenant, m.account, m.bucket, m.series;

-- PUBLIC. Usage by day (UTC) and by every dimension.
CREATE OR REPLACE VIEW usage_daily AS
SELECT y.tenant, y.account, s.meter, s.unit, y.bucket,
       s.plan, s.route, s.method, s.status_code, s.error_type, s.attributes,
       y.quantity, y.points
FROM usage_day_current y
JOIN usage_series s ON s.account = y.account AND s.series = y.series;

-- PUBLIC. Usage by billing period: whole days (UTC) from the days; hours at a period's edges, and of days with marks,
-- from the hours; pieces of hours at the edges (time zones with half-hour offsets), and hours with marks, from the
-- points. Each table stands here once: a hypertable costs a plan its pieces every time that it is named. OFFSET 0 as
-- above. Pieces whose points were dropped are summed in usage_edge; of one that is not there nobody knows how much of its
-- hour it had, so that what its hour has used has no number here, never one that is too small.
CREATE OR REPLACE VIEW usage_by_period AS
SELECT u.tenant, u.account, u.period_start, u.period_end, u.plan, s.meter, s.unit,
       CASE WHEN count(u.quantity) = count(*) THEN sum(u.quantity) END AS quantity,
       CASE WHEN count(u.quantity) = count(*) THEN sum(u.points)::bigint END AS points
FROM (
    SELECT b.tenant, b.account, b.period_start, b.period_end, b.plan, y.series, y.quantity, y.points::bigint AS points
    FROM billing_period b
    JOIN usage_day y
      ON y.account = b.account AND y.tenant = b.tenant
     AND y.bucket >= date_bin('24 hours', b.period_start + interval '24 hours' - interval '1 microsecond', 'epoch')
     AND y.bucket < date_bin('24 hours', b.period_end, 'epoch')
    WHERE NOT EXISTS (
        SELECT FROM usage_day_marked d
        WHERE d.account = y.account AND d.bucket = y.bucket AND d.tenant = y.tenant
    )
    UNION ALL
    SELECT b.tenant, b.account, b.period_start, b.period_end, b.plan, h.series,
           CASE WHEN part.known THEN h.quantity END, CASE WHEN part.known THEN h.points END
    FROM billing_period b
    CROSS JOIN LATERAL (
        SELECT date_bin('1 hour', b.period_start + interval '1 hour' - interval '1 microsecond', 'epoch') AS first_hour,
               date_bin('1 hour', b.period_end, 'epoch') AS last_hour,
               date_bin('24 hours', b.period_start + interval '24 hours' - interval '1 microsecond', 'epoch') AS first_day,
               date_bin('24 hours', b.period_end, 'epoch') AS last_day
    ) e
    CROSS JOIN LATERAL (
        SELECT starts, ends, true AS known
        FROM (VALUES (e.first_hour, least(e.first_day, e.last_hour)),
                     (greatest(e.first_day, e.last_day), e.last_hour)) edges (starts, ends)
        WHERE starts < ends
        UNION ALL
        SELECT d.bucket, d.bucket + interval '24 hours', true
        FROM usage_day_marked d
        WHERE d.account = b.account AND d.tenant = b.tenant AND d.bucket >= e.first_day AND d.bucket < e.last_day
        GROUP BY d.bucket
        UNION ALL
        SELECT date_bin('1 hour', x.starts, 'epoch'), date_bin('1 hour', x.starts, 'epoch') + interval '1 hour', false
        FROM (VALUES (b.period_start, least(e.first_hour, b.period_end)),
                     (greatest(e.first_hour, e.last_hour), b.period_end)) x (starts, ends)
        WHERE x.starts < x.ends AND x.starts < (SELECT points_from FROM usage_kept)
          AND NOT EXISTS (
              SELECT FROM usage_edge k
              WHERE k.account = b.account AND k.tenant = b.tenant AND k.starts = x.starts AND k.ends = x.ends
          )
    ) part
    CROSS JOIN LATERAL (
        SELECT account, tenant, bucket, series, quantity, points FROM usage_hour
        WHERE account = b.account AND tenant = b.tenant AND bucket >= part.starts AND bucket < part.ends
        OFFSET 0
    ) h
    WHERE NOT EXISTS (
        SELECT FROM usage_dirty d
        WHERE d.account = h.account AND d.bucket = h.bucket AND d.tenant = h.tenant
    )
    UNION ALL
    SELECT b.tenant, b.account, b.period_start, b.period_end, b.plan, p.series, p.quantity, 1
    FROM billing_period b
    CROSS JOIN LATERAL (
        SELECT date_bin('1 hour', b.period_start + interval '1 hour' - interval '1 microsecond', 'epoch') AS first_hour,
               date_bin('1 hour', b.period_end, 'epoch') AS last_hour
    ) e
    CROSS JOIN LATERAL (
        SELECT starts, ends
        FROM (VALUES (b.period_start, least(e.first_hour, b.period_end)),
                     (greatest(e.first_hour, e.last_hour), b.period_end)) edges (starts, ends)
        WHERE starts < ends
        UNION ALL
        SELECT d.bucket, d.bucket + interval '1 hour'
        FROM usage_dirty d
        WHERE d.account = b.account AND d.tenant = b.tenant AND d.bucket >= e.first_hour AND d.bucket < e.last_hour
        GROUP BY d.bucket
    ) part
    CROSS JOIN LATERAL (
        SELECT series, quantity FROM usage_point
        WHERE account = b.account AND tenant = b.tenant AND time >= part.starts AND time < part.ends
        OFFSET 0
    ) p
    UNION ALL
    SELECT b.tenant, b.account, b.period_start, b.period_end, b.plan, p.series, p.quantity, p.points
    FROM billing_period b
    CROSS JOIN LATERAL (
        SELECT date_bin('1 hour', b.period_start + interval '1 hour' - interval '1 microsecond', 'epoch') AS first_hour,
               date_bin('1 hour', b.period_end, 'epoch') AS last_hour
    ) e
    CROSS JOIN LATERAL (
        VALUES (b.period_start, least(e.first_hour, b.period_end)),
               (greatest(e.first_hour, e.last_hour), b.period_end)
    ) x (starts, ends)
    JOIN usage_edge k
      ON k.account = b.account AND k.tenant = b.tenant AND k.starts = x.starts AND k.ends = x.ends
     AND k.starts < (SELECT points_from FROM usage_kept)
    CROSS JOIN LATERAL unnest(k.series, k.quantity, k.points) p (series, quantity, points)
) u
JOIN usage_series s ON s.account = u.account AND s.series = u.series
GROUP BY u.tenant, u.account, u.period_start, u.period_end, u.plan, s.meter, s.unit;
