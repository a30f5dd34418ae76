package interop;

import com.google.gson.Gson;
import io.opentelemetry.api.common.AttributeKey;
import io.opentelemetry.api.common.Attributes;
import io.opentelemetry.api.metrics.DoubleCounter;
import io.opentelemetry.api.metrics.LongCounter;
import io.opentelemetry.api.trace.Tracer;
import io.opentelemetry.exporter.otlp.http.metrics.OtlpHttpMetricExporter;
import io.opentelemetry.exporter.otlp.http.trace.OtlpHttpSpanExporter;
import io.opentelemetry.exporter.otlp.metrics.OtlpGrpcMetricExporter;
import io.opentelemetry.exporter.otlp.trace.OtlpGrpcSpanExporter;
import io.opentelemetry.sdk.metrics.SdkMeterProvider;
import io.opentelemetry.sdk.metrics.export.AggregationTemporalitySelector;
import io.opentelemetry.sdk.metrics.export.MetricExporter;
import io.opentelemetry.sdk.metrics.export.PeriodicMetricReader;
import io.opentelemetry.sdk.resources.Resource;
import io.opentelemetry.sdk.trace.SdkTracerProvider;
import io.opentelemetry.sdk.trace.export.BatchSpanProcessor;
import io.opentelemetry.sdk.trace.export.SpanExporter;
import java.io.InputStreamReader;
import java.nio.charset.StandardCharsets;
import java.time.Duration;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.concurrent.TimeUnit;

/**
 * Records what the order on stdin says, with OpenTelemetry's SDK for Java, and prints its own tally as JSON. The order
 * is told in tests/interop/clients.py.
 */
public final class Client {
  record Call(String account, String route, int calls, long volume_thousandths) {}

  record Order(
      String protocol,
      String temporality,
      String endpoint,
      String service,
      String instance,
      String compression,
      long timeout_ms,
      long pause_ms,
      int cardinality,
      boolean spans,
      List<List<Call>> rounds) {}

  private static final AttributeKey<String> ACCOUNT = AttributeKey.stringKey("tallymark.account.id");
  private static final AttributeKey<String> ROUTE = AttributeKey.stringKey("http.route");
  private static final AttributeKey<Long> ON_SPAN = AttributeKey.longKey("tallymark.meter.interop.requests");

  private final Map<List<String>, Long> tally = new LinkedHashMap<>();

  public static void main(String[] arguments) throws InterruptedException {
    var in = new InputStreamReader(System.in, StandardCharsets.UTF_8);
    new Client().run(new Gson().fromJson(in, Order.class));
  }

  private void run(Order order) throws InterruptedException {
    var attributes = Attributes.builder().put("service.name", order.service());
    if (order.instance() != null) {
      attributes.put("service.instance.id", order.instance());
    }
    var resource = Resource.getDefault().merge(Resource.create(attributes.build()));
    // Exported when a round is over: forceFlush.
    var reader = PeriodicMetricReader.builder(metrics(order)).setInterval(Duration.ofHours(1)).build();
    var meters = SdkMeterProvider.builder().setResource(resource).registerMetricReader(reader, type -> order.cardinality()).build();
    var tracers =
        SdkTracerProvider.builder()
            .setResource(resource)
            .addSpanProcessor(BatchSpanProcessor.builder(spans(order)).build())
            .build();

    LongCounter requests = meters.get("shop").counterBuilder("interop.requests").setUnit("{request}").build();
    DoubleCounter volume = meters.get("shop").counterBuilder("interop.volume").ofDoubles().setUnit("GBy").build();
    Tracer tracer = tracers.get("shop");
    int failed = 0;
    for (List<Call> round : order.rounds()) {
      for (Call each : round) {
        var named = Attributes.of(ACCOUNT, each.account(), ROUTE, each.route());
        for (int call = 0; call < each.calls(); call++) {
          requests.add(1, named);
          counted("interop.requests", each.account(), each.route(), 1000);
        }
        volume.add(each.volume_thousandths() / 1000.0, named);
        counted("interop.volume", each.account(), each.route(), each.volume_thousandths());
        if (order.spans()) {
          var shown = named.toBuilder().put(ON_SPAN, (long) each.calls()).build();
          tracer.spanBuilder("call").setAllAttributes(shown).startSpan().end();
          counted("span:interop.requests", each.account(), "", each.calls() * 1000L);
        }
      }
      // A failed export is an error here: what the SDK does with it is what is being found out.
      if (!meters.forceFlush().join(60, TimeUnit.SECONDS).isSuccess()) {
        failed++;
      }
      tracers.forceFlush().join(60, TimeUnit.SECONDS);
      Thread.sleep(order.pause_ms());
    }
    meters.shutdown().join(60, TimeUnit.SECONDS);
    tracers.shutdown().join(60, TimeUnit.SECONDS);

    var lines =
        tally.entrySet().stream()
            .map(e -> List.<Object>of(e.getKey().get(0), e.getKey().get(1), e.getKey().get(2), e.getValue()))
            .toList();
    var versions =
        Map.of("sdk", System.getProperty("interop.opentelemetry"), "java", System.getProperty("java.version"));
    System.out.println(new Gson().toJson(Map.of("versions", versions, "failed", failed, "tally", lines)));
    System.exit(0);
  }

  private void counted(String meter, String account, String route, long thousandths) {
    tally.merge(List.of(meter, account, route), thousandths, Long::sum);
  }

  private static MetricExporter metrics(Order order) {
    var temporality =
        order.temporality().equals("delta")
            ? AggregationTemporalitySelector.deltaPreferred()
            : AggregationTemporalitySelector.alwaysCumulative();
    var timeout = Duration.ofMillis(order.timeout_ms());
    if (order.protocol().equals("grpc")) {
      return OtlpGrpcMetricExporter.builder()
          .setEndpoint(order.endpoint())
          .setTimeout(timeout)
          .setCompression(order.compression())
          .setAggregationTemporalitySelector(temporality)
          .build();
    }
    return OtlpHttpMetricExporter.builder()
        .setEndpoint(order.endpoint() + "/v1/metrics")
        .setTimeout(timeout)
        .setCompression(order.compression())
        .setAggregationTemporalitySelector(temporality)
        .build();
  }

  private static SpanExporter spans(Order order) {
    if (order.protocol().equals("grpc")) {
      return OtlpGrpcSpanExporter.builder().setEndpoint(order.endpoint()).build();
    }
    return OtlpHttpSpanExporter.builder().setEndpoint(order.endpoint() + "/v1/traces").build();
  }
}
