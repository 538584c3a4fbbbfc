"""Secure aggregation in an ordinary Flower app."""
