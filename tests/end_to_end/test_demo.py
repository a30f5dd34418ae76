"""`tallymark demo` as a person runs it: what it says, how it ends, and that nothing of it is left behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path

import psutil
import pytest

from tallymark_collector.demo import run as demo
from tallymark_collector.demo.proof import REQUESTS, Counts, Proof, compare
from tests.end_to_end.conftest import all_gone, processes_of


def interruptible() -> None:
    """A shell makes what it runs in the background ignore an interrupt, with all its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def started(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tallymark_collector", "demo", *arguments],
        env={**os.environ, "TMPDIR": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=interruptible,
    )


def finished(folder: Path, *arguments: str) -> tuple[int, str, str]:
    with started(folder, *arguments) as process:
        stdout, stderr = process.communicate(timeout=120)
    return process.returncode, stdout, stderr


def test_everything_sent_is_billed(open_folder: Path) -> None:
    status, stdout, stderr = finished(open_folder, "--json", "--requests", "3000", "--accounts", "60")
    assert status == 0, stderr
    found = json.loads(stdout)
    assert (found["sent"], found["billed"], found["lost"], found["duplicated"]) == (3000, 3000, 0, 0)
    assert found["problems"] == []
    assert found["audit"]["clean"]
    assert found["audit"]["points"] > 0
    assert found["quarantine"] == {}
    proved = found["completeness"]
    assert proved["meters"][REQUESTS] == {"recorded": "3000", "counted": "3000", "status": ["complete"]}
    assert {meter["status"][0] for meter in proved["meters"].values()} == {"complete"}
    assert proved["on_spans"] == proved["shown_by_spans"] != "0", "a few of every hundred calls are on spans"
    for meter in ("llm.tokens", "egress.bytes"):
        proof = found["meters"][meter]
        assert proof["billed"] == proof["sent"] > 0
    rows = [row for row in found["usage"] if row["meter"] == REQUESTS]
    assert sum(int(row["quantity"]) for row in rows) == 3000
    assert len({row["account"] for row in rows}) == 60
    assert {row["route"] for row in rows} == {"/search", "/completions", "/files/{name}"}
    assert all_gone(open_folder) == []
    assert list(open_folder.glob("tallymark-demo-*")) == [], "the database and the logs are removed"
    invoices_add_up(found["invoices"], rows)


def invoices_add_up(invoices: list[Mapping[str, object]], rows: list[Mapping[str, str]]) -> None:
    assert sorted(str(invoice["plan"]) for invoice in invoices) == ["growth", "scale", "starter"]
    used = {}
    for row in rows:
        used[row["account"]] = used.get(row["account"], 0) + int(row["quantity"])
    for invoice in invoices:
        lines = invoice["lines"]
        assert isinstance(lines, list)
        assert sum(Decimal(line["amount"]) for line in lines) == Decimal(str(invoice["total"]))
        invoiced = sum(int(line["quantity"]) for line in lines if line["meter"] == REQUESTS)
        assert invoiced == used[invoice["account"]]
        assert invoice["unpriced"] == []


def test_a_count_that_differs_fails(
    open_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(open_folder))

    def one_more_was_sent(sent: Counts, billed: Counts) -> dict[str, Proof]:
        kind = next(kind for kind in sent if kind.meter == REQUESTS)
        return compare({**sent, kind: sent[kind] + 1}, billed)

    status = demo.run(keep=False, as_json=False, requests=100, accounts=10, judge=one_more_was_sent)
    captured = capsys.readouterr()
    assert status == 1
    assert captured.out.endswith("\nsent=101 billed=100 lost=1 duplicated=0\n")
    assert "api.requests differs" in captured.err
    [kept] = open_folder.glob("tallymark-demo-*")
    assert str(kept) in captured.err
    assert {"collector.log", "service.log"} <= {path.name for path in kept.iterdir()}


def test_a_service_that_dies_fails_the_demo(open_folder: Path) -> None:
    with started(open_folder, "--requests", "1000000") as process:
        until_driving(process)
        [service] = [found for found in processes_of(open_folder) if "uvicorn" in found]
        psutil.Process(int(service.split()[0])).kill()
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "sent=" not in stdout
    assert "a request got no answer" in stderr
    assert re.search(r"the end of \S+service\.log:\n(.*\n)*INFO: +Application startup complete", stderr)
    assert all_gone(open_folder) == []


def until_driving(process: subprocess.Popen[str]) -> None:
    assert process.stderr is not None
    assert any(line.startswith("driving") for line in process.stderr)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_takes_its_children_along(open_folder: Path, number: signal.Signals) -> None:
    with started(open_folder, "--requests", "1000000") as process:
        until_driving(process)
        assert len(processes_of(open_folder)) > 3, "the demo, the collector, its PostgreSQL, the service"
        process.send_signal(number)
        stdout, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "sent=" not in stdout
    assert all_gone(open_folder) == []
    assert list(open_folder.glob("tallymark-demo-*")) == []


def test_what_is_kept_runs_until_it_is_stopped(open_folder: Path) -> None:
    # That this returns shows something too: what goes on running holds no pipe of ours open.
    status, stdout, stderr = finished(open_folder, "--keep", "--requests", "100", "--accounts", "30")
    pids = re.findall(r"kill (\d+)", stderr)
    assert len(pids) == 2, stderr
    try:
        assert status == 0
        is_for_people(stdout)
        url = re.search(r"service \(pid \d+\) at (http://\S+),", stderr)
        assert url is not None
        assert answer(f"{url[1]}/search?q=time", "key-acct-000") == 200
        assert answer(f"{url[1]}/search?q=time", "key-of-nobody") == 401
        usage = re.search(r" (usage --database \S+) ", stderr)
        assert usage is not None
        shown = subprocess.run(
            [sys.executable, "-m", "tallymark_collector", *usage[1].split(), "--by", "meter", "--json"],
            capture_output=True,
            check=True,
        )
        assert "api.requests" in {row["meter"] for row in json.loads(shown.stdout)}
    finally:
        for pid in pids:  # as the instructions say: the service first, which has usage to send
            process = psutil.Process(int(pid))
            process.terminate()
            process.wait(timeout=60)
        assert all_gone(open_folder) == []


def is_for_people(stdout: str) -> None:
    headings = ["Usage by account and endpoint", "Invoice of ", "Invoice of ", "Invoice of ", "audit: ", "sent="]
    found = [line for line in stdout.splitlines() if line.startswith(tuple(headings))]
    assert [line.startswith(heading) for line, heading in zip(found, headings, strict=True)] == [True] * len(headings)
    assert re.search(r"\n\d+ others ", stdout)
    assert "\ncompleteness of api.requests: the service says 100, here are 100: complete\n" in stdout
    assert re.search(r"\non sampled spans: the service says (\d+), the spans show \1\n", stdout)
    assert stdout.endswith("\nsent=100 billed=100 lost=0 duplicated=0\n")


def answer(url: str, key: str) -> int:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers={"x-api-key": key})) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code
