-- Continuous aggregates: hours over the points, days over the hours. UTC and of fixed width: months and zones with a
-- name lose a bucket when an invalidation ends on its start. Only what was materialised is shown: a real-time
-- aggregate would not show late points either, and the marks tell which hours to take from the points.
CREATE MATERIALIZED VIEW IF NOT EXISTS usage_hour_native
WITH (timescaledb.continuous, timescaledb.materialized_only = true, timescaledb.create_group_indexes = false) AS
SELECT {extension}.time_bucket('1 hour', time) AS bucket, series, account, tenant,
       sum(quantity) AS quantity, count(*) AS points
FROM usage_point
GROUP BY 1, 2, 3, 4
WITH NO DATA;

CREATE MATERIALIZED VIEW IF NOT EXISTS usage_day_native
WITH (timescaledb.continuous, timescaledb.materialized_only = true, timescaledb.create_group_indexes = false) AS
SELECT {extension}.time_bucket('1 day', bucket) AS bucket, series, account, tenant,
       sum(quantity) AS quantity, sum(points) AS points
FROM usage_hour_native
GROUP BY 1, 2, 3, 4
WITH NO DATA;

CREATE INDEX IF NOT EXISTS usage_hour_native_account ON usage_hour_native (account, bucket);
CREATE INDEX IF NOT EXISTS usage_day_account ON usage_day_native (account, bucket);
