-- How old chunks are laid out once a policy turns them into columns. Segmented by what tells rows apart in the unique
-- key: a late or repeated point then touches the rows of its own stream and no others.
ALTER TABLE usage_point SET (
    timescaledb.enable_columnstore,
    timescaledb.segmentby = 'account, stream',
    timescaledb.orderby = 'time, start_time, part'
);
