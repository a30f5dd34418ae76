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
