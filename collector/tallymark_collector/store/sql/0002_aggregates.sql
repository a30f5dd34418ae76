-- Hours: a cache over usage_point that a refresher keeps, and views that are right whether it has been kept or not.
--
-- Whoever adds points also adds marks, in the same transaction. A refresher locks the keys it took, deletes their
-- marks, and in a later statement recomputes those hours from the points. So the snapshot of the recomputation holds
-- the points of every mark that was deleted, and whatever commits afterwards brings a mark of its own. Marks are never
-- merged (no unique key): a merged mark could be deleted by a refresher that cannot see the later point.

CREATE TABLE usage_hour (
    bucket   timestamptz NOT NULL,  -- the hour's start, UTC
    series   uuid        NOT NULL,
    account  text        NOT NULL,
    tenant   text        NOT NULL,
    quantity numeric     NOT NULL,
    points   bigint      NOT NULL,
    PRIMARY KEY (account, bucket, series)
);
-- All accounts of a day; the primary key serves one account over time.
CREATE INDEX usage_hour_bucket ON usage_hour (bucket);

CREATE TABLE usage_dirty (
    bucket  timestamptz NOT NULL,
    account text        NOT NULL,
    tenant  text        NOT NULL
);
CREATE INDEX usage_dirty_key ON usage_dirty (account, tenant, bucket);

-- Clean hours from the cache, hours with marks from the points: one statement, one snapshot, never a stale sum.
CREATE VIEW usage_hour_current AS
SELECT h.tenant, h.account, h.bucket, h.series, h.quantity, h.points
FROM usage_hour h
WHERE NOT EXISTS (
    SELECT FROM usage_dirty d
    WHERE d.account = h.account AND d.bucket = h.bucket AND d.tenant = h.tenant
)
UNION ALL
SELECT p.tenant, p.account, d.bucket, p.series, sum(p.quantity), count(*)
FROM (SELECT DISTINCT tenant, account, bucket FROM usage_dirty) d
JOIN usage_point p
  ON p.account = d.account AND p.tenant = d.tenant
 AND p.time >= d.bucket AND p.time < d.bucket + interval '1 hour'
GROUP BY p.tenant, p.account, d.bucket, p.series;

-- PUBLIC. Usage by hour of event time (UTC) and by every dimension.
CREATE VIEW usage_hourly AS
SELECT h.tenant, h.account, s.meter, s.unit, h.bucket,
       s.plan, s.route, s.method, s.status_code, s.error_type, s.attributes,
       h.quantity, h.points
FROM usage_hour_current h
JOIN usage_series s ON s.account = h.account AND s.series = h.series;

-- PUBLIC. Usage by day (UTC) and by every dimension.
CREATE VIEW usage_daily AS
SELECT h.tenant, h.account, s.meter, s.unit, h.bucket,
       s.plan, s.route, s.method, s.status_code, s.error_type, s.attributes,
       h.quantity, h.points
FROM (
    SELECT tenant, account, date_bin('1 day', bucket, 'epoch') AS bucket, series,
           sum(quantity) AS quantity, sum(points)::bigint AS points
    FROM usage_hour_current
    GROUP BY tenant, account, date_bin('1 day', bucket, 'epoch'), series
) h
JOIN usage_series s ON s.account = h.account AND s.series = h.series;

-- PUBLIC. Single calls behind the usage.
CREATE VIEW usage_calls AS
SELECT tenant, account, meter, time, quantity, encode(trace_id, 'hex') AS trace_id, encode(span_id, 'hex') AS span_id,
       name, service, user_id, attributes, time - start_time AS duration
FROM usage_evidence;
