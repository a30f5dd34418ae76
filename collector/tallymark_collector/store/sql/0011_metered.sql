-- Usage that a file of meters takes from other people's telemetry, in quarantine. Its meter is the file's, not the name of
-- the metric or span in `payload`; so it can be read with that file only, and several meters of one payload are several
-- items.
ALTER TABLE usage_quarantine ADD COLUMN metered boolean NOT NULL DEFAULT false;

-- PUBLIC. What could not be billed and waits for somebody.
CREATE OR REPLACE VIEW usage_quarantine_open AS
SELECT encode(q.digest, 'hex') AS id, q.tenant, q.account, q.meter, q.reason, q.detail, q.signal, q.time, q.recorded_at,
       q.metered
FROM usage_quarantine q
WHERE NOT EXISTS (
    SELECT FROM quarantine_action a
    WHERE a.account = q.account AND a.digest = q.digest AND a.action <> 'reopened'
      AND NOT EXISTS (
          SELECT FROM quarantine_action b
          WHERE b.account = a.account AND b.digest = a.digest AND b.number = a.number + 1
      )
);
