-- Hours whose points have been dropped exist here alone.
INSERT INTO usage_hour_native (bucket, series, account, tenant, quantity, points)
SELECT bucket, series, account, tenant, quantity, points
FROM usage_hour WHERE bucket < (SELECT points_from FROM usage_kept);
INSERT INTO usage_day_native (bucket, series, account, tenant, quantity, points)
SELECT date_bin('1 day', bucket, 'epoch'), series, account, tenant, sum(quantity), sum(points)
FROM usage_hour WHERE bucket < (SELECT date_bin('1 day', points_from, 'epoch') FROM usage_kept)
GROUP BY 1, 2, 3, 4;
