"""The edge client process."""
