"""Tensorgate: a TLS front door for inference servers."""

__version__ = "0.1.0"
