"""KServe v2 over HTTP/1.1 with Triton's extensions, by aiohttp's low-level server.

    service.py      RestService: listening, requests one by one, errors, the end
    routes.py       path -> endpoint
    faults.py       errors as HTTP shows them
    exchange.py     one request and its response: bodies within the budget, slow peers
    compression.py  Content-Encoding and Accept-Encoding
    jsontext.py     JSON <-> values, within limits
    jsontensors.py  tensors as JSON
    asked.py        what an infer request asks for
    infer.py        /infer: JSON and the binary tensor extension
    generate.py     /generate and /generate_stream
    messages.py     protobuf messages as JSON
    control.py      health, metadata, configuration, statistics, the repository

What a request means and what is wrong with it is the dataplane's to say, as it is for gRPC.
"""

from proxy.backend.services.rest.service import RestService

__all__ = ["RestService"]
