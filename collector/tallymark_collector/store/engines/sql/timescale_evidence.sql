-- Evidence becomes a hypertable, rows that are there are moved.
SELECT {extension}.create_hypertable(
    'usage_evidence', {extension}.by_range('time', INTERVAL '7 days'),
    create_default_indexes => false, migrate_data => true
);
