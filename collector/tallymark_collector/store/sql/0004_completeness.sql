-- What producers say about their own usage, so that it can be proved that all of it is here: never usage itself.
--
-- Few and shared tables as before. Control totals belong to a producer, not to an account: a distributed engine places
-- them by `producer`, which is in every key; time is in the keys of what grows.

-- Who sends control totals. `producer` is 128 bits over the other columns.
CREATE TABLE usage_producer (
    producer    uuid        NOT NULL,
    recorded_at timestamptz NOT NULL DEFAULT now(),
    tenant      text        NOT NULL,
    namespace   text        NOT NULL,  -- service.namespace, '' where there is none
    service     text        NOT NULL,  -- service.name, '' where there is none
    instance    text        NOT NULL,  -- service.instance.id
    PRIMARY KEY (tenant, producer)
);

-- What a producer has recorded of a meter from `start_time` to `time`. What it counts from 0, from one start_time on, is
-- a run; it begins another one when its clock is set back, and so does a new process under the same name.
CREATE TABLE usage_control (
    time        timestamptz NOT NULL,
    start_time  timestamptz NOT NULL,
    recorded_at timestamptz NOT NULL DEFAULT now(),
    producer    uuid        NOT NULL,
    part        bigint      NOT NULL,  -- time's nanoseconds below 1 us * 1000 + start_time's, as in usage_point
    tenant      text        NOT NULL,
    meter       text        NOT NULL,
    unit        text        NOT NULL,
    total       numeric     NOT NULL,
    PRIMARY KEY (tenant, producer, meter, unit, time, start_time, part)
);
-- All producers of a range; the primary key serves one producer.
CREATE INDEX usage_control_time ON usage_control (time);

-- Runs that have ended: nothing of them is later than `time`.
CREATE TABLE usage_closed (
    time        timestamptz NOT NULL,
    start_time  timestamptz NOT NULL,
    recorded_at timestamptz NOT NULL DEFAULT now(),
    producer    uuid        NOT NULL,
    part        bigint      NOT NULL,
    tenant      text        NOT NULL,
    PRIMARY KEY (tenant, producer, time, start_time, part)
);

-- How much of an account's usage in (start_time, time] a producer wrote on spans that are sampled: what the spans in
-- usage_evidence have to add up to.
CREATE TABLE usage_evidence_count (
    time        timestamptz NOT NULL,
    start_time  timestamptz NOT NULL,
    recorded_at timestamptz NOT NULL DEFAULT now(),
    producer    uuid        NOT NULL,
    part        bigint      NOT NULL,
    account     text        NOT NULL,
    tenant      text        NOT NULL,
    meter       text        NOT NULL,
    unit        text        NOT NULL,
    quantity    numeric     NOT NULL,
    PRIMARY KEY (account, time, producer, meter, unit, start_time, part, tenant)
);
