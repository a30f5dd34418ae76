-- The schema that the extension's functions are in, and whether this role may call what is there.
SELECT n.nspname, has_schema_privilege(n.oid, 'USAGE')
FROM pg_extension e JOIN pg_namespace n ON n.oid = e.extnamespace
WHERE e.extname = 'timescaledb'
