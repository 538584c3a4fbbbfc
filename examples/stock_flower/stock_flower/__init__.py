"""Lepton FL on a stock Flower deployment."""
