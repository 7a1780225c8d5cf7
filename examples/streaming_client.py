"""Stream an answer from a board with paho-mqtt, without edgelm: streaming_client.py "PROMPT" --board kitchen."""

import argparse
import json
import time
import uuid
from typing import Any

import paho.mqtt.client as mqtt
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("prompt", metavar="PROMPT", help="such as: play some jazz")
parser.add_argument("--board", default="kitchen", help="name of the board, as in edgelm serve --board (%(default)s)")
parser.add_argument("--host", default="localhost", help="host of the broker (%(default)s)")
parser.add_argument("--port", type=int, default=1883, help="port of the broker (%(default)s)")
parser.add_argument("--timeout", type=float, default=60.0, help="seconds to wait for the answer (%(default)g)")
args = parser.parse_args()
reply_topic = f"reply/{uuid.uuid4().hex}"
client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, protocol=mqtt.MQTTv5)


def on_connect(*_: Any) -> None:
    """Subscribe to the answer first."""
    client.subscribe(reply_topic, qos=1)


def on_subscribe(*_: Any) -> None:
    """Send the request when the subscription is active."""
    properties = Properties(PacketTypes.PUBLISH)
    properties.ResponseTopic = reply_topic
    properties.CorrelationData = b"1"
    body = json.dumps({"prompt": args.prompt, "stream": True, "max_tokens": 128})
    client.publish(f"edgelm/{args.board}/generate", body, qos=1, properties=properties)


def on_message(_client: mqtt.Client, _userdata: Any, message: mqtt.MQTTMessage) -> None:
    """Print chunks as they arrive; the final message repeats the whole text."""
    answer = json.loads(message.payload)
    if answer["done"]:
        print("\n", answer["timing"] if answer["error"] is None else answer["error"])
        client.disconnect()
    else:
        print(answer["delta"], end="", flush=True)


client.on_connect, client.on_subscribe, client.on_message = on_connect, on_subscribe, on_message
try:
    client.connect(args.host, args.port)
except OSError as error:
    raise SystemExit(f"no broker at {args.host}:{args.port}: {error.strerror or error}") from error
until = time.monotonic() + args.timeout
while client.loop() == mqtt.MQTT_ERR_SUCCESS:
    if time.monotonic() > until:
        raise SystemExit(f"no answer from {args.board} within {args.timeout:g} s: is it online at this broker?")
