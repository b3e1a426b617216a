"""How many examples a property gets: few and the same ones by default, many and new ones on demand.

    TENSORGATE_EXAMPLES=20000 pytest tests/properties
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

_EXAMPLES = os.environ.get("TENSORGATE_EXAMPLES")

quick = settings(
    max_examples=int(_EXAMPLES or 120),
    derandomize=_EXAMPLES is None,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
