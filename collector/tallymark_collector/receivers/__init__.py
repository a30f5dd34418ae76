"""Where telemetry comes in. A receiver decodes an envelope, calls the pipeline, encodes the answer: nothing else.

A request is answered with success only after its transaction has been committed.
"""
