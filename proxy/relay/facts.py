"""What the relay derives from a request's header block; derived once and kept in the block's `note`.

Nothing here may depend on the connection or the client: the same block serves all of them.
"""

from __future__ import annotations

from copy import copy

from proxy.http2 import HeaderBlock, Passing, RequestHead
from proxy.inference import calls, status
from proxy.inference.status import Code
from proxy.telemetry.metrics import Route

_HTTP_SCHEME = (b":scheme", b"http")
_NOT_GRPC = b'{"error": "this port serves gRPC: POST with content-type application/grpc"}\n'
_MAX_TIMEOUT = 10 * 365 * 86_400.0
_LOGGED_PATH = 257  # one more than is logged, or known as a method
_NO_FIELDS = HeaderBlock((), checked=True)


class Facts:
    """`forward` is the block to send upstream; `refusal` the answer to send instead, with `refusal_code`."""

    __slots__ = (
        "forward",
        "path",
        "refusal",
        "refusal_body",
        "refusal_code",
        "refuse_late",
        "route",
        "timeout",
    )

    def __init__(self, head: RequestHead, routes: dict[str, Route]) -> None:
        self.path = head.path.decode("latin-1")
        self.route = routes[calls.method_label(head.path)]
        self.timeout: float | None = None
        self.refusal: HeaderBlock | None = None
        self.refusal_body = b""
        self.refuse_late = False  # when the request has ended: HTTP clients lose an answer with a reset behind it
        self.refusal_code = Code.OK
        # The hop upstream is plaintext, so its scheme is http, whatever the client's was.
        self.forward = HeaderBlock(
            [_HTTP_SCHEME if field[0] == b":scheme" else field for field in head.fields],
            checked=True,
        )
        self._judge(head)

    def without_fields(self) -> Facts:
        """What is still asked for when a request is on its way, once and for all. Other calls may have all of it."""
        less = copy(self)
        less.path = self.path[:_LOGGED_PATH]
        less.forward = _NO_FIELDS
        return less

    def _judge(self, head: RequestHead) -> None:
        if head.method != b"POST" or not calls.is_grpc(head.get(b"content-type", b"") or b""):
            self.refusal_code = Code.UNKNOWN
            self.refusal, self.refusal_body = _not_grpc(head)
            self.refuse_late = True
            return
        try:
            self.timeout = timeout_of(head)
        except ValueError as error:
            self._refuse(Code.INTERNAL, str(error))
        if not head.authority and not head.get(b"host"):
            # Of another scheme, then; with http in its place the request would be malformed.
            self._refuse(Code.INTERNAL, ":authority is missing, without which a request can't go on as one of http")

    def _refuse(self, code: Code, message: str) -> None:
        self.refusal_code = code
        self.refusal = HeaderBlock(status.trailers_only(code, message), checked=True)


def timeout_of(fields: RequestHead | Passing) -> float | None:
    """The call's grpc-timeout in seconds; ValueError, in words for the client, where it isn't one."""
    timeout = fields.get(b"grpc-timeout")
    return None if timeout is None else min(calls.parse_timeout(timeout), _MAX_TIMEOUT)


def _not_grpc(head: RequestHead) -> tuple[HeaderBlock, bytes]:
    """An HTTP status for who doesn't speak gRPC, 405 or, as "gRPC over HTTP/2" asks, 415; and the reason as a body."""
    if head.method != b"POST":
        fields = [(b":status", b"405"), (b"allow", b"POST")]
    else:
        fields = [(b":status", b"415"), (b"accept", b"application/grpc")]
    fields += [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(_NOT_GRPC))]
    return HeaderBlock(fields, checked=True), b"" if head.method == b"HEAD" else _NOT_GRPC
