"""`tallymark serve` answers questions as docs/api.md tells it, with the page's own code."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import psycopg
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tallymark.v1 import access_pb2, access_pb2_grpc, quarantine_pb2, quarantine_pb2_grpc, usage_pb2, usage_pb2_grpc
from tests.collector.cli.conftest import Run
from tests.collector.cli.test_serve import export, serving, until

PAGE = Path(__file__).parents[3] / "docs" / "api.md"
SERVICES = {"tallymark.v1.UsageService", "tallymark.v1.AccessService", "tallymark.v1.QuarantineService"}


def token(run: Run, *given: str) -> str:
    made = run("tokens", "create", "--tenant", "default", *given)
    assert (made.exit_code, "nothing" in made.stderr) == (0, False)
    return str(made.stdout.strip())


def midnight() -> str:
    return time.strftime("%Y-%m-%dT00:00:00Z", time.gmtime())


def bearer(text: str) -> list[tuple[str, str]]:
    return [("authorization", f"Bearer {text}")]


def test_the_page_reads_an_accounts_usage(run: Run, dsn: str) -> None:
    write, one = token(run, "--scope", "write"), token(run, "--scope", "read-account", "--account", "acme")
    [source] = [text for text in PAGE.read_text("utf-8").split("```")[1::2] if text.startswith("python\n")]
    printed: list[tuple[str, ...]] = []
    with serving(dsn, "--json") as process:
        assert process.stdout is not None
        port = json.loads(process.stdout.readline())["port"]
        before = midnight()
        export(port, 5, write)
        # The page's example is of a collector behind TLS.
        plain = SimpleNamespace(
            secure_channel=lambda *_: grpc.insecure_channel(f"127.0.0.1:{port}"), ssl_channel_credentials=lambda: None
        )
        page: dict[str, Any] = {"TOKEN": one, "print": lambda *cells: printed.append(cells)}
        exec(
            compile(source.removeprefix("python\n").replace("import grpc\n", ""), str(PAGE), "exec"),
            page | {"grpc": plain},
        )
        assert [cells[1:] for cells in printed] == [(None, "api.requests", "5")]
        assert printed[0][0] in (before, midnight())
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            usage = usage_pb2_grpc.UsageServiceStub(channel)
            for shown, code in (
                (bearer(write), grpc.StatusCode.PERMISSION_DENIED),
                ([], grpc.StatusCode.UNAUTHENTICATED),
            ):
                with pytest.raises(grpc.RpcError) as error:
                    usage.QueryUsage(usage_pb2.QueryUsageRequest(), metadata=shown, timeout=60)
                assert error.value.code() is code
            health = health_pb2_grpc.HealthStub(channel)
            for name in SERVICES:
                answer = health.Check(health_pb2.HealthCheckRequest(service=name), timeout=60)
                assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_several_processes_answer_and_administer(run: Run, dsn: str) -> None:
    write, admin = token(run, "--scope", "write"), token(run, "--scope", "administer", "--scope", "read")
    with serving(dsn, "--json", "--processes", "2") as process:
        assert process.stdout is not None
        port = json.loads(process.stdout.readline())["port"]
        export(port, 5, write)
        for _ in range(6):  # each a connection of its own, to whichever process
            with grpc.insecure_channel(f"127.0.0.1:{port}", [("grpc.use_local_subchannel_pool", 1)]) as channel:
                usage = usage_pb2_grpc.UsageServiceStub(channel)
                answer = usage.QueryUsage(usage_pb2.QueryUsageRequest(), metadata=bearer(admin), timeout=60)
                assert [row.quantity for row in answer.rows] == ["5"]
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            access = access_pb2_grpc.AccessServiceStub(channel)
            create = access_pb2.CreateCredentialRequest(scopes=["write"])
            made = access.CreateCredential(create, metadata=bearer(admin), timeout=60)
            quarantine = quarantine_pb2_grpc.QuarantineServiceStub(channel)
            assert not quarantine.ListItems(quarantine_pb2.ListItemsRequest(), metadata=bearer(admin), timeout=60).items
        export(port, 6, made.token)
        process.terminate()
        _, errors = process.communicate(timeout=60)
        assert made.token not in errors


@pytest.mark.parametrize("off", [False, True])
def test_reflection_lists_what_is_answered(run: Run, dsn: str, off: bool) -> None:
    read, write = token(run, "--scope", "read"), token(run, "--scope", "write")
    with serving(dsn, "--json", "--reflection", *(["--no-api"] if off else [])) as process:
        assert process.stdout is not None
        port = json.loads(process.stdout.readline())["port"]
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            asking = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo
            questions = [
                reflection_pb2.ServerReflectionRequest(list_services=""),
                reflection_pb2.ServerReflectionRequest(file_containing_symbol="tallymark.v1.UsageService"),
            ]
            listed, found = asking(iter(questions), metadata=bearer(write), timeout=60)
            names = {service.name for service in listed.list_services_response.service}
            assert names & SERVICES == (set() if off else SERVICES)
            if off:
                with pytest.raises(grpc.RpcError) as error:
                    usage_pb2_grpc.UsageServiceStub(channel).QueryUsage(
                        usage_pb2.QueryUsageRequest(), metadata=bearer(read), timeout=60
                    )
                assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED
            else:
                assert b"QueryUsage" in found.file_descriptor_response.file_descriptor_proto[0]


def test_usage_is_taken_while_all_who_ask_wait(run: Run, dsn: str) -> None:
    """Questions have connections of their own: however long they wait, no writer waits for one."""
    write, reads = token(run, "--scope", "write"), [token(run, "--scope", "read") for _ in range(2)]
    with serving(dsn, "--json") as process, ThreadPoolExecutor() as threads:
        assert process.stdout is not None
        port = json.loads(process.stdout.readline())["port"]
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel, psycopg.connect(dsn) as holder:
            holder.execute("LOCK TABLE tallymark.quarantine_action IN ACCESS EXCLUSIVE MODE")
            query = usage_pb2_grpc.UsageServiceStub(channel).QueryUsage
            asked = [
                threads.submit(query, usage_pb2.QueryUsageRequest(), metadata=bearer(one), timeout=60)
                for one in reads * 8
            ]
            with psycopg.connect(dsn, autocommit=True) as watcher:
                waiting = "SELECT count(*) >= 2 FROM pg_locks WHERE NOT granted"
                until(lambda: watcher.execute(waiting).fetchone() == (True,))
            for quantity in range(1, 8):
                export(port, quantity, write)
            assert not any(one.done() for one in asked)
            holder.rollback()
            # Two had begun, and see the moment at which they did.
            assert sorted(len(one.result().rows) for one in asked)[2:] == [1] * 14
