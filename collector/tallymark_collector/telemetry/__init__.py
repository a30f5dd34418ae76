"""What an operator sees of the collector: counts, instruments over them, and whose request a line of the log is of.

    requests     the request under way, and how requests ended
    written      what was committed, by tenant, and how long transactions took
    instruments  the table of metrics, and what each is read from
    exporting    the page for Prometheus and OTLP, both of the same instruments

The way of a request adds to plain integers and knows no OpenTelemetry; instruments read these when somebody asks.
"""
