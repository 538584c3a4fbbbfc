"""The global model becomes a family of compressed variants, each measured and gated (``docs/variants.md``).

``recipe`` says what to try, ``build`` does it, ``measure`` runs a result as a device will, ``card`` is what
is known of it, ``profiles`` decides who may get it. Importing this package imports neither torch nor onnx; a
device that only serves needs ``card`` alone.
"""
