-- What usage costs: plans by version, who is on which plan, and the periods that are billed.

-- Versions are only ever added: a period is priced by the newest version that was applied before its end (by the first
-- one where none was), so that a closed period can be priced again as it was.
CREATE TABLE plan_version (
    tenant     text        NOT NULL,
    plan       text        NOT NULL,
    version    integer     NOT NULL,  -- 1, 2, 3 …
    content    text        NOT NULL,  -- hash of what the plan says: applying the same twice adds nothing
    document   jsonb       NOT NULL,  -- the plan with its charges; decimals as strings
    applied_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (tenant, plan, version)
);

CREATE TABLE subscription (
    account    text     NOT NULL,
    tenant     text     NOT NULL,
    since      date     NOT NULL,  -- in the account's time zone, from the start of that day
    until      date,               -- the first day that is not billed
    plan       text     NOT NULL,
    anchor_day smallint NOT NULL CHECK (anchor_day BETWEEN 1 AND 31),
    time_zone  text     NOT NULL,  -- IANA
    PRIMARY KEY (account, tenant, since)
);

-- Half-open [period_start, period_end). Months of a time zone have no fixed width, so they are rows, not arithmetic.
CREATE TABLE billing_period (
    period_start timestamptz NOT NULL,
    period_end   timestamptz NOT NULL CHECK (period_end > period_start),
    account      text        NOT NULL,
    tenant       text        NOT NULL,
    since        date        NOT NULL,  -- the subscription's
    number       integer     NOT NULL,  -- the subscription's periods count from 0
    plan         text        NOT NULL,
    PRIMARY KEY (account, period_start, tenant),
    UNIQUE (account, tenant, since, number)
);

-- PUBLIC. Usage by billing period: whole hours from usage_hourly, the pieces of hours at a period's edges (time zones
-- with half-hour offsets) from the points.
CREATE VIEW usage_by_period AS
SELECT u.tenant, u.account, u.period_start, u.period_end, u.plan, s.meter, s.unit,
       sum(u.quantity) AS quantity, sum(u.points)::bigint AS points
FROM (
    SELECT b.tenant, b.account, b.period_start, b.period_end, b.plan, h.series, h.quantity, h.points
    FROM billing_period b
    JOIN usage_hour_current h
      ON h.account = b.account AND h.tenant = b.tenant
     AND h.bucket >= date_bin('1 hour', b.period_start + interval '1 hour' - interval '1 microsecond', 'epoch')
     AND h.bucket < date_bin('1 hour', b.period_end, 'epoch')
    UNION ALL
    SELECT b.tenant, b.account, b.period_start, b.period_end, b.plan, p.series, p.quantity, 1
    FROM billing_period b
    JOIN usage_point p
      ON p.account = b.account AND p.tenant = b.tenant
     AND p.time >= b.period_start
     AND p.time < date_bin('1 hour', b.period_start + interval '1 hour' - interval '1 microsecond', 'epoch')
    UNION ALL
    SELECT b.tenant, b.account, b.period_start, b.period_end, b.plan, p.series, p.quantity, 1
    FROM billing_period b
    JOIN usage_point p
      ON p.account = b.account AND p.tenant = b.tenant
     AND p.time >= date_bin('1 hour', b.period_end, 'epoch')
     AND p.time < b.period_end
) u
JOIN usage_series s ON s.account = u.account AND s.series = u.series
GROUP BY u.tenant, u.account, u.period_start, u.period_end, u.plan, s.meter, s.unit;
