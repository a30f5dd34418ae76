-- From the collector's hours and days to the continuous aggregates, in one transaction, while no refresher works. Every
-- point that the aggregates lack has a mark, so the views say the same before and after.

ALTER TABLE usage_hour RENAME TO usage_hour_replaced;
ALTER MATERIALIZED VIEW usage_hour_native RENAME TO usage_hour;
ALTER TABLE usage_day RENAME TO usage_day_replaced;
ALTER MATERIALIZED VIEW usage_day_native RENAME TO usage_day;
