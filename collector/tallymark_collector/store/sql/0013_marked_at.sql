-- Since when an hour waits to be made again: for whoever watches how far the hours are behind.
ALTER TABLE usage_dirty ADD COLUMN marked_at timestamptz NOT NULL DEFAULT now();
