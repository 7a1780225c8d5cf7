"""A packet on its way to the broker."""

from __future__ import annotations

import paho.mqtt.client as paho


class Sending:
    """A packet handed to paho. `mid` is what its `Published` will carry."""

    __slots__ = ("_info", "mid")

    def __init__(self, info: paho.MQTTMessageInfo) -> None:
        self._info = info
        self.mid = info.mid

    @property
    def is_over(self) -> bool:
        """Whether it was written (QoS 0) or acknowledged (QoS 1), or was lost with its connection."""
        try:
            return self._info.is_published()
        except (RuntimeError, ValueError):  # how paho says that it is lost
            return True
