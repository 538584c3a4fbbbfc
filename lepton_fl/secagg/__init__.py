"""Secure aggregation ``flsa/1``: the coordinator learns one sum over a cohort and nothing else.

Pure: no network, no files; randomness, time, ledgers, journals and spools are arguments. (Unmasking a large
cohort starts helper processes, which compute and nothing else.) The protocol, its threat model and what is
not covered are in ``docs/secure_aggregation.md``.

    context     what one sum is about: everything is bound to it
    encoding    updates -> ring elements, with a proof that the sum fits
    client      a device's session            server     the coordinator's session
    uploads     masked vectors, streamed      cohorts    more than 1,000 devices: several sums
    identity    signing keys and who certifies them
    rehearsal   a whole cohort in memory: simulation, tests, measurements
    agreements  unmasking on every core
    codec, messages, keys, field, masks, rotation, blame    what these are made of
"""
