"""What a process is told about itself and the others."""

from __future__ import annotations

from typing import Any

import pytest

from switch_t5.cli.runtime import RuntimeConfig
from switch_t5.errors import ConfigError

ADDRESS = "host:1234"


@pytest.fixture(autouse=True)
def no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JAX_COORDINATOR_ADDRESS", raising=False)


@pytest.mark.parametrize(
    ("settings", "joins"),
    [
        ({}, False),
        ({"num_processes": 1}, False),
        ({"num_processes": 1, "process_id": 0}, False),
        ({"coordinator_address": ADDRESS, "num_processes": 1, "process_id": 0}, False),
        ({"coordinator_address": ADDRESS, "num_processes": 2, "process_id": 1}, True),
        ({"find_processes": True}, True),
        ({"find_processes": True, "coordinator_address": ADDRESS}, True),
    ],
)
def test_a_process_joins_others_where_it_is_told_of_them(settings: dict[str, Any], joins: bool) -> None:
    assert RuntimeConfig(**settings).joins_others == joins


def test_jaxs_variable_is_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", ADDRESS)
    assert RuntimeConfig(num_processes=2, process_id=0).joins_others


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"num_processes": 0}, "num_processes must be at least 1, got 0."),
        ({"num_cpu_devices": 0}, "num_cpu_devices must be at least 1, got 0."),
        ({"heartbeat_timeout_seconds": 0}, "heartbeat_timeout_seconds must be at least 1, got 0."),
        ({"coordinator_address": "host"}, "coordinator_address must be host:port, got 'host'."),
        ({"coordinator_address": ADDRESS}, "num_processes must be given with the coordinator's address, host:1234;"),
        ({"coordinator_address": ADDRESS, "num_processes": 2}, "process_id must be given with the coordinator's"),
        ({"num_processes": 2}, "num_processes has no effect without RuntimeConfig.coordinator_address"),
        ({"process_id": 1}, "process_id has no effect without RuntimeConfig.coordinator_address"),
        (
            {"coordinator_address": ADDRESS, "num_processes": 2, "process_id": 2},
            "process_id is 2, but 2 process(es) are numbered from 0.",
        ),
    ],
)
def test_a_wrong_value_is_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        RuntimeConfig(**settings)
    assert str(error.value).startswith(f"RuntimeConfig.{sentence}")
