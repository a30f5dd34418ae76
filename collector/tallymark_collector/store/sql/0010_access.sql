-- Who may do what: tenants, and the credentials that say on whose behalf a request comes.
--
-- Two small tables that every collector reads and nobody but the owner writes. A distributed engine keeps them whole on
-- every node; neither grows with usage.

CREATE TABLE tenant (
    -- Lower case: no two tenants whose names differ for a machine and not for a person.
    tenant               text             PRIMARY KEY CHECK (tenant ~ '^[a-z0-9][a-z0-9._-]{0,62}$'),
    created_at           timestamptz      NOT NULL DEFAULT now(),
    -- Limits: NULL is what the collector was told for all, infinity is none.
    points_per_second    double precision CHECK (points_per_second > 0 AND points_per_second <> 'NaN'),
    new_streams_per_hour double precision CHECK (new_streams_per_hour >= 1 AND new_streams_per_hour <> 'NaN')
);
INSERT INTO tenant (tenant) VALUES ('default');

-- Tokens and client certificates. A row is never removed: what was revoked is still told from what never was.
CREATE TABLE credential (
    credential text        PRIMARY KEY,  -- its public name, which may be logged
    kind       text        NOT NULL,     -- token | certificate
    tenant     text        NOT NULL REFERENCES tenant,
    account    text,                     -- the only one it is for; NULL: all of the tenant's
    scopes     text[]      NOT NULL,
    verifier   bytea,                    -- of a token: its SHA-256. The token itself is nowhere
    identity   text,                     -- of a certificate: sha256:…, uri:… or dns:…
    note       text        NOT NULL DEFAULT '',
    created_at timestamptz NOT NULL DEFAULT now(),
    expires_at timestamptz,
    revoked_at timestamptz,
    CONSTRAINT credential_kind CHECK (CASE kind
        WHEN 'token' THEN length(verifier) = 32 AND identity IS NULL
        WHEN 'certificate' THEN verifier IS NULL AND identity ~ '^(sha256|uri|dns):.'
        ELSE false END),
    CONSTRAINT credential_scopes CHECK (
        cardinality(scopes) > 0 AND scopes <@ ARRAY['write', 'read', 'read-account', 'administer']
        -- For one account and for all of them at once would be neither.
        AND CASE WHEN 'read-account' = ANY (scopes) THEN cardinality(scopes) = 1 AND account <> '' AND account IS NOT NULL
                 ELSE account IS NULL END)
);
-- One certificate, one tenant.
CREATE UNIQUE INDEX credential_trusted ON credential (identity) WHERE revoked_at IS NULL;
-- A certificate that was revoked is told from one that nobody knows.
CREATE INDEX credential_identity ON credential (identity);
