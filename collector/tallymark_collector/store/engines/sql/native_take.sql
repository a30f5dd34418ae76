-- Marks of the oldest hours that have any, each known by its place and by the transaction that wrote it: a place that
-- is used again does not pass for the mark that was there.
INSERT INTO taken_mark (place, writer, bucket, account, tenant)
SELECT d.ctid, d.xmin, d.bucket, d.account, d.tenant
FROM usage_dirty d
WHERE d.bucket IN (
    SELECT bucket FROM (SELECT bucket FROM usage_dirty LIMIT 20000) oldest
    WHERE bucket >= (SELECT points_from FROM usage_kept)
    GROUP BY bucket ORDER BY bucket LIMIT %s
)
