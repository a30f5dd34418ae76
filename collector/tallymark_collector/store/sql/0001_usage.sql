-- What was used: raw points, the dictionaries that name them, evidence, and what could not be billed.
--
-- `account` stands in every key, so that a distributed engine can place rows by it; `time` in every unique key of
-- what grows without end, so that a partitioned engine can cut it up by time. `tenant` is part of `stream` and
-- `series` (their fingerprints cover it) and stands beside them so that rows can be filtered by it.

-- What an account is billed by, whichever process counted it. `series` is 128 bits over the columns.
CREATE TABLE usage_series (
    account     text  NOT NULL,
    series      uuid  NOT NULL,
    tenant      text  NOT NULL,
    meter       text  NOT NULL,
    unit        text  NOT NULL,
    plan        text,            -- tallymark.plan
    route       text,            -- http.route
    method      text,            -- http.request.method
    status_code integer,         -- http.response.status_code
    error_type  text,            -- error.type
    attributes  jsonb NOT NULL,  -- all of the point's attributes less the account
    PRIMARY KEY (account, series)
);
CREATE INDEX usage_series_meter ON usage_series (tenant, meter, account);

-- One producer's series: OpenTelemetry's stream. `stream` is 128 bits over tenant, the resource's identifying
-- attributes, scope, metric name, unit, type, temporality and attributes.
CREATE TABLE usage_stream (
    account     text        NOT NULL,
    stream      uuid        NOT NULL,
    series      uuid        NOT NULL,
    tenant      text        NOT NULL,
    temporality smallint    NOT NULL,  -- OTLP's AggregationTemporality: 1 delta, 2 cumulative
    scope       text        NOT NULL,
    resource    jsonb       NOT NULL,  -- as it was when the stream was first seen
    recorded_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (account, stream)
);

-- The truth. One quantity of one stream for (start_time, time]. Rows are only ever added: a late sample of a
-- cumulative stream adds a correction (a negative quantity), see processors/temporality.py.
-- The columns of fixed width come first, so that none of them is padded.
CREATE TABLE usage_point (
    time        timestamptz NOT NULL,
    start_time  timestamptz NOT NULL,
    recorded_at timestamptz NOT NULL DEFAULT now(),
    stream      uuid        NOT NULL,
    series      uuid        NOT NULL,
    part        bigint      NOT NULL,  -- tells apart what has the same times, see below
    account     text        NOT NULL,
    tenant      text        NOT NULL,
    quantity    numeric     NOT NULL,
    PRIMARY KEY (account, time, stream, start_time, part)
);
-- `part`: of a delta point, what timestamptz cannot hold of its two times (time's nanoseconds below 1 us * 1000 +
-- start_time's). Of an increase or correction taken from cumulative totals, 64 bits over the epoch and the total that
-- brought it about: a total that comes late may correct an interval that has a row already.

-- The totals that cumulative producers sent, from which increases are taken. Nanoseconds since the Unix epoch.
CREATE TABLE usage_sample (
    account  text    NOT NULL,
    stream   uuid    NOT NULL,
    start_ns bigint  NOT NULL,  -- the epoch; 0 where the producer never said
    time_ns  bigint  NOT NULL,
    value    numeric NOT NULL,
    PRIMARY KEY (account, stream, start_ns, time_ns)
);

-- Spans that show single calls behind the points.
CREATE TABLE usage_evidence (
    time        timestamptz NOT NULL,  -- when the call ended
    start_time  timestamptz NOT NULL,
    recorded_at timestamptz NOT NULL DEFAULT now(),
    account     text        NOT NULL,
    tenant      text        NOT NULL,
    meter       text        NOT NULL,
    trace_id    bytea       NOT NULL,
    span_id     bytea       NOT NULL,
    quantity    numeric     NOT NULL,
    name        text        NOT NULL,
    service     text        NOT NULL,
    user_id     text,
    attributes  jsonb       NOT NULL,
    PRIMARY KEY (account, time, trace_id, span_id, meter, tenant)
);

-- What looked like usage and could not be billed. `payload` is an OTLP request that holds it, as it came.
CREATE TABLE usage_quarantine (
    account     text        NOT NULL,  -- '' where none was given
    digest      bytea       NOT NULL,  -- over tenant, reason and payload: the same refusal twice is one row
    tenant      text        NOT NULL,
    meter       text        NOT NULL,
    reason      text        NOT NULL,
    detail      text        NOT NULL,
    signal      text        NOT NULL,  -- metrics | traces
    time        timestamptz,           -- the point's, where it has one
    recorded_at timestamptz NOT NULL DEFAULT now(),
    payload     bytea       NOT NULL,
    PRIMARY KEY (account, digest)
);
CREATE INDEX usage_quarantine_recorded ON usage_quarantine (tenant, recorded_at);
