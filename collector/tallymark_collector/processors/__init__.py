"""What happens to telemetry between the wire and the store: plain functions, value in, value out, no I/O.

`decoding` turns a metrics request into points, asking `meters` which metrics are usage and `validation` which points
may be billed; `spans` does the same for evidence; `temporality` turns cumulative totals into increases (the store
calls it inside its transaction, because the neighbours of a point are known only there).
"""
