"""Counters, the metrics page made from them, and the log."""
