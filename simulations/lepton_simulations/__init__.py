"""The simulation engine: the production round code under an in-memory exchange."""
