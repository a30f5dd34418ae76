"""The files of `deploy/`: what a deployment may not lose, checked without a container engine."""

from __future__ import annotations

import re
from importlib.metadata import requires, version
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tallymark_collector.processes.descriptors import fitted
from tallymark_collector.settings import Limits, Settings
from tests.deploy.conftest import DEPLOY

COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()

FULL_VERSION = re.compile(r"[a-z0-9/.-]+:\d+\.\d+\.\d+[a-z0-9.-]*(@sha256:[0-9a-f]{64})?")
"""A tag that names one release; a digest may follow."""
REPLACEABLE = re.compile(r"\$\{TALLYMARK_[A-Z_]*IMAGE:-(?P<image>[^}]+)\}")
"""An image that a deployment can give with its digest, without editing the file."""


def instructions() -> list[tuple[str, str]]:
    joined = re.sub(r"\\\n\s*", " ", re.sub(r"(?m)^#.*\n", "", DOCKERFILE))
    return [(name, rest.strip()) for line in joined.splitlines() if line for name, _, rest in [line.partition(" ")]]


def values(name: str) -> list[str]:
    return [rest for found, rest in instructions() if found == name]


def test_there_are_two_containers_that_stay_and_one_that_ends() -> None:
    assert {name: service["restart"] for name, service in SERVICES.items()} == {
        "database": "unless-stopped",
        "migrate": "no",
        "collector": "unless-stopped",
    }


@pytest.mark.parametrize("name", SERVICES)
def test_images_are_pinned_and_can_be_given_with_a_digest(name: str) -> None:
    found = REPLACEABLE.fullmatch(SERVICES[name]["image"])
    assert found is not None
    assert FULL_VERSION.fullmatch(found["image"])


def test_the_image_of_the_collector_has_the_projects_version() -> None:
    assert f"tallymark:{version('tallymark')}" in SERVICES["collector"]["image"]
    assert f"tallymark:{version('tallymark')} " in DOCKERFILE


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_can_do_little(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["pids_limit"] > 0
    assert service["user"] == ("postgres" if name == "database" else "10001:10001")
    for forbidden in ("privileged", "cap_add", "network_mode", "pid", "ipc", "devices"):
        assert forbidden not in service


def test_the_collector_may_open_the_files_that_all_its_connections_take() -> None:
    found, said = fitted(Settings("unused", http_port=0), SERVICES["collector"]["ulimits"]["nofile"])
    assert (found.limits, said) == (Limits(), "")


@pytest.mark.parametrize("name", SERVICES)
def test_passwords_come_from_files(name: str) -> None:
    service = SERVICES[name]
    declared = {f"/run/secrets/{secret}" for secret in service["secrets"]}
    for variable, value in service["environment"].items():
        if "PASSWORD" in variable:
            assert variable.endswith("_PASSWORD_FILE")
            assert value in declared
        assert "password=" not in str(value)
        assert not re.search(r"://[^@]*:[^@]*@", str(value))
    assert "env_file" not in service
    assert set(service["secrets"]) <= set(COMPOSE["secrets"])
    assert all(set(secret) == {"file"} for secret in COMPOSE["secrets"].values())


def test_each_service_has_only_its_own_secrets() -> None:
    assert SERVICES["collector"]["secrets"] == ["owner_password", "writer_password"]
    assert SERVICES["migrate"]["secrets"] == ["owner_password"]


def test_requests_are_written_as_the_writer_and_kept_as_the_owner() -> None:
    environment = SERVICES["collector"]["environment"]
    for variable, role in {"TALLYMARK_DATABASE": "writer", "TALLYMARK_OWNER_DATABASE": "owner"}.items():
        assert environment[variable] == f"host=database dbname=tallymark user=tallymark_{role}"
        assert environment[f"{variable}_PASSWORD_FILE"] == f"/run/secrets/{role}_password"


def test_health_is_asked_and_waited_for() -> None:
    assert SERVICES["collector"]["healthcheck"]["test"] == ["CMD", "tallymark", "health"]
    assert "pg_isready" in SERVICES["database"]["healthcheck"]["test"]
    assert SERVICES["collector"]["depends_on"] == {
        "database": {"condition": "service_healthy"},
        "migrate": {"condition": "service_completed_successfully"},
    }
    assert SERVICES["migrate"]["depends_on"] == {"database": {"condition": "service_healthy"}}


def test_only_this_machine_reaches_the_collector_and_nobody_else_the_database() -> None:
    assert SERVICES["collector"]["ports"] == [f"127.0.0.1:{port}:{port}" for port in (4317, 4318, 4319)]
    assert values("EXPOSE") == ["4317 4318 4319"]
    assert not any("ports" in SERVICES[name] for name in ("database", "migrate"))
    assert COMPOSE["networks"]["database"] == {"internal": True}
    assert SERVICES["database"]["networks"] == SERVICES["migrate"]["networks"] == ["database"]


def test_what_is_mounted_is_there() -> None:
    for service in SERVICES.values():
        for volume in service.get("volumes", []):
            source, target, *mode = volume.split(":")
            if source.startswith("."):
                assert (DEPLOY / source).is_file()
                assert mode == ["ro"]
            else:
                assert source in COMPOSE["volumes"]
                assert SERVICES["database"]["environment"]["PGDATA"].startswith(f"{target}/")
    build = SERVICES["collector"]["build"]
    assert (DEPLOY / build["context"] / build["dockerfile"]).samefile(DEPLOY / "Dockerfile")
    assert (DEPLOY / "database/roles.sh").stat().st_mode & 0o111, "the image would run it in its own shell"


def test_the_dockerfile_names_one_pinned_base() -> None:
    [argument] = values("ARG")
    name, _, image = argument.partition("=")
    assert FULL_VERSION.fullmatch(image)
    assert "-slim" in image
    assert [value.split(" ")[0] for value in values("FROM")] == [f"${{{name}}}"] * 2


def test_the_image_runs_as_nobody_in_particular() -> None:
    order = [name for name, _ in instructions()]
    last_stage = order[len(order) - 1 - order[::-1].index("FROM") :]
    assert values("USER") == [SERVICES["collector"]["user"]]
    assert last_stage.index("USER") > max(place for place, name in enumerate(last_stage) if name in ("RUN", "COPY"))
    assert [value for value in values("COPY") if value.startswith("--from")] == [
        "--from=build /opt/tallymark /opt/tallymark"
    ]
    assert "ADD" not in order
    assert not re.search(r"curl|wget|apt-get|--trusted-host|index-url", DOCKERFILE)


def test_the_image_asks_for_its_health_and_can_be_stopped() -> None:
    assert values("HEALTHCHECK")[0].endswith('CMD ["tallymark", "health"]')
    # Without a shell in between SIGTERM reaches the collector.
    assert (values("ENTRYPOINT"), values("CMD")) == (['["tallymark"]'], ['["serve"]'])


def test_what_the_dockerfile_copies_is_sent_to_the_builder() -> None:
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    sent = {line[1:] for line in ignored if line.startswith("!")}
    copied = {source for value in values("COPY") if not value.startswith("--") for source in value.split(" ")[:-1]}
    assert "*" in ignored
    assert copied == sent
    assert all((DEPLOY.parent / source).exists() for source in copied)


def test_constraints_fit_what_the_collector_needs() -> None:
    lines = [line for line in (DEPLOY / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pinned = {canonicalize_name(name): number for name, _, number in (line.partition("==") for line in lines)}
    needed = [Requirement(text) for text in requires("tallymark") or ()]
    of_image = [r for r in needed if r.marker is None or r.marker.evaluate({"extra": "collector"})]
    assert len(of_image) > 10
    for requirement in of_image:
        assert canonicalize_name(requirement.name) in pinned
        assert requirement.specifier.contains(Version(pinned[canonicalize_name(requirement.name)]))
