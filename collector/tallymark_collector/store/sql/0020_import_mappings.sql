-- The mappings that a source of `tallymark import` was read with after its first: each adds to the tables of the one
-- before, or stands in for one that had billed nothing. The last is in force; the others say how lines were read then.
CREATE TABLE usage_import_mapping (
    source      uuid        NOT NULL,
    number      integer     NOT NULL,  -- from 1; usage_import_source has the first mapping
    mapping     jsonb       NOT NULL,
    recorded_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (source, number)
);
