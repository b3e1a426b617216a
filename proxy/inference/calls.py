"""What a call is: its method, its deadline, whether it is gRPC at all. No I/O."""

_INFERENCE = "/inference.GRPCInferenceService/"
_HEALTH = "/grpc.health.v1.Health/"
_METHODS = (
    "ServerLive", "ServerReady", "ModelReady", "ServerMetadata", "ModelMetadata", "ModelInfer", "ModelStreamInfer",
    "ModelConfig", "ModelStatistics", "RepositoryIndex", "RepositoryModelLoad", "RepositoryModelUnload",
    "SystemSharedMemoryStatus", "SystemSharedMemoryRegister", "SystemSharedMemoryUnregister",
    "CudaSharedMemoryStatus", "CudaSharedMemoryRegister", "CudaSharedMemoryUnregister", "TraceSetting", "LogSettings",
)  # fmt: skip
KNOWN_METHODS = (*(_INFERENCE + name for name in _METHODS), _HEALTH + "Check", _HEALTH + "Watch")
OTHER_METHOD = "other"
_LABELS = {method.encode(): method for method in KNOWN_METHODS}

_UNITS = {ord("H"): 3600.0, ord("M"): 60.0, ord("S"): 1.0, ord("m"): 1e-3, ord("u"): 1e-6, ord("n"): 1e-9}


def method_label(path: bytes) -> str:
    """The method as a metric label: the inference protocol's and health's own, "other" for whatever else is sent."""
    return _LABELS.get(path, OTHER_METHOD)


def is_grpc(content_type: bytes) -> bool:
    """application/grpc, with +proto and the like or parameters behind it; not application/grpc-web.

    In any case, and with white space before the parameters (RFC 9110 section 8.3.1).
    """
    kind = content_type.partition(b";")[0].rstrip(b" \t").lower()
    return kind == b"application/grpc" or kind.startswith(b"application/grpc+")


def parse_timeout(value: bytes) -> float:
    """grpc-timeout in seconds: one to eight digits and a unit. ValueError for anything else."""
    digits, unit = value[:-1], _UNITS.get(value[-1]) if value else None
    if unit is None or not digits.isdigit() or len(digits) > 8:
        shown = value[:32].decode("latin-1")
        raise ValueError(f"grpc-timeout is '{shown}'; it is one to eight digits and one of H M S m u n")
    return int(digits) * unit
