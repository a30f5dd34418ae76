-- What people have done with the quarantine. What was quarantined stays as it is; that it is dealt with, by whom, why and
-- with what result, is added beside it.

-- The item is usage_quarantine's (account, digest). Its actions count from 1: odd ones close it, even ones open it again.
CREATE TABLE quarantine_action (
    account       text        NOT NULL,
    digest        bytea       NOT NULL,
    number        integer     NOT NULL CHECK (number > 0),
    action        text        NOT NULL CHECK (action IN ('released', 'attributed', 'discarded', 'reopened')),
    tenant        text        NOT NULL,
    acted_at      timestamptz NOT NULL DEFAULT clock_timestamp(),
    database_user text        NOT NULL DEFAULT session_user,
    acted_by      text        NOT NULL,  -- who they say they are
    because       text        NOT NULL DEFAULT '',
    changed       jsonb       NOT NULL DEFAULT '{}',  -- by name: [as it was sent, as it was taken]
    billed_to     text,                  -- the account, where points came of it
    quantity      numeric,               -- the point's; of a cumulative stream, the total
    inserted      integer     NOT NULL DEFAULT 0,  -- points that were new
    duplicates    integer     NOT NULL DEFAULT 0,  -- points that were there before
    evidence      integer     NOT NULL DEFAULT 0,  -- spans that were new
    origin        uuid,                  -- 128 bits over the stream as it was sent
    point         uuid,                  -- the same with the point's times
    series        uuid,                  -- what it was billed as
    PRIMARY KEY (account, digest, number),
    CONSTRAINT quarantine_action_turns CHECK ((action = 'reopened') = (number % 2 = 0)),
    CONSTRAINT quarantine_action_reason CHECK (action <> 'discarded' OR because <> '')
);
CREATE INDEX quarantine_action_origin ON quarantine_action (origin) WHERE origin IS NOT NULL;

-- An item is named by the first digits of its digest.
CREATE INDEX usage_quarantine_digest ON usage_quarantine (digest);

-- Who acted and when is not for them to say, and nobody rewrites it, the owner included.
CREATE FUNCTION quarantine_action_signed() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.database_user := session_user;
    NEW.acted_at := clock_timestamp();
    RETURN NEW;
END $$;
CREATE TRIGGER quarantine_action_signed BEFORE INSERT ON quarantine_action
    FOR EACH ROW EXECUTE FUNCTION quarantine_action_signed();

CREATE FUNCTION quarantine_action_stays() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'what was done with the quarantine is only added to' USING ERRCODE = 'insufficient_privilege';
END $$;
CREATE TRIGGER quarantine_action_stays BEFORE UPDATE OR DELETE OR TRUNCATE ON quarantine_action
    FOR EACH STATEMENT EXECUTE FUNCTION quarantine_action_stays();

-- PUBLIC. What could not be billed and waits for somebody.
CREATE VIEW usage_quarantine_open AS
SELECT encode(q.digest, 'hex') AS id, q.tenant, q.account, q.meter, q.reason, q.detail, q.signal, q.time, q.recorded_at
FROM usage_quarantine q
WHERE NOT EXISTS (
    SELECT FROM quarantine_action a
    WHERE a.account = q.account AND a.digest = q.digest AND a.action <> 'reopened'
      AND NOT EXISTS (
          SELECT FROM quarantine_action b
          WHERE b.account = a.account AND b.digest = a.digest AND b.number = a.number + 1
      )
);

-- PUBLIC. What was done with what could not be billed.
CREATE VIEW usage_quarantine_history AS
SELECT encode(a.digest, 'hex') AS id, a.tenant, a.account, q.meter, q.reason, q.signal, q.time, a.number, a.action,
       a.acted_at, a.database_user, a.acted_by, a.because, a.changed, a.billed_to, a.quantity, a.inserted, a.duplicates,
       a.evidence
FROM quarantine_action a
JOIN usage_quarantine q ON q.account = a.account AND q.digest = a.digest;
