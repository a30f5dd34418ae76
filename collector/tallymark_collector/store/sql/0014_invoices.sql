-- Finalised invoices: what was billed for a period, for good, whatever becomes of the points, hours and days behind it.

-- One row is a document. Number 0 is the period's invoice; 1, 2, … are what was billed or credited later, each the
-- difference from all before it. Rows are only ever added.
CREATE TABLE invoice_document (
    period_start  timestamptz NOT NULL,
    period_end    timestamptz NOT NULL CHECK (period_end > period_start),
    number        integer     NOT NULL CHECK (number >= 0),
    account       text        NOT NULL,
    tenant        text        NOT NULL,
    invoice       text        NOT NULL,  -- 32 hexadecimal digits that name the document, made of the key
    kind          text        NOT NULL CHECK (kind IN ('invoice', 'credit_note', 'debit_note')),
    corrects      text,                  -- the document before it, where it is a correction
    finalized_at  timestamptz NOT NULL DEFAULT clock_timestamp(),
    database_user text        NOT NULL DEFAULT session_user,
    finalized_by  text        NOT NULL,  -- who they say they are
    because       text        NOT NULL DEFAULT '',
    plan          text        NOT NULL,
    currency      text        NOT NULL,
    total         numeric     NOT NULL,
    document      jsonb       NOT NULL,  -- all of it; decimals as strings
    PRIMARY KEY (account, period_start, tenant, number),
    CONSTRAINT invoice_document_kind CHECK (CASE kind
        WHEN 'invoice' THEN number = 0 AND corrects IS NULL
        WHEN 'credit_note' THEN number > 0 AND corrects IS NOT NULL AND total < 0
        ELSE number > 0 AND corrects IS NOT NULL AND total >= 0 END)
);
-- When a tenant began to finalise: points are held back from there on (aggregates/unfinalized.py).
CREATE INDEX invoice_document_tenant ON invoice_document (tenant, finalized_at);

-- Whoever adds one: a document that does not add up, or that corrects what is not there, is none.
CREATE FUNCTION invoice_document_is_whole() RETURNS trigger LANGUAGE plpgsql
SET search_path = tallymark, pg_temp AS $$
BEGIN
    NEW.database_user := session_user;
    NEW.finalized_at := clock_timestamp();
    IF NEW.total IS DISTINCT FROM (NEW.document ->> 'total')::numeric OR NEW.total <> (
        SELECT coalesce(sum((l.line ->> 'amount')::numeric), 0) FROM jsonb_array_elements(NEW.document -> 'lines') l (line)
    ) THEN
        RAISE EXCEPTION 'the total % of the invoice % is not the sum of its lines', NEW.total, NEW.invoice
            USING ERRCODE = 'check_violation';
    END IF;
    IF NEW.number > 0 AND NOT EXISTS (
        SELECT FROM invoice_document d
        WHERE d.account = NEW.account AND d.period_start = NEW.period_start AND d.tenant = NEW.tenant
          AND d.number = NEW.number - 1 AND d.invoice = NEW.corrects AND d.currency = NEW.currency
          AND d.period_end = NEW.period_end
    ) THEN
        RAISE EXCEPTION 'the correction % does not follow the document that it says it corrects', NEW.invoice
            USING ERRCODE = 'check_violation';
    END IF;
    IF NEW.number = 0 AND EXISTS (
        SELECT FROM invoice_document d
        WHERE d.account = NEW.account AND d.tenant = NEW.tenant AND d.number = 0
          AND d.period_start < NEW.period_end AND d.period_end > NEW.period_start AND d.period_start <> NEW.period_start
    ) THEN
        RAISE EXCEPTION 'a part of the period % to % is on a finalised invoice already', NEW.period_start, NEW.period_end
            USING ERRCODE = 'check_violation';
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER invoice_document_is_whole BEFORE INSERT ON invoice_document
    FOR EACH ROW EXECUTE FUNCTION invoice_document_is_whole();

CREATE FUNCTION invoice_document_stays() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'a finalised invoice is never changed nor removed: correct it by a document of its own'
        ' (tallymark invoice --correct)' USING ERRCODE = 'insufficient_privilege';
END $$;
CREATE TRIGGER invoice_document_stays BEFORE UPDATE OR DELETE OR TRUNCATE ON invoice_document
    FOR EACH STATEMENT EXECUTE FUNCTION invoice_document_stays();

-- How many points an account has in `[starts, ends)` that were recorded until then, and a digest over them. A point's
-- text is a JSON array of its time and start time (microseconds since the Unix epoch), part, stream, meter, unit and
-- quantity (as text, without zeros at its end). An hour's digest is SHA-256 over its points' texts in the order of time,
-- stream, start time and part, with a line feed between them; the digest is SHA-256 over the hours' digests. Hours,
-- since a month in one text might not fit into the 1 GB that a text may have.
--
-- With the rights of who calls it: only who may read points can.
CREATE FUNCTION invoice_points(
    in_tenant text, in_account text, starts timestamptz, ends timestamptz, recorded_until timestamptz
) RETURNS TABLE (points bigint, digest text)
LANGUAGE sql STABLE SET search_path = tallymark, pg_temp AS $$
SELECT coalesce(sum(h.points), 0)::bigint,
       encode(sha256(coalesce(string_agg(h.digest, ''::bytea ORDER BY h.hour), ''::bytea)), 'hex')
FROM (
    SELECT date_bin('1 hour', p.time, 'epoch') AS hour, count(*) AS points,
           sha256(convert_to(string_agg(
               jsonb_build_array(
                   (extract(epoch FROM p.time) * 1000000)::bigint, (extract(epoch FROM p.start_time) * 1000000)::bigint,
                   p.part, p.stream, s.meter, s.unit, trim_scale(p.quantity)::text
               )::text, E'\n' ORDER BY p.time, p.stream, p.start_time, p.part
           ), 'UTF8')) AS digest
    FROM usage_point p
    LEFT JOIN usage_series s ON s.account = p.account AND s.series = p.series
    WHERE p.account = in_account AND p.tenant = in_tenant AND p.time >= starts AND p.time < ends
      AND p.recorded_at <= recorded_until
    GROUP BY 1
) h
$$;

-- The same of levels: time, part, stream, meter, unit and value, in the order of time, stream and part.
CREATE FUNCTION invoice_levels(
    in_tenant text, in_account text, starts timestamptz, ends timestamptz, recorded_until timestamptz
) RETURNS TABLE (points bigint, digest text)
LANGUAGE sql STABLE SET search_path = tallymark, pg_temp AS $$
SELECT coalesce(sum(h.points), 0)::bigint,
       encode(sha256(coalesce(string_agg(h.digest, ''::bytea ORDER BY h.hour), ''::bytea)), 'hex')
FROM (
    SELECT date_bin('1 hour', l.time, 'epoch') AS hour, count(*) AS points,
           sha256(convert_to(string_agg(
               jsonb_build_array(
                   (extract(epoch FROM l.time) * 1000000)::bigint, l.part, l.stream, s.meter, s.unit,
                   trim_scale(l.value)::text
               )::text, E'\n' ORDER BY l.time, l.stream, l.part
           ), 'UTF8')) AS digest
    FROM usage_level l
    LEFT JOIN usage_series s ON s.account = l.account AND s.series = l.series
    WHERE l.account = in_account AND l.tenant = in_tenant AND l.time >= starts AND l.time < ends
      AND l.recorded_at <= recorded_until
    GROUP BY 1
) h
$$;

REVOKE EXECUTE ON FUNCTION invoice_points(text, text, timestamptz, timestamptz, timestamptz) FROM PUBLIC;
REVOKE EXECUTE ON FUNCTION invoice_levels(text, text, timestamptz, timestamptz, timestamptz) FROM PUBLIC;

-- PUBLIC. Finalised invoices and their corrections.
CREATE VIEW invoices AS
SELECT d.tenant, d.account, d.period_start, d.period_end, d.invoice, d.number, d.kind, d.corrects, d.plan,
       d.document ->> 'plan_version' AS plan_version, d.currency, d.total, d.finalized_at, d.finalized_by,
       d.database_user, d.because, (d.document #>> '{stands_on,recorded_until}')::timestamptz AS recorded_until,
       (d.document #>> '{stands_on,points}')::bigint AS points, d.document #>> '{stands_on,digest}' AS digest, d.document
FROM invoice_document d;

-- PUBLIC. Their lines: what was billed, from how many points.
CREATE VIEW invoice_lines AS
SELECT d.tenant, d.account, d.period_start, d.period_end, d.invoice, d.number, l.position::integer AS line,
       l.line ->> 'description' AS description, l.line ->> 'meter' AS meter, l.line ->> 'unit' AS unit,
       l.line ->> 'aggregation' AS aggregation, (l.line ->> 'quantity')::numeric AS quantity,
       (l.line ->> 'unit_price')::numeric AS unit_price, (l.line ->> 'amount')::numeric AS amount, d.currency,
       (l.line ->> 'points')::bigint AS points
FROM invoice_document d
CROSS JOIN LATERAL jsonb_array_elements(d.document -> 'lines') WITH ORDINALITY l (line, position);

-- PUBLIC. What was used on each day (UTC) of the period when the document was made: sums, of billed meters and others.
CREATE VIEW invoice_days AS
SELECT d.tenant, d.account, d.period_start, d.period_end, d.invoice, d.number, u.day ->> 'meter' AS meter,
       u.day ->> 'unit' AS unit, (u.day ->> 'day')::date AS day, (u.day ->> 'quantity')::numeric AS quantity,
       (u.day ->> 'points')::bigint AS points
FROM invoice_document d
CROSS JOIN LATERAL jsonb_array_elements(d.document #> '{stands_on,days}') u (day);
