"""The benchmark: what the gate costs beside Envoy, nginx and HAProxy, in one run on one machine.

    python -m tests.bench                                   every row, every peer that is installed: some 25 minutes
    python -m tests.bench --quick                           the same in a few, to see that all of it works
    python -m tests.bench --rows 4x16,unique --peers envoy  some of it; --list says what the rows are
    python -m tests.bench --json bench.json --svg bench.svg keep the figures, and draw them

CPU time per call, calls per second in a closed loop, latency at a fixed rate, memory; the gate's ratios to its peers,
and whether they are what they should be. A run in which any answer was not what it should be counts for nothing and
makes the exit code 1; a target that is missed does not.

It needs `nghttpd` and `h2load` (Debian: nghttp2-server, nghttp2-client) and takes the peers it finds:
`envoy` (pip install '.[bench]'), `nginx` and `haproxy` (Debian). Figures of two machines, or of two runs, don't
compare; the ratios within one run do. It is no test: nothing here fails because something took too long.

    rows.py            the rows: their load, and what they should come to
    measure.py         warm-up, the interleaved runs, and the figures of each
    load.py            one run of a load generator: command, and the checks of its outcome
    client.py          our load generator for unary calls (connection.py, wire.py: its HTTP/2 and header compression)
    stream.py          the one for a stream, by grpcio; stream_server.py: the upstream that it needs
    handshakes.py      the one for new connections, and for idle ones
    peers.py           the upstream, the gate and its peers: their configuration, and why it is fair
    processes.py       start a server, wait for its port, read its CPU time and memory, stop it in any case
    machine.py         facts about the machine and the programs
    report.py          tables, ratios, targets, JSON
    chart.py           the SVG
    attacks.py         another program: the gate under attack, which lists its own files
    soak.py            another: minutes of mixed load, and whether the gate keeps any of it (soak_clients.py: who calls;
                       soak_record.py: what is seen, and the checks; soak_chart.py: the SVG)
    inference.py       another: the embedded backend beside MLServer and Triton (inference_*.py: its servers, calls,
                       load, rows, report)
"""
