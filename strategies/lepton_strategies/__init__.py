"""Strategies and a client app for any Flower deployment, public Flower API only."""
