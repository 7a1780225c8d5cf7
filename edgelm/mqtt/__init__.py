"""The MQTT service of a board, and the client that sends requests to it. README.md specifies the protocol."""
