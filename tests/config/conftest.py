from __future__ import annotations

from pathlib import Path

import pytest

from tests.config.places import furnish


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A furnished folder; tests write their settings file into it and change nothing else."""
    return furnish(tmp_path_factory.mktemp("place"))
