"""The demonstration: a service, a collector and a load as real processes, and a count that has to come out even.

service     the example: a FastAPI service that is metered; copy from here
tracing     its spans, a few of every hundred calls
directory   who the customers are: API keys, plans, time zones
plans.yaml  what the three plans cost
load        drives HTTP requests through the service and keeps a count of its own
proof       the driver's count against what SQL says
processes   children that are waited for, stopped, and never left behind
stage       collector and service, started and stopped in order
findings    what the database holds at the end: usage, invoices, audit
report      the same for people
run         `tallymark demo`, from the start to the last line
"""
