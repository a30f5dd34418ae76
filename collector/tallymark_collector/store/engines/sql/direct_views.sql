-- Views of ours that name usage_point themselves, whatever it is called now.
SELECT DISTINCT v.relname
FROM pg_class p
JOIN pg_depend d ON d.refclassid = 'pg_class'::regclass AND d.refobjid = p.oid AND d.classid = 'pg_rewrite'::regclass
JOIN pg_rewrite r ON r.oid = d.objid
JOIN pg_class v ON v.oid = r.ev_class AND v.relkind = 'v' AND v.relnamespace = p.relnamespace
WHERE p.relnamespace = 'tallymark'::regnamespace AND p.relname IN ('usage_point', 'usage_point_moving')
ORDER BY v.relname
