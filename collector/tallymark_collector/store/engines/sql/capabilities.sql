-- What the database behind this connection can do. `timescaledb.license` is NULL where the extension is not installed
-- in this database; the loader's own setting tells whether the server could install it.
SELECT coalesce(current_setting('timescaledb.license', true) IN ('apache', 'timescale'), false)
           AND EXISTS (SELECT FROM pg_proc WHERE proname = 'create_hypertable' AND 'dimension' = ANY (proargnames)
                          AND pg_function_is_visible(oid))
           AS hypertables,
       coalesce(current_setting('timescaledb.license', true) = 'timescale', false)
           AND EXISTS (SELECT FROM pg_proc WHERE proname = 'refresh_continuous_aggregate' AND 'force' = ANY (proargnames)
                          AND pg_function_is_visible(oid))
           AS continuous_aggregates,
       coalesce(current_setting('timescaledb.license', true) = 'timescale', false)
           AND EXISTS (SELECT FROM pg_proc WHERE proname = 'add_columnstore_policy')
           AS columnstore,
       EXISTS (SELECT FROM pg_extension WHERE extname = 'timescaledb') AS installed,
       EXISTS (SELECT FROM pg_available_extensions WHERE name = 'timescaledb') AS available,
       current_setting('timescaledb.disable_load', true) IS NOT NULL AS preloaded
