-- What has been done in this database: are points and evidence cut up by time, are the hours a continuous aggregate?
-- (A hypertable's parent has this trigger or not, depending on the version; its catalogue is the same in all.)
SELECT (
           SELECT count(*) = 2 FROM timescaledb_information.hypertables
           WHERE hypertable_schema = 'tallymark' AND hypertable_name IN ('usage_point', 'usage_evidence')
       ) AS hypertables,
       EXISTS (
           SELECT FROM pg_class WHERE oid = to_regclass('tallymark.usage_hour') AND relkind = 'v'
       ) AS continuous_aggregates
