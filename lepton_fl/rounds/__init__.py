"""Run rounds: draw a cohort, ask it, add up what comes, step the server optimiser.

``campaign`` runs a whole training run over four seams: an ``Exchange`` (messages), a ``Roster`` (who could
take part), a ``Book`` (what is recorded) and a clock. Deployment and simulation differ in nothing else.
"""
