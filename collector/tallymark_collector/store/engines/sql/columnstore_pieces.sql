-- Pieces of usage_point that lie before a time and are rows, in part (8) or out of order (2); all columns is 1.
SELECT piece::text
FROM {extension}.show_chunks('usage_point', older_than => %(before)s::timestamptz) piece
WHERE _timescaledb_functions.chunk_status(piece) <> 1
ORDER BY 1
