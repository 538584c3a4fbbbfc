"""A node: runs the tasks named here and no others, on the data its own configuration names."""

from lepton_strategies import client_app

app = client_app(["digits"])
