-- What `tallymark import` has read: sources, their files with how far they were read, and where each line stands.
--
-- A line's key says which line of its source it is, whatever file it stands in and whoever it is billed to: that the
-- same line comes with another account or another time has to be found, so neither can be part of the key.

-- A name under which lines are told apart, and how they were read: another mapping would make other points of them.
CREATE TABLE usage_import_source (
    tenant      text        NOT NULL,
    name        text        NOT NULL,
    source      uuid        NOT NULL UNIQUE,  -- 128 bits over tenant and name
    mapping     jsonb       NOT NULL,
    recorded_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (tenant, name)
);

-- A file is known by its beginning: a grown or renamed one is the same. Committed with the points up to `bytes`.
CREATE TABLE usage_import_file (
    source     uuid        NOT NULL,
    file       uuid        NOT NULL,
    path       text        NOT NULL,   -- as it was called last
    bytes      bigint      NOT NULL,   -- read so far, after decompression
    lines      bigint      NOT NULL,
    digest     bytea,                  -- over what was read; NULL where the input cannot be read again
    updated_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (source, file)
);

-- One row for each line that was accepted. The columns of fixed width come first.
CREATE TABLE usage_import_line (
    time    timestamptz NOT NULL,
    source  uuid        NOT NULL,
    key     uuid        NOT NULL,  -- over the event's id; without one, over the line and how often it came before
    file    uuid        NOT NULL,
    line    bigint      NOT NULL,  -- the first, from 1
    digest  bigint      NOT NULL,  -- over what the line bills: the same key with another digest is a contradiction
    account text        NOT NULL,
    PRIMARY KEY (source, key)
);
CREATE INDEX usage_import_line_account ON usage_import_line (account, time);

-- PUBLIC. The line of a file behind each imported point. A point's `part` is the first half of its line's key.
CREATE VIEW usage_lines AS
SELECT p.tenant, p.account, e.meter, e.unit, p.time, p.quantity, s.name AS source, f.path AS file, l.line, e.attributes
FROM usage_import_line l
JOIN usage_import_source s ON s.source = l.source
JOIN usage_import_file f ON f.source = l.source AND f.file = l.file
JOIN usage_point p
  ON p.account = l.account AND p.time = l.time AND p.tenant = s.tenant
 AND p.part = ('x' || left(replace(l.key::text, '-', ''), 16))::bit(64)::bigint
JOIN usage_stream st
  ON st.account = p.account AND st.stream = p.stream AND st.resource ->> 'service.instance.id' = s.name
JOIN usage_series e ON e.account = p.account AND e.series = p.series;
