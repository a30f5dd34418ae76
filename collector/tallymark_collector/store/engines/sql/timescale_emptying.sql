-- What the collector's tables needed goes with them.
DROP TABLE usage_hour_replaced, usage_day_replaced;
DELETE FROM usage_day_dirty;
DELETE FROM usage_day_unaudited;

-- Whoever empties the truth empties what was made from it; TimescaleDB does so for the hours, not for what is over them.
CREATE FUNCTION usage_point_was_emptied() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    TRUNCATE tallymark.usage_day;
    RETURN NULL;
END $$;
CREATE TRIGGER usage_point_was_emptied AFTER TRUNCATE ON usage_point
    FOR EACH STATEMENT EXECUTE FUNCTION usage_point_was_emptied();
