"""The embedded inference backend: an upstream of the gate like any other, in a process of its own.

The way of a request:

    services/http2.py       gRPC's connections, on the wire core of the gate (proxy.http2)
    services/call.py        one RPC: messages put together, answers sent as windows allow, both counted in the budget
    services/rpc.py         which method serves it, its deadline, how it ends
    services/wire.py        the message's bytes, without copies of tensors; compression.py: inflated within bounds
    services/messages.py    ModelInferRequest -> what is asked, and the answer -> ModelInferResponse; remembers heads
    services/inference.py   GRPCInferenceService; streaming.py: ModelStreamInfer; health.py: grpc.health.v1
    services/rest/          KServe v2 over HTTP/1.1; its __init__ has the map
    services/parameters.py  what a request's parameters mean, and description.py what models say of themselves: for both
    loaded.py               what every protocol asks of a model version; cache.py: answers that are kept
    dataplane.py            checks everything that the client says, before any of it is used; knows no protocol
    batching.py             says which requests run together, and when; no I/O, no clock
    scheduler.py            hands them to one of the model's threads, and the results back
    execution.py            in that thread: arrays joined, the model run, outputs split
    classification.py       the largest elements of an output, as texts
    answers.py              the answers of a decoupled model, from its thread to the event loop, bounded
    runtimes/               numpy (model.py) and ONNX Runtime (model.onnx)
    tensors.py              data types, and elements <-> bytes

How a model comes to be served:

    control.py              who decides what is loaded, and the files that a client may send
    repository.py           models by name: loaded, reloaded, unloaded; state.py: what is known of each
    loading.py              directories and files -> versions that run, in threads
    config.py               config.pbtxt, read and checked; derive.py: what it comes to; spec.py: the result
    warmup.py               samples that are run before a version is ready

And around it: server.py (listening, signals, the end), sockets.py (addresses), httpconnections.py (HTTP/1.1's),
budget.py (bytes of messages that may be held), threads.py (what takes long beside the event loop), statistics.py (what
was done, as Triton counts it), metrics.py, exposition.py and looplag.py (the metrics page), errors.py, protos/
(messages), samples/ (models to try it with).

Nothing here may import the gate's own parts: the two meet over a socket. What both use (proxy.http2, proxy.inference)
knows neither.
"""
