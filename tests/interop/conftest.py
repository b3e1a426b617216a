from __future__ import annotations

import pytest

from tests.support.gate import Gate


@pytest.fixture(params=["embedded", pytest.param("triton", marks=pytest.mark.triton)])
def inference_gate(request: pytest.FixtureRequest) -> Gate:
    """A gate in front of the embedded backend, and one in front of a real Triton."""
    gate: Gate = request.getfixturevalue(f"{request.param}_gate")
    return gate
