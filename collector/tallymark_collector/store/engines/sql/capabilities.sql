-- What the database behind this connection can do. `timescaledb.license` is NULL where the extension is not installed
-- in this database; the loader's own setting tells whether the server could install it. What is offered is what belongs
-- to the extension, also to a role that may not use its schema, or does not have it in its search path.
WITH extension AS (
    SELECT e.oid, e.extnamespace FROM pg_extension e WHERE e.extname = 'timescaledb'
), offered AS (
    SELECT p.proname, p.proargnames
    FROM extension e
    JOIN pg_depend d ON d.refclassid = 'pg_extension'::regclass AND d.refobjid = e.oid AND d.deptype = 'e'
                    AND d.classid = 'pg_proc'::regclass
    JOIN pg_proc p ON p.oid = d.objid AND p.pronamespace = e.extnamespace
)
SELECT coalesce(current_setting('timescaledb.license', true) IN ('apache', 'timescale'), false)
           AND EXISTS (SELECT FROM offered WHERE proname = 'create_hypertable' AND 'dimension' = ANY (proargnames))
           AS hypertables,
       coalesce(current_setting('timescaledb.license', true) = 'timescale', false)
           AND EXISTS (SELECT FROM offered WHERE proname = 'refresh_continuous_aggregate' AND 'force' = ANY (proargnames))
           AS continuous_aggregates,
       coalesce(current_setting('timescaledb.license', true) = 'timescale', false)
           AND EXISTS (SELECT FROM offered WHERE proname = 'add_columnstore_policy')
           AS columnstore,
       EXISTS (SELECT FROM extension) AS installed,
       EXISTS (SELECT FROM pg_available_extensions WHERE name = 'timescaledb') AS available,
       current_setting('timescaledb.disable_load', true) IS NOT NULL AS preloaded
