"""The `parameters` of a request, its inputs and outputs: what they ask for, whatever the protocol they came in.

Those that change the meaning of a request and aren't supported are refused. The rest belongs to the client: it is given
back with the answer.
"""

from __future__ import annotations

from collections.abc import Mapping

from proxy.backend.errors import Code, InferenceError, invalid

Value = bool | int | float | str
Parameters = Mapping[str, Value]

MOST_PARAMETERS = 64
MOST_DIMS = 64
MOST_OUTPUTS = 1024
EMPTY_FINAL_RESPONSE = "triton_enable_empty_final_response"
FINAL_RESPONSE = "triton_final_response"
# Those that speak to the server; https://docs.nvidia.com/deeplearning/triton-inference-server/ reserves them.
RESERVED = frozenset(
    (
        "sequence_id",
        "sequence_start",
        "sequence_end",
        "priority",
        "timeout",
        "headers",
        "binary_data_output",
        EMPTY_FINAL_RESPONSE,
        FINAL_RESPONSE,
    )
)


def scheduling(parameters: Parameters) -> tuple[int, int]:
    """(priority, time in the queue in ns) that a request asks for, 0 where it doesn't. Raises InferenceError."""
    return _count(parameters, "priority"), 1000 * _count(parameters, "timeout")  # microseconds


def check_names(parameters: Parameters, *allowed: str) -> None:
    """Raises InferenceError for a name that is reserved for what this server doesn't have."""
    for name in parameters:
        if name.startswith("triton_") and name not in allowed:
            known = f"; of these there are {', '.join(allowed)}" if allowed else ""
            raise invalid(f"parameter '{name:.100}': names that start with 'triton_' are reserved{known}")


def check_input(name: str, parameters: Parameters) -> None:
    """Raises InferenceError for what an input can't come in."""
    _refuse_shared_memory(f"input '{name}'", parameters)


def classes(name: str, parameters: Parameters) -> int:
    """How many classes an output is asked for, 0 for the tensor itself. Raises InferenceError."""
    label = f"output '{name}'"
    _refuse_shared_memory(label, parameters)
    return _count(parameters, "classification", f"{label}: ")


def returned(parameters: Parameters) -> Parameters:
    """Those that come back with the answer."""
    return {name: value for name, value in parameters.items() if name not in RESERVED}


def _refuse_shared_memory(label: str, parameters: Parameters) -> None:
    if "shared_memory_region" in parameters:
        raise InferenceError(
            Code.UNIMPLEMENTED,
            f"{label}: parameter 'shared_memory_region' is not supported; send the tensor in the request",
        )


def _count(parameters: Parameters, name: str, label: str = "") -> int:
    value = parameters.get(name, 0)
    if type(value) is not int:
        raise invalid(f"{label}parameter '{name}' is {value!r:.40}; it must be an integer")
    if not 0 <= value < 2**53:
        raise invalid(f"{label}parameter '{name}' is {value}; it must not be negative, nor above {2**53 - 1}")
    return value


def wants_empty_final_response(parameters: Parameters) -> bool:
    """Whether a stream of a decoupled model is to end with a message of its own. Raises InferenceError."""
    value = parameters.get(EMPTY_FINAL_RESPONSE, False)
    if not isinstance(value, bool):
        raise invalid(f"parameter '{EMPTY_FINAL_RESPONSE}' is {value!r:.40}; it must be a bool_param")
    return value
