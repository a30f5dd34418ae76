-- Yearly and weekly periods beside monthly ones. Subscriptions that are there already are monthly, and stay so.

ALTER TABLE subscription
    ADD COLUMN cycle          text NOT NULL DEFAULT 'monthly',
    ADD COLUMN anchor_month   smallint CHECK (anchor_month BETWEEN 1 AND 12),
    ADD COLUMN anchor_weekday smallint CHECK (anchor_weekday BETWEEN 1 AND 7),  -- ISO 8601: 1 is Monday
    ALTER COLUMN anchor_day DROP NOT NULL,
    -- Each cycle has its own anchor, and no other: what is stored cannot be read in two ways.
    ADD CONSTRAINT subscription_anchor CHECK (CASE cycle
        WHEN 'monthly' THEN num_nonnulls(anchor_day) = 1 AND num_nonnulls(anchor_month, anchor_weekday) = 0
        WHEN 'yearly' THEN num_nonnulls(anchor_day, anchor_month) = 2 AND num_nonnulls(anchor_weekday) = 0
        WHEN 'weekly' THEN num_nonnulls(anchor_weekday) = 1 AND num_nonnulls(anchor_day, anchor_month) = 0
        ELSE false END);
ALTER TABLE subscription ALTER COLUMN cycle DROP DEFAULT;
