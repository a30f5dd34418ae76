"""What happens to telemetry between the wire and the store: plain functions, value in, value out, no I/O.

`decoding` turns a metrics request into points, asking `meters` which metrics are usage and `validation` which points
may be billed; `spans` does the same for evidence; `redaction` says what of it is a credential and not stored, `aside`
takes that out of what is kept as OTLP, `sent` knows who a point was before; `temporality` turns cumulative totals into
increases (the store calls it inside its transaction, because the neighbours of a point are known only there).
"""
