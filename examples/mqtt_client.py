"""Ask a board from any MQTT 5 program, without edgelm: python examples/mqtt_client.py HOST BOARD "PROMPT"."""

import json
import sys
import uuid
from typing import Any

import paho.mqtt.client as mqtt
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

host, board, prompt = sys.argv[1:4]
reply_topic = f"replies/{uuid.uuid4().hex}"
client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, protocol=mqtt.MQTTv5)


def on_connect(*_: Any) -> None:
    """Listen for the answer first."""
    client.subscribe(reply_topic, qos=1)


def on_subscribe(*_: Any) -> None:
    """Ask, once the answer cannot be missed."""
    properties = Properties(PacketTypes.PUBLISH)
    properties.ResponseTopic = reply_topic
    properties.CorrelationData = b"1"
    body = json.dumps({"prompt": prompt, "stream": True, "max_tokens": 128})
    client.publish(f"edgelm/{board}/generate", body, qos=1, properties=properties)


def on_message(_client: mqtt.Client, _userdata: Any, message: mqtt.MQTTMessage) -> None:
    """Print pieces as they come; the last message repeats the whole text."""
    answer = json.loads(message.payload)
    if answer["done"]:
        print("\n", answer["timing"] if answer["error"] is None else answer["error"])
        client.disconnect()
    else:
        print(answer["delta"], end="", flush=True)


client.on_connect, client.on_subscribe, client.on_message = on_connect, on_subscribe, on_message
client.connect(host)
client.loop_forever()
