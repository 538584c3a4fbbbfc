"""Differential privacy: integer noise, mechanisms, accountants, budgets. Pure: no I/O.

* ``spec``: which combinations of a guarantee (``plan.PrivacySpec``) and a run are refused.
* ``noise``: exact integer laws from a cryptographic generator.
* ``clipping``: a clip norm that follows a quantile.
* ``factorization``: correlated noise, the best buffers and bands.
* ``mechanisms``: what is added to the sum of a round at the coordinator.
* ``distributed``: what devices add to their own integers inside secure aggregation.
* ``events``, ``accounting``: what a release costs, and the noise that a target needs.
* ``budget``: the arithmetic of a ledger that refuses.
* ``record``: who pays for a release, signed budgets, and the proof of a whole ledger.
* ``planning``: the choices side by side, before anything is spent.
* ``audit``: lower bounds from the real code, to be compared with the claim.
* ``sealing``: the noise of past rounds at rest.

Three guarantees are never mixed: example-level on the device, device-level against everybody but the
coordinator (central), and device-level against the coordinator, too (distributed). Epsilons of different
units are never added up.
"""
