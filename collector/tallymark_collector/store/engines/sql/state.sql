-- What has been done in this database: is usage_point cut up by time, are the hours a continuous aggregate?
-- (A hypertable's parent has this trigger or not, depending on the version; its catalogue is the same in all.)
SELECT EXISTS (
           SELECT FROM timescaledb_information.hypertables
           WHERE hypertable_schema = 'tallymark' AND hypertable_name = 'usage_point'
       ) AS hypertables,
       EXISTS (
           SELECT FROM pg_class WHERE oid = to_regclass('tallymark.usage_hour') AND relkind = 'v'
       ) AS continuous_aggregates
