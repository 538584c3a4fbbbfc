"""Messages of a round and their strict codec; ``v1`` is the generated code of the device service."""
