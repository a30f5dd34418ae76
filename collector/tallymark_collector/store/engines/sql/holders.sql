-- Whose sessions hold some relations for longer than a lock is waited for, the oldest transaction first. When it began is
-- told to superusers and members of pg_monitor alone.
SELECT a.pid, a.usename, a.application_name, a.state, a.xact_start
FROM pg_stat_activity a
WHERE a.pid <> pg_backend_pid()
  AND (a.xact_start IS NULL OR a.xact_start < clock_timestamp() - %(patience)s::interval)
  AND EXISTS (
      SELECT FROM pg_locks l JOIN pg_class c ON c.oid = l.relation
      WHERE l.pid = a.pid AND l.granted AND l.database = a.datid
        AND c.relnamespace = 'tallymark'::regnamespace AND c.relname = ANY (%(relations)s)
        AND a.datname = current_database()
  )
ORDER BY a.xact_start NULLS LAST, a.pid
LIMIT 5
