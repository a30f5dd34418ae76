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
