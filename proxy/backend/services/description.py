"""What the server says of itself, its models and what they have done; every protocol shows these messages."""

from __future__ import annotations

from proxy import __version__
from proxy.backend.errors import InferenceError, invalid
from proxy.backend.loaded import Loaded
from proxy.backend.protos import inference_pb2 as pb
from proxy.backend.repository import Repository
from proxy.backend.spec import ModelSpec, TensorSpec
from proxy.backend.statistics import Duration

EXTENSIONS = (
    "classification",
    "model_repository",
    "schedule_policy",
    "model_configuration",
    "binary_tensor_data",
    "parameters",
    "statistics",
    "generate",
)
"""Those of https://docs.nvidia.com/deeplearning/triton-inference-server/ that are served in full."""


def server_metadata() -> pb.ServerMetadataResponse:
    return pb.ServerMetadataResponse(name="tensorgate", version=__version__, extensions=EXTENSIONS)


def _statistics(loaded: Loaded) -> pb.ModelStatistics:
    made = loaded.scheduler.statistics
    stats = pb.ModelStatistics(
        name=loaded.spec.name,
        version=str(loaded.spec.version),
        last_inference=made.last_inference,
        inference_count=made.inference_count,
        execution_count=made.execution_count,
        inference_stats=pb.InferStatistics(
            success=_duration(made.success),
            fail=_duration(made.fail),
            queue=_duration(made.queue),
            compute_input=_duration(made.compute_input),
            compute_infer=_duration(made.compute_infer),
            compute_output=_duration(made.compute_output),
            cache_hit=_duration(made.cache_hit),
            cache_miss=_duration(made.cache_miss),
        ),
    )
    for rows, batch in sorted(made.batches.items()):
        stats.batch_stats.add(
            batch_size=rows,
            compute_input=_duration(batch.compute_input),
            compute_infer=_duration(batch.compute_infer),
            compute_output=_duration(batch.compute_output),
        )
    return stats


def _duration(made: Duration) -> pb.StatisticDuration:
    return pb.StatisticDuration(count=made.count, ns=made.ns)


def model_metadata(repository: Repository, name: str, version: str) -> pb.ModelMetadataResponse:
    """Of the version, or of the latest if `version` is empty. Raises InferenceError."""
    loaded = repository.find(name, version)
    spec = loaded.spec
    return pb.ModelMetadataResponse(
        name=spec.name,
        versions=[str(one.number) for one in repository.models[spec.name].ready()],
        platform=loaded.config.platform or loaded.config.backend,
        inputs=[_tensor_metadata(spec, tensor) for tensor in spec.inputs],
        outputs=[_tensor_metadata(spec, tensor) for tensor in spec.outputs],
    )


def statistics(repository: Repository, name: str, version: str) -> pb.ModelStatisticsResponse:
    """Of all versions that are ready; of one model, or of one version, if it is named. Raises InferenceError."""
    if name:
        try:
            loaded = repository.find(name, version)
        except InferenceError as error:
            raise invalid(f"requested model '{name}' is not available: {error}") from None  # Triton's code and words
    if version:
        found = [loaded]
    elif name:
        found = [one.loaded for one in repository.models[name].ready() if one.loaded]
    else:
        found = [one.loaded for model in repository.models.values() for one in model.ready() if one.loaded]
    return pb.ModelStatisticsResponse(model_stats=[_statistics(loaded) for loaded in found])


def _tensor_metadata(spec: ModelSpec, tensor: TensorSpec) -> pb.ModelMetadataResponse.TensorMetadata:
    shape = (-1, *tensor.dims) if spec.max_batch_size else tensor.dims
    return pb.ModelMetadataResponse.TensorMetadata(name=tensor.name, datatype=tensor.datatype.name, shape=shape)
