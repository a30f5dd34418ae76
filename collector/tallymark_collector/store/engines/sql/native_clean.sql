-- Exactly the marks that were taken before the refresh; what came since stays. Their hours await the audit.
WITH gone AS (
    DELETE FROM usage_dirty d USING taken_mark t
    WHERE d.ctid = t.place AND d.xmin = t.writer
      AND d.bucket = t.bucket AND d.account = t.account AND d.tenant = t.tenant
    RETURNING d.bucket, d.account, d.tenant
), noted AS (
    INSERT INTO usage_unaudited (bucket, account, tenant) SELECT DISTINCT bucket, account, tenant FROM gone
)
SELECT count(*) FROM (SELECT DISTINCT bucket, account, tenant FROM gone) keys
