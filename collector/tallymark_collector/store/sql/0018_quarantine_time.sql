-- The oldest items first, of their own time: what is open holds points back that are old enough to go
-- (aggregates/unsettled.py).
CREATE INDEX usage_quarantine_time ON usage_quarantine (time) WHERE time IS NOT NULL;
