-- The taken marks' buckets of a width, those that touch as one window: its start and its end.
SELECT min(bucket), max(bucket) + %(width)s::interval
FROM (
    SELECT bucket, bucket - row_number() OVER (ORDER BY bucket) * %(width)s::interval AS run
    FROM (SELECT DISTINCT date_bin(%(width)s::interval, bucket, 'epoch') AS bucket FROM taken_mark) buckets
) runs
GROUP BY run
ORDER BY run
