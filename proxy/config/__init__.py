"""Settings: `model` says what may be set (no I/O), `load` gathers it, `check` looks at the files and ports it names."""
