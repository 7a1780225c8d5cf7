"""Fixtures: one mosquitto for all tests that do not stop it, and a board that serves a small bundle."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from broker import Broker
from mqtt_client import Client
from served_board import serving
from shared_data import can_export, shared_folder

from edgelm.mqtt.service_config import ServeConfig


@pytest.fixture(scope="session")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    running = Broker(tmp_path_factory.mktemp("broker")).start()
    yield running
    running.stop()


@pytest.fixture(scope="session")
def served_bundle(request: pytest.FixtureRequest) -> str:
    """The bundle that boards serve: stories260K in int8 if it is available, otherwise a random model of that size.

    The tests do not depend on the text that the model generates.
    """
    if shared_folder() is not None:
        return str(request.getfixturevalue("stories_bundle")("int8"))
    if not can_export():
        pytest.skip("there is no bundle to serve: pip install 'edgelm[export]'")
    checkpoint = request.getfixturevalue("tiny_checkpoint")(layers=5, hidden=64, tied=False, context=512)
    return str(request.getfixturevalue("export_to_cache")(checkpoint, quant="int8"))


@pytest.fixture
def config(broker: Broker, served_bundle: str, request: pytest.FixtureRequest) -> ServeConfig:
    """Settings of a board with a name that no other test uses."""
    board = "".join(letter if letter.isalnum() else "-" for letter in request.node.name.lower())[-30:].strip("-")
    return ServeConfig(mqtt=broker.url, model=served_bundle, board=board, threads=1)


@pytest.fixture(scope="module")
def common(broker: Broker, served_bundle: str, request: pytest.FixtureRequest) -> Iterator[str]:
    """Start a board for all tests of a module; return its name."""
    name = request.module.__name__.removeprefix("test_").replace("_", "-")
    config = ServeConfig(
        mqtt=broker.url, model=served_bundle, board=name, threads=1, client_rate=10_000, client_burst=10_000
    )
    with serving(config):
        yield name


@pytest.fixture
def client(broker: Broker, common: str) -> Iterator[Client]:
    """A client that subscribes to `reply/#`, the topics of clients, and all topics of the common board."""
    with Client(broker.port, "reply/#", f"edgelm/{common}/+", "edgelm/client/+/response") as connected:
        yield connected
