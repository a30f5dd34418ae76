// Records what the order on stdin says, with OpenTelemetry's SDK for Go, and prints its own tally as JSON.
// The order is told in tests/interop/clients.py.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"log"
	"os"
	"runtime"
	"runtime/debug"
	"time"

	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/exporters/otlp/otlpmetric/otlpmetricgrpc"
	"go.opentelemetry.io/otel/exporters/otlp/otlpmetric/otlpmetrichttp"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracegrpc"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracehttp"
	"go.opentelemetry.io/otel/metric"
	sdk "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
	"go.opentelemetry.io/otel/sdk/resource"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"
)

type call struct {
	Account     string `json:"account"`
	Route       string `json:"route"`
	Calls       int64  `json:"calls"`
	Thousandths int64  `json:"volume_thousandths"`
}

type order struct {
	Protocol    string   `json:"protocol"`
	Temporality string   `json:"temporality"`
	Endpoint    string   `json:"endpoint"`
	Service     string   `json:"service"`
	Instance    string   `json:"instance"`
	Compression string   `json:"compression"`
	Timeout     int64    `json:"timeout_ms"`
	Backoff     int64    `json:"backoff_ms"`
	Pause       int64    `json:"pause_ms"`
	Cardinality int      `json:"cardinality"`
	Spans       bool     `json:"spans"`
	Rounds      [][]call `json:"rounds"`
}

func main() {
	var wanted order
	must(json.NewDecoder(os.Stdin).Decode(&wanted))
	ctx := context.Background()
	failed := 0
	otel.SetErrorHandler(otel.ErrorHandlerFunc(func(err error) { fmt.Fprintln(os.Stderr, err) }))

	attributes := []attribute.KeyValue{attribute.String("service.name", wanted.Service)}
	if wanted.Instance != "" {
		attributes = append(attributes, attribute.String("service.instance.id", wanted.Instance))
	}
	from, err := resource.Merge(resource.Default(), resource.NewSchemaless(attributes...))
	must(err)
	// Exported when a round is over: ForceFlush.
	reader := sdk.NewPeriodicReader(metrics(ctx, wanted), sdk.WithInterval(time.Hour), sdk.WithTimeout(time.Minute))
	meters := sdk.NewMeterProvider(
		sdk.WithReader(reader), sdk.WithResource(from), sdk.WithCardinalityLimit(wanted.Cardinality))
	tracers := sdktrace.NewTracerProvider(sdktrace.WithSyncer(spans(ctx, wanted)), sdktrace.WithResource(from))

	meter := meters.Meter("shop")
	requests, err := meter.Int64Counter("interop.requests", metric.WithUnit("{request}"))
	must(err)
	volume, err := meter.Float64Counter("interop.volume", metric.WithUnit("GBy"))
	must(err)
	tracer := tracers.Tracer("shop")

	tally := map[[3]string]int64{}
	for _, round := range wanted.Rounds {
		for _, each := range round {
			attributes := []attribute.KeyValue{
				attribute.String("tallymark.account.id", each.Account),
				attribute.String("http.route", each.Route),
			}
			set := metric.WithAttributes(attributes...)
			for range each.Calls {
				requests.Add(ctx, 1, set)
				tally[[3]string{"interop.requests", each.Account, each.Route}] += 1000
			}
			volume.Add(ctx, float64(each.Thousandths)/1000, set)
			tally[[3]string{"interop.volume", each.Account, each.Route}] += each.Thousandths
			if wanted.Spans {
				named := append(attributes, attribute.Int64("tallymark.meter.interop.requests", each.Calls))
				_, span := tracer.Start(ctx, "call", trace.WithAttributes(named...))
				span.End()
				tally[[3]string{"span:interop.requests", each.Account, ""}] += each.Calls * 1000
			}
		}
		// A failed export is an error here: what the SDK does with it is what is being found out.
		if err := meters.ForceFlush(ctx); err != nil {
			fmt.Fprintln(os.Stderr, err)
			failed++
		}
		time.Sleep(time.Duration(wanted.Pause) * time.Millisecond)
	}
	for _, shutdown := range []func(context.Context) error{meters.Shutdown, tracers.Shutdown} {
		if err := shutdown(ctx); err != nil {
			fmt.Fprintln(os.Stderr, err)
		}
	}

	lines := [][]any{}
	for key, thousandths := range tally {
		lines = append(lines, []any{key[0], key[1], key[2], thousandths})
	}
	versions := map[string]string{"go": runtime.Version()}
	info, _ := debug.ReadBuildInfo()
	for _, module := range info.Deps {
		if module.Path == "go.opentelemetry.io/otel/sdk/metric" {
			versions["sdk"] = module.Version
		}
	}
	must(json.NewEncoder(os.Stdout).Encode(map[string]any{"versions": versions, "failed": failed, "tally": lines}))
}

func metrics(ctx context.Context, wanted order) sdk.Exporter {
	temporality := func(sdk.InstrumentKind) metricdata.Temporality {
		if wanted.Temporality == "delta" {
			return metricdata.DeltaTemporality
		}
		return metricdata.CumulativeTemporality
	}
	timeout := time.Duration(wanted.Timeout) * time.Millisecond
	backoff := time.Duration(wanted.Backoff) * time.Millisecond
	if wanted.Protocol == "grpc" {
		options := []otlpmetricgrpc.Option{
			otlpmetricgrpc.WithEndpointURL(wanted.Endpoint),
			otlpmetricgrpc.WithTimeout(timeout),
			otlpmetricgrpc.WithTemporalitySelector(temporality),
			otlpmetricgrpc.WithRetry(otlpmetricgrpc.RetryConfig{
				Enabled: true, InitialInterval: backoff, MaxInterval: 30 * time.Second, MaxElapsedTime: time.Minute,
			}),
		}
		if wanted.Compression == "gzip" {
			options = append(options, otlpmetricgrpc.WithCompressor("gzip"))
		}
		exporter, err := otlpmetricgrpc.New(ctx, options...)
		must(err)
		return exporter
	}
	options := []otlpmetrichttp.Option{
		otlpmetrichttp.WithEndpointURL(wanted.Endpoint + "/v1/metrics"),
		otlpmetrichttp.WithTimeout(timeout),
		otlpmetrichttp.WithTemporalitySelector(temporality),
		otlpmetrichttp.WithRetry(otlpmetrichttp.RetryConfig{
			Enabled: true, InitialInterval: backoff, MaxInterval: 30 * time.Second, MaxElapsedTime: time.Minute,
		}),
	}
	if wanted.Compression == "gzip" {
		options = append(options, otlpmetrichttp.WithCompression(otlpmetrichttp.GzipCompression))
	}
	exporter, err := otlpmetrichttp.New(ctx, options...)
	must(err)
	return exporter
}

func spans(ctx context.Context, wanted order) sdktrace.SpanExporter {
	backoff := time.Duration(wanted.Backoff) * time.Millisecond
	var client otlptrace.Client
	if wanted.Protocol == "grpc" {
		client = otlptracegrpc.NewClient(
			otlptracegrpc.WithEndpointURL(wanted.Endpoint),
			otlptracegrpc.WithRetry(otlptracegrpc.RetryConfig{
				Enabled: true, InitialInterval: backoff, MaxInterval: 30 * time.Second, MaxElapsedTime: time.Minute,
			}))
	} else {
		client = otlptracehttp.NewClient(
			otlptracehttp.WithEndpointURL(wanted.Endpoint+"/v1/traces"),
			otlptracehttp.WithRetry(otlptracehttp.RetryConfig{
				Enabled: true, InitialInterval: backoff, MaxInterval: 30 * time.Second, MaxElapsedTime: time.Minute,
			}))
	}
	exporter, err := otlptrace.New(ctx, client)
	must(err)
	return exporter
}

func must(err error) {
	if err != nil {
		log.Fatal(err)
	}
}
