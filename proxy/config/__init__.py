"""Settings: `model` says what may be set (no I/O), `load` gathers it, `check` and `ports` look at what it names.

`apart` has them gathered and checked in another process, so that the gate holds the settings and not the checkers.
"""
