// Records what the order on stdin says, with OpenTelemetry's SDK for JavaScript, and prints its own tally as JSON.
// The order is told in tests/interop/clients.py.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { SpanKind } from "@opentelemetry/api";
import { defaultResource, resourceFromAttributes } from "@opentelemetry/resources";
import { AggregationTemporality, MeterProvider, PeriodicExportingMetricReader } from "@opentelemetry/sdk-metrics";
import { NodeTracerProvider, SimpleSpanProcessor } from "@opentelemetry/sdk-trace-node";

const order = JSON.parse(readFileSync(0, "utf8"));
const http = order.protocol !== "grpc";
const suffix = { grpc: "grpc", "http/json": "http", "http/protobuf": "proto" }[order.protocol];
const metricsPackage = `@opentelemetry/exporter-metrics-otlp-${suffix}`;
const { OTLPMetricExporter } = await import(metricsPackage);
const { OTLPTraceExporter } = await import(`@opentelemetry/exporter-trace-otlp-${suffix}`);

function settings(path) {
  return {
    url: http ? `${order.endpoint}${path}` : order.endpoint,
    timeoutMillis: order.timeout_ms,
    compression: order.compression,
  };
}

let failed = 0;
function counting(exporter) {
  const send = exporter.export.bind(exporter);
  exporter.export = (items, done) =>
    send(items, (result) => {
      if (result.code !== 0) failed += 1;
      done(result);
    });
  return exporter;
}

const reader = new PeriodicExportingMetricReader({
  exporter: counting(
    new OTLPMetricExporter({
      ...settings("/v1/metrics"),
      temporalityPreference:
        order.temporality === "delta" ? AggregationTemporality.DELTA : AggregationTemporality.CUMULATIVE,
    }),
  ),
  // Exported when a round is over: forceFlush.
  exportIntervalMillis: 3_600_000,
  exportTimeoutMillis: 60_000,
  cardinalityLimits: { default: order.cardinality },
});
const resource = defaultResource().merge(
  resourceFromAttributes({
    "service.name": order.service,
    ...(order.instance && { "service.instance.id": order.instance }),
  }),
);
const meters = new MeterProvider({ resource, readers: [reader] });
const tracers = new NodeTracerProvider({
  resource,
  spanProcessors: [new SimpleSpanProcessor(counting(new OTLPTraceExporter(settings("/v1/traces"))))],
});

const tally = new Map();
function counted(meter, account, route, thousandths) {
  const key = JSON.stringify([meter, account, route]);
  tally.set(key, (tally.get(key) ?? 0) + thousandths);
}

const requests = meters.getMeter("shop").createCounter("interop.requests", { unit: "{request}" });
const volume = meters.getMeter("shop").createCounter("interop.volume", { unit: "GBy" });
const tracer = tracers.getTracer("shop");
const clock = Date.now;
if (order.frozen_ms !== null) {
  // Recorded and exported in the same millisecond.
  Date.now = () => order.frozen_ms;
}
for (const round of order.rounds) {
  for (const { account, route, calls, volume_thousandths } of round) {
    const attributes = { "tallymark.account.id": account, "http.route": route };
    for (let call = 0; call < calls; call += 1) {
      requests.add(1, attributes);
      counted("interop.requests", account, route, 1000);
    }
    volume.add(volume_thousandths / 1000, attributes);
    counted("interop.volume", account, route, volume_thousandths);
    if (order.spans) {
      const named = { ...attributes, "tallymark.meter.interop.requests": calls };
      tracer.startSpan("call", { kind: SpanKind.SERVER, attributes: named }).end();
      counted("span:interop.requests", account, "", calls * 1000);
    }
  }
  // A failed export is an error here: what the SDK does with it is what is being found out.
  await meters.forceFlush().catch(() => {});
  Date.now = clock;
  await new Promise((resolve) => setTimeout(resolve, order.pause_ms));
  await tracers.forceFlush().catch(() => {});
}
await meters.shutdown().catch(() => {});
await tracers.shutdown().catch(() => {});

const version = (name) => createRequire(import.meta.url)(`${name}/package.json`).version;
console.log(
  JSON.stringify({
    versions: { sdk: version("@opentelemetry/sdk-metrics"), exporter: version(metricsPackage), node: process.versions.node },
    failed,
    tally: [...tally].map(([key, thousandths]) => [...JSON.parse(key), thousandths]),
  }),
);
