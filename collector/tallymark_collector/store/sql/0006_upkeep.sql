-- What keeping the hours leaves to be looked at, and how far back raw points are complete.

-- Hours that were made again from the points and have not been compared with them since: work for the audit that runs
-- beside the collector. Append-only like the marks.
CREATE TABLE usage_unaudited (
    bucket  timestamptz NOT NULL,
    account text        NOT NULL,
    tenant  text        NOT NULL
);

-- What that audit found and had made again. Only ever added to.
CREATE TABLE audit_finding (
    found_at   timestamptz NOT NULL DEFAULT now(),
    bucket     timestamptz NOT NULL,
    account    text        NOT NULL,
    tenant     text        NOT NULL,
    meter      text,                  -- NULL where the points name a series that the dictionary lacks
    width      interval    NOT NULL,  -- of the bucket: an hour or a day
    raw        numeric,               -- the points' sum, NULL where there is no point
    aggregated numeric                -- what the views said, NULL where they said nothing
);

-- One row. Points before `points_from` have been dropped: hours before it are never made again, and never audited.
-- Spans before `evidence_from` have been dropped: they are not missing.
CREATE TABLE usage_kept (
    points_from   timestamptz NOT NULL DEFAULT '-infinity',
    evidence_from timestamptz NOT NULL DEFAULT '-infinity'
);
INSERT INTO usage_kept DEFAULT VALUES;

-- Whoever adds points adds marks, so here is where a point of a time that has been dropped is found, whatever its
-- collector was told. Its hour would shrink to that one point. The lock is shared by writers; who drops takes it alone.
CREATE FUNCTION usage_dirty_is_kept() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    kept timestamptz;
BEGIN
    PERFORM pg_advisory_xact_lock_shared(hashtextextended('tallymark.usage_kept', 0));
    SELECT points_from INTO kept FROM tallymark.usage_kept;
    IF kept > '-infinity' AND EXISTS (SELECT FROM marked WHERE marked.bucket < kept) THEN
        RAISE EXCEPTION 'points before % have been dropped: an older one cannot be told from one that was counted', kept
            USING ERRCODE = 'datetime_field_overflow';
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER usage_dirty_is_kept AFTER INSERT ON usage_dirty
    REFERENCING NEW TABLE AS marked FOR EACH STATEMENT EXECUTE FUNCTION usage_dirty_is_kept();
