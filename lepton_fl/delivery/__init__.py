"""From a measured variant to the file that a device serves: signed, fetched, checked, switched.

``manifest`` says what a release is, ``keys`` and ``repository`` sign it (The Update Framework), ``shelf`` is
where a coordinator keeps what it hands out. On the device ``trust`` believes nothing without a signature,
``fetch`` brings the bytes, ``slots`` holds the two releases that a device can serve, and ``deliver`` does it
all in order (``docs/delivery.md``).

Nothing here knows gRPC. ``tuf`` is imported when metadata are written or verified, never before.
"""
