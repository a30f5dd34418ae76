-- Days over the hours, kept as the hours are kept over the points; and periods that are summed from them.
--
-- Whoever deletes an hour's marks has made that hour again in the same transaction. Here the database itself notes then
-- that the hour's day is out of date, whichever version of the collector it was. A refresher locks the days that it
-- took, deletes their marks, and in a later statement sums them from the hours: so whatever it does not see commits
-- afterwards, with a mark of its own. A day is read from usage_day only where it has no mark and none of its hours has.

-- No hour is made again from here to the commit; points are written meanwhile.
SELECT pg_advisory_xact_lock(hashtextextended('tallymark.refreshing', 0));

-- Append-only like usage_dirty. This and the next are empty where the database keeps the days.
CREATE TABLE usage_day_dirty (
    bucket  timestamptz NOT NULL,  -- the day's start, UTC
    account text        NOT NULL,
    tenant  text        NOT NULL
);
CREATE INDEX usage_day_dirty_key ON usage_day_dirty (account, tenant, bucket);

-- Days that were made again and have not been compared with their hours since, as usage_unaudited has the hours.
CREATE TABLE usage_day_unaudited (
    bucket  timestamptz NOT NULL,
    account text        NOT NULL,
    tenant  text        NOT NULL
);

-- As its owner: a collector of before, whose role knows nothing of days, may go on keeping hours.
CREATE FUNCTION usage_day_is_dirty() RETURNS trigger LANGUAGE plpgsql
SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    -- A continuous aggregate of hours is made again together with that of the days.
    IF (SELECT relkind = 'r' FROM pg_class WHERE oid = 'tallymark.usage_hour'::regclass) THEN
        INSERT INTO tallymark.usage_day_dirty (bucket, account, tenant)
        SELECT DISTINCT date_bin('24 hours', bucket, 'epoch'), account, tenant FROM made_again;
    END IF;
    RETURN NULL;
END $$;
REVOKE EXECUTE ON FUNCTION usage_day_is_dirty FROM PUBLIC;

-- Whoever empties the hours empties what was made from them.
CREATE FUNCTION usage_hour_was_emptied() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    TRUNCATE tallymark.usage_day, tallymark.usage_day_dirty;
    RETURN NULL;
END $$;

DO $$
BEGIN
    -- Continuous aggregates have days already.
    IF (SELECT relkind = 'v' FROM pg_class WHERE oid = 'usage_hour'::regclass) THEN
        CREATE VIEW usage_day_marked AS
        SELECT tenant, account, date_bin('24 hours', bucket, 'epoch') AS bucket FROM usage_dirty;
        RETURN;
    END IF;
    -- They were about to be made when a `migrate` was interrupted: the next one finishes them under this name.
    IF to_regclass('usage_day') IS NOT NULL THEN
        EXECUTE 'ALTER MATERIALIZED VIEW usage_day RENAME TO usage_day_native';
    END IF;
    CREATE TABLE usage_day (
        bucket   timestamptz NOT NULL,  -- the day's start, UTC
        series   uuid        NOT NULL,
        account  text        NOT NULL,
        tenant   text        NOT NULL,
        quantity numeric     NOT NULL,
        points   bigint      NOT NULL,
        PRIMARY KEY (account, bucket, series)
    );
    -- All accounts of a month; the primary key serves one account over time.
    CREATE INDEX usage_day_bucket ON usage_day (bucket);
    -- Hours with marks are summed as they are: they are not read from the days before they were made again.
    INSERT INTO usage_day (bucket, series, account, tenant, quantity, points)
    SELECT date_bin('24 hours', bucket, 'epoch'), series, account, tenant, sum(quantity), sum(points)
    FROM usage_hour GROUP BY 1, 2, 3, 4;
    -- Days that have a mark, or an hour with one.
    CREATE VIEW usage_day_marked AS
    SELECT tenant, account, bucket FROM usage_day_dirty
    UNION ALL
    SELECT tenant, account, date_bin('24 hours', bucket, 'epoch') FROM usage_dirty;
END $$;

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
-- above.
CREATE OR REPLACE VIEW usage_by_period AS
SELECT u.tenant, u.account, u.period_start, u.period_end, u.plan, s.meter, s.unit,
       sum(u.quantity) AS quantity, sum(u.points)::bigint AS points
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
    SELECT b.tenant, b.account, b.period_start, b.period_end, b.plan, h.series, h.quantity, h.points
    FROM billing_period b
    CROSS JOIN LATERAL (
        SELECT date_bin('1 hour', b.period_start + interval '1 hour' - interval '1 microsecond', 'epoch') AS first_hour,
               date_bin('1 hour', b.period_end, 'epoch') AS last_hour,
               date_bin('24 hours', b.period_start + interval '24 hours' - interval '1 microsecond', 'epoch') AS first_day,
               date_bin('24 hours', b.period_end, 'epoch') AS last_day
    ) e
    CROSS JOIN LATERAL (
        SELECT starts, ends
        FROM (VALUES (e.first_hour, least(e.first_day, e.last_hour)),
                     (greatest(e.first_day, e.last_day), e.last_hour)) edges (starts, ends)
        WHERE starts < ends
        UNION ALL
        SELECT d.bucket, d.bucket + interval '24 hours'
        FROM usage_day_marked d
        WHERE d.account = b.account AND d.tenant = b.tenant AND d.bucket >= e.first_day AND d.bucket < e.last_day
        GROUP BY d.bucket
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
) u
JOIN usage_series s ON s.account = u.account AND s.series = u.series
GROUP BY u.tenant, u.account, u.period_start, u.period_end, u.plan, s.meter, s.unit;

-- Last, since writers wait for it until the commit.
DO $$
BEGIN
    IF (SELECT relkind = 'r' FROM pg_class WHERE oid = 'usage_hour'::regclass) THEN
        CREATE TRIGGER usage_hour_was_emptied AFTER TRUNCATE ON usage_hour
            FOR EACH STATEMENT EXECUTE FUNCTION usage_hour_was_emptied();
    END IF;
END $$;
CREATE TRIGGER usage_day_is_dirty AFTER DELETE ON usage_dirty
    REFERENCING OLD TABLE AS made_again FOR EACH STATEMENT EXECUTE FUNCTION usage_day_is_dirty();
