-- Of a level that a file of meters took: its source, the sender's stream and the meter, whoever is billed; and what was
-- measured times which factor `value` is. What a source stands at is one account's at a time. Where its next level is billed as
-- something else (another account, other dimensions), the stream of the one before gets a row of value 0 at that time, which
-- ends it. Such a row has no source, and a `part` below 0, so that a level that its stream has at that very time counts
-- instead. A row more in the account's own levels, and not a look at others' as they are read: so what an invoice stands on
-- is its account's alone, and a level that ends because another's came late shows as something that came late.
ALTER TABLE usage_level
    ADD COLUMN source uuid,
    ADD COLUMN factor numeric;
CREATE INDEX usage_level_source ON usage_level (source, time, part) WHERE source IS NOT NULL;
