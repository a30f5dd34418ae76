"""Usage metering on OpenTelemetry."""
