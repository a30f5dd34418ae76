-- The views over continuous aggregates: the columns and the rules of sql/0002_aggregates.sql. Made again after every
-- migration, since one of those may have made the plain ones again. GROUP BY where one would write DISTINCT: TimescaleDB's
-- SkipScan fails on that ("ScanKey for skip qual not found", 2.29.2).

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

-- Days without a mark from the days, the others from their hours.
CREATE OR REPLACE VIEW usage_daily AS
SELECT h.tenant, h.account, s.meter, s.unit, h.bucket,
       s.plan, s.route, s.method, s.status_code, s.error_type, s.attributes,
       h.quantity, h.points
FROM (
    SELECT y.tenant, y.account, y.bucket, y.series, y.quantity, y.points::bigint AS points
    FROM usage_day y
    WHERE NOT EXISTS (
        SELECT FROM usage_dirty d
        WHERE d.account = y.account AND d.tenant = y.tenant AND date_bin('1 day', d.bucket, 'epoch') = y.bucket
    )
    UNION ALL
    SELECT c.tenant, c.account, d.bucket, c.series, sum(c.quantity), sum(c.points)::bigint
    FROM (SELECT tenant, account, date_bin('1 day', bucket, 'epoch') AS bucket FROM usage_dirty GROUP BY 1, 2, 3) d
    JOIN usage_hour_current c
      ON c.account = d.account AND c.tenant = d.tenant
     AND c.bucket >= d.bucket AND c.bucket < d.bucket + interval '1 day'
    GROUP BY c.tenant, c.account, d.bucket, c.series
) h
JOIN usage_series s ON s.account = h.account AND s.series = h.series;
