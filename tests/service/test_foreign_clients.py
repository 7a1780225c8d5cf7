"""Clients without edgelm: mosquitto_rr, mosquitto_pub and mosquitto_sub, over MQTT 5 and 3.1.1."""

from __future__ import annotations

import json
import shutil
import subprocess
import time

import pytest
from broker import Broker

PROMPT = "Once upon a time"


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed: apt install mosquitto-clients")
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_mosquitto_rr_prints_the_final(broker: Broker, common: str) -> None:
    topic = f"edgelm/{common}/generate"
    done = _run(
        *("mosquitto_rr", "-p", str(broker.port), "-V", "5", "-t", topic, "-e", "some/reply", "-m", PROMPT, "-W", "40")
    )
    final = json.loads(done.stdout)
    assert final["done"] is True
    assert final["text"]
    assert final["finish_reason"] == "length"
    assert final["error"] is None
    assert final["board"] == common


def test_mosquitto_rr_gets_its_correlation_data_back(broker: Broker, common: str) -> None:
    done = _run(
        *("mosquitto_rr", "-p", str(broker.port), "-V", "5", "-t", f"edgelm/{common}/generate", "-e", "other/reply"),
        *("-D", "publish", "correlation-data", "job-17", "-F", "%D|%C|%P|%p", "-W", "40"),
        *("-m", json.dumps({"prompt": PROMPT, "max_tokens": 3})),
    )
    correlation, content_type, user, payload = done.stdout.split("|", 3)
    assert (correlation, content_type, user) == ("job-17", "application/json", "status:200")
    assert json.loads(payload)["id"] == "job-17"


@pytest.mark.parametrize("version", ["5", "mqttv311"])
def test_mosquitto_pub_asks_and_mosquitto_sub_listens(broker: Broker, common: str, version: str) -> None:
    reply = f"reply/some/{version}"
    listener = ["mosquitto_sub", "-p", str(broker.port), "-V", version, "-t", reply, "-C", "1", "-W", "40"]
    if shutil.which(listener[0]) is None:
        pytest.skip("mosquitto_sub is not installed: apt install mosquitto-clients")
    body = {"id": "mine", "prompt": PROMPT, "max_tokens": 4, "response_topic": reply}
    asking = ["mosquitto_pub", "-p", str(broker.port), "-V", version, "-q", "1", "-t", f"edgelm/{common}/generate"]
    with subprocess.Popen(listener, stdout=subprocess.PIPE, text=True) as heard:
        while heard.poll() is None:  # repeat the request: the start of the subscription cannot be seen
            assert _run(*asking, "-m", json.dumps(body)).returncode == 0
            time.sleep(0.2)
        answer = heard.communicate()[0]
    final = json.loads(answer)
    assert (final["id"], final["done"], final["usage"]["completion_tokens"]) == ("mine", True, 4)


def test_the_broker_reports_that_there_is_no_subscriber(broker: Broker) -> None:
    sent = _run(
        *(
            "mosquitto_pub",
            "-p",
            str(broker.port),
            "-V",
            "5",
            "-q",
            "1",
            "-t",
            "edgelm/nobody/generate",
            "-m",
            "hi",
            "-d",
        )
    )
    assert "No matching subscribers" in sent.stdout + sent.stderr or "RC:16" in sent.stdout + sent.stderr
