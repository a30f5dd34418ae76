-- Increases (delta metrics) that a file of meters takes belong to their source too: the sender's stream and the meter. Whom the
-- file bills may change, and other collectors may have another file: what was billed to one account is not billed to another
-- when it comes again.

-- The streams that a source has been billed as, one for each account. Nearly all sources have one for good, and nobody looks
-- further; of the others each increase is looked up in all of their streams (`store/source_streams.py`).
CREATE TABLE usage_source_stream (
    source      uuid        NOT NULL,  -- 128 bits over tenant, the sender's stream and the meter
    account     text        NOT NULL,
    stream      uuid        NOT NULL,
    tenant      text        NOT NULL,
    later       bigint,                -- of a source's second stream, and further ones: 1, 2, 3 … in the order of commits
    recorded_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (source, account, stream)
);
-- Two collectors that bill a new source at the same time, to two accounts: one of them waits for the other here.
CREATE UNIQUE INDEX usage_source_stream_first ON usage_source_stream (source) WHERE later IS NULL;
-- For whoever asks which sources have become several since.
CREATE INDEX usage_source_stream_later ON usage_source_stream (later) WHERE later IS NOT NULL;
