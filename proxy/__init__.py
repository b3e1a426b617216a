"""Tensorgate: a TLS front door for inference servers.

The life of a request, step -> file:

 1. `listener` accepts, caps connections and gives each a TLS shell.
 2. `tls/shell` finishes the handshake within a time limit, in steps that `tls/pacing` rations; ALPN must pick h2.
    `tls/reasons` says why one failed.
 3. `identity` turns the client's certificate into an Identity, once per connection.
 4. `http2` (sans-IO) parses frames, checks them as RFC 9113 asks, keeps streams and windows.
 5. `inference` (sans-IO) reads what the call is: method, deadline, whether it is gRPC at all.
 6. `upstream/pool` picks a connection to the backend, or lets the call wait for one.
 7. `relay` joins the client's stream to an upstream stream and passes the frames on; credit goes back to the sender
    when bytes were forwarded.
 8. The response, its trailers, a reset or a deadline comes back the same way; `telemetry` adds to a few counters.

Around it: `config` (settings), `app` (the composition root), `admin` (metrics and health pages), `cli`, `demo`; and
`backend`, the embedded inference server, which runs as a process of its own and which nothing above imports.
"""

__version__ = "0.1.0"
