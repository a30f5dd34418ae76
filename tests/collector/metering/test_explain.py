"""What is told of captured telemetry takes memory and time that grow with it, and no faster."""

from __future__ import annotations

import subprocess
import sys
from decimal import Decimal

import pytest

from tallymark_collector.metering import parse_rules
from tallymark_collector.metering.captured import Captured
from tallymark_collector.metering.explain import explain
from tests.support.telemetry import metrics_of
from tests.support.usage import BASE, SECOND, number, sum_metric

LIMITED = """
import resource, sys

{imports}

with open("/proc/self/statm") as file:
    now = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + 400 * 2**20, resource.RLIM_INFINITY))
{work}
"""
"""A program that may take 400 MiB beside what its imports take."""

RULES = """
meters:
  requests: {unit: "1", sources: [{metric: h, quantity: count, account: customer}]}
  bytes: {unit: "By", sources: [{metric: c, quantity: value, account: customer}]}
"""

IMPORTS = """
from tallymark_collector.metering import Metering, parse_rules
from tallymark_collector.metering.captured import Captured
from tallymark_collector.metering.explain import explain
from tallymark_collector.processors.decoding import decode_metrics
from tallymark_collector.processors.streams import StreamCache
from tallymark_collector.processors.validation import TimeLimits
from tests.support.telemetry import histogram, histogram_point, metrics_of
from tests.support.usage import BASE, SECOND, number, sum_metric
"""

MANY = f"""
points = [number(BASE, BASE + SECOND, n, {{"customer": f"c{{n}}"}}) for n in range(4000)]
totals = [histogram_point(BASE, BASE + SECOND, 1, 1.0, {{"customer": f"c{{n}}"}}) for n in range(4000)]
message = metrics_of({{"service.name": "kong"}}, sum_metric(points, "c", "By"), histogram(totals, "h", "1"))
found = explain(parse_rules('''{RULES}'''), [Captured("x:1", "metrics", message)])
print(len(found.items), len(found.usage))
"""

ONE_UNREADABLE = f"""
totals = [histogram_point(BASE, BASE + SECOND, 1, 1.0, {{"customer": f"c{{n}}"}}) for n in range(4000)]
message = metrics_of({{"service.name": "kong"}}, histogram(totals, "h", "1")).SerializeToString()
body = message.replace(b"c3999", b"c\\xff999")
found = decode_metrics(
    "default", body, StreamCache(), TimeLimits(), BASE + 60 * SECOND, Metering(parse_rules('''{RULES}'''))
)
print(len(found.points), len(found.quarantined))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("work", "said"), [(MANY, "8000 8000"), (ONE_UNREADABLE, "3999 1")], ids=["explained", "one that cannot be read"]
)
def test_memory_grows_with_the_points_and_not_with_their_square(work: str, said: str) -> None:
    """Each of 4,000 points beside a copy of all would be gigabytes."""
    program = LIMITED.format(imports=IMPORTS, work=work)
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=170, check=False)
    assert (ran.stdout.strip(), ran.returncode) == (said, 0), ran.stderr[-2000:]


def test_a_point_of_nobody_is_told_as_it_would_be_kept_whichever_metric_it_stands_in() -> None:
    rules = parse_rules(RULES)
    metrics = [
        sum_metric([number(BASE, BASE + SECOND, 700, {"otel.metric.overflow": True})], "own"),
        sum_metric([number(BASE, BASE + SECOND, 1, {"tallymark.account.id": "acme"})], "own"),
        sum_metric([number(BASE, BASE + SECOND, 9, {})], "other"),
    ]
    found = explain(rules, [Captured(f"x:{n}", "metrics", metrics_of({}, one)) for n, one in enumerate(metrics)])
    assert [(item.name, item.outcome, item.why.split(":")[0]) for item in found.items] == [
        ("own", "quarantined", "attribute_overflow"),
        ("own", "counted", ""),
        ("other", "passed over", "no source has this name"),
    ]
    assert [(line.meter, line.quantity) for line in found.usage] == [("own", Decimal(1))]
