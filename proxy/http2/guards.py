"""What a peer may do in an interval before its connection is ended: the floods of RFC 9113 section 10.5.

Each kind of frame that costs the sender nothing and us something has a budget. Whoever owns the connections calls
`refill` on those in `spenders` at regular intervals (the gate: every second), so that no clock is read here. A budget
is far above what clients need and small enough that what it buys is no attack: some milliseconds of one processor.
"""

from typing import Final

PING: Final = "ping"
SETTINGS: Final = "settings"
PRIORITY: Final = "priority"
WINDOW_UPDATE: Final = "window_update"
EMPTY_DATA: Final = "empty_data"
SHORT_DATA: Final = "short_data"
UNKNOWN_FRAME: Final = "unknown_frame"
STRAY_FRAME: Final = "stray_frame"
RESET: Final = "rapid_reset"
PROVOKED_RESET: Final = "provoked_reset"
LARGE_HEADERS: Final = "large_headers"
MANY_FIELDS: Final = "many_fields"
LONG_FIELDS: Final = "long_fields"
REFUSED_CALL: Final = "refused_call"
CONTINUATION: Final = "continuation"
UNREAD: Final = "unread_replies"
UNREAD_ANSWERS: Final = "unread_answers"
TRICKLE: Final = "trickle"

# Kind -> how often in one interval.
BUDGETS: Final = {
    # Besides these, one for each DATA frame that we sent: gRPC's bandwidth estimators ping once a round trip while data
    # comes (grpc-go), or ten times a second (gRPC core); keepalive far less often.
    PING: 200,
    SETTINGS: 50,
    PRIORITY: 200,
    # Besides these, two for each DATA frame that we sent: a simple client answers each, for stream and connection.
    WINDOW_UPDATE: 5_000,
    EMPTY_DATA: 200,
    # Of 1 to 4 bytes: what is left of a message when windows cut it, and little else.
    SHORT_DATA: 5_000,
    # That are no gRPC, or of a malformed deadline, and are answered here: a client has no use for many.
    REFUSED_CALL: 1_000,
    UNKNOWN_FRAME: 200,
    # GOAWAY, acknowledgements, and what comes for a stream that is closed: races bring some of these.
    STRAY_FRAME: 1000,
    # CVE-2023-44487. Besides these, half of the streams that were opened in the interval may be reset.
    RESET: 200,
    # CVE-2025-8671: mistakes that we answer with RST_STREAM.
    PROVOKED_RESET: 100,
    # Header lists over the limit: a small block can cost milliseconds to decode.
    LARGE_HEADERS: 10,
    # Fields beyond MANY of a block that isn't remembered: each is checked and encoded, for a microsecond or two.
    MANY_FIELDS: 20_000,
    # KiB of header lists of more than 8 KiB: hardly any client sends such, and each is copied several times.
    LONG_FIELDS: 8_192,
}

# A server behind is trusted and carries the calls of many clients, so that its budgets are wide, and that what it does
# to calls, resets and large headers, has none: but one gone mad must not take all of the gate's time.
OF_SERVERS: Final = {
    kind: 20 * BUDGETS[kind]
    for kind in (PING, SETTINGS, PRIORITY, WINDOW_UPDATE, EMPTY_DATA, UNKNOWN_FRAME, STRAY_FRAME)
}

# Fields of a block that cost nothing of MANY_FIELDS.
MANY = 64

# Ended at once, not counted in an interval.
KINDS: Final = (*BUDGETS, CONTINUATION, UNREAD, UNREAD_ANSWERS, TRICKLE)
