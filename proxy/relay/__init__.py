"""The hot path: the streams of one client connection, joined to streams of few upstream connections.

    relay       what all connections of the gate share; flushing; deadlines
    downstream  client connections and their calls
    upstream    upstream connections: what comes back
    facts       what is derived from a request's header block, once
    kept        requests that could be sent once more
    deadlines   one coarse timer for all calls

Nothing is awaited here: handlers are called from the parse loop of the read that caused them, and everything that
they send is written once, when the read is parsed.
"""
