"""The embedded inference backend: an upstream of the gate like any other, in a process of its own.

The way of a request:

    services/rpc.py         a gRPC call over HTTP/2 (grpclib's connection, our own call layer)
    services/wire.py        the message's bytes -> a request whose tensors are views of them, and back
    services/inference.py   GRPCInferenceService; services/health.py: grpc.health.v1
    dataplane.py            checks everything that the client says, before any of it is used; knows no protocol
    batching.py             says which requests run together, and when; no I/O, no clock
    scheduler.py            hands them to one of the model's threads, and the results back
    execution.py            in that thread: arrays joined, the model run, outputs split
    runtimes/               numpy (model.py) and ONNX Runtime (model.onnx)
    tensors.py              data types, and elements <-> bytes

and around it: repository.py (directories -> models, what is ready and why not), config.py (config.pbtxt), server.py
(listening, signals, the end), statistics.py (what was done, as Triton counts it), protos/ (messages), samples/ (models
to try it with).

Nothing here may import the gate's own parts: the two meet over a socket.
"""
