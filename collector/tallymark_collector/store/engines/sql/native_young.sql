-- Whether a continuous aggregate of ours has a piece that is new: for a quarter of an hour, which no plan waits before it
-- begins.
SELECT EXISTS (
    SELECT FROM timescaledb_information.chunks c
    JOIN timescaledb_information.continuous_aggregates a
      ON a.materialization_hypertable_schema = c.hypertable_schema
     AND a.materialization_hypertable_name = c.hypertable_name
    WHERE a.view_schema = 'tallymark' AND c.chunk_creation_time > now() - interval '15 minutes'
)
