"""The gate before every route: who may enter, how much may be carried, and what is counted."""

from __future__ import annotations

import hmac
from collections.abc import Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .metrics import Metrics
from .protocol.refusals import Refusal

OPEN = ("/health", "/", "/page/")  # what is there for everybody: nothing that was generated
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = (
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
)


class Gate:
    """Checks host, key, type and size before a request reaches the application.

    Args:
        app: what lies behind. key: that callers must bring, or None. hosts: names under which the server is reached,
            so that no page of another site speaks to it through a name of its own; empty: any. body: most bytes.
        metrics: count what is answered, by these paths.
    """

    def __init__(
        self, app: ASGIApp, key: str | None, hosts: Sequence[str], body: int, metrics: Metrics, paths: Sequence[str]
    ):  # fmt: skip
        self.app, self.key, self.hosts, self.body = app, key, hosts, body
        self.metrics, self.paths = metrics, frozenset(paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *HEADERS]
                path = (
                    scope["path"] if scope["path"] in self.paths else "other"
                )  # callers cannot make up labels
                self.metrics.answers.labels(path, str(message["status"])).inc()
            await send(message)

        refusal = self._refusal(scope)
        if refusal is None:
            await self.app(scope, receive, counted)
        else:
            await refusal.response()(scope, receive, counted)

    def _refusal(self, scope: Scope) -> Refusal | None:
        headers = {name.lower(): value for name, value in scope["headers"]}
        host = _name(headers.get(b"host", b"").decode("latin-1"))
        if self.hosts and host not in self.hosts:
            return Refusal(f"host {host!r} is not this server's: {', '.join(self.hosts)}", 421)
        path = scope["path"]
        if self.key is not None and not (path in OPEN or path.startswith("/page/")):
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, b"Bearer " + self.key.encode()):
                return Refusal("a valid key is needed: Authorization: Bearer KEY", 401, code="invalid_api_key",
                               headers={"WWW-Authenticate": "Bearer"})  # fmt: skip
        if scope["method"] == "POST":
            kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
            if kind != b"application/json":
                return Refusal("the body must be sent as Content-Type: application/json", 415)
            length = headers.get(b"content-length", b"0")
            if length.isdigit() and int(length) > self.body:
                return too_large(self.body)
        return None


def too_large(most: int) -> Refusal:
    """The answer to a body of too many bytes."""
    return Refusal(f"the body is larger than {most} bytes", 413)


def _name(host: str) -> str:
    """The name in a Host header, without its port."""
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0]
