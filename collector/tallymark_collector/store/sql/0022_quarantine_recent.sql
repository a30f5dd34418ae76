-- What was set aside, or opened again, since a moment: that is asked while writers wait (aggregates/unsettled.py), and
-- however much was settled before must not be read for it.
CREATE INDEX usage_quarantine_recent ON usage_quarantine (recorded_at);
CREATE INDEX quarantine_action_reopened ON quarantine_action (acted_at) WHERE action = 'reopened';
