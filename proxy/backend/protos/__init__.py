"""Messages of the inference and health protocols, generated from the .proto files beside this one.

They live in a descriptor pool of their own. protobuf keeps one default pool per process and refuses a second
definition of the same full name, and the names here are prescribed by the protocol: `tritonclient` registers
`inference.ModelInferRequest`, `grpclib` and `grpcio-health-checking` register `grpc.health.v1.HealthCheckRequest`.
With the default pool, whoever imports both this package and one of those gets a TypeError at import. In a pool of
our own the two definitions never meet; what they share are the bytes on the wire. The price: these messages can't be
fields of messages from other pools, and `google.protobuf.Any` doesn't find them unless POOL is passed. Nothing here
needs either. (With protobuf's pure-Python implementation, for platforms without a wheel of its own, messages are
registered in the default pool all the same: there the backend works, but not beside tritonclient in one process.)

To generate the modules again after a change to a .proto file:

    python -m tests.tools.generate_protos

It wants a protoc no newer than the lowest protobuf that pyproject.toml allows, because generated code refuses to be
imported by a runtime older than its protoc: `pip install 'grpcio-tools==1.72.*'` in a virtual environment of its own.
"""

from google.protobuf.descriptor_pool import DescriptorPool

POOL = DescriptorPool()
