-- Raw points become a hypertable, rows that are there are moved. `usage_point` has been renamed before, see moving.py, and
-- gets its name back here.
--
-- The unique keys have served readers of one account so far. What serves everybody's hours is an index over time that
-- costs a writer next to nothing: points arrive nearly in order, so a summary of every 32 pages is enough.
SELECT {extension}.create_hypertable(
    'usage_point_moving', {extension}.by_range('time', INTERVAL '7 days'),
    create_default_indexes => false, migrate_data => true
);
CREATE INDEX usage_point_time ON usage_point_moving USING brin (time) WITH (pages_per_range = 32);
ALTER TABLE usage_point_moving RENAME TO usage_point;
