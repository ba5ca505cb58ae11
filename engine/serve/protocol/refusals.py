"""Refusals: every error that a caller sees, in the shape that OpenAI's clients read."""

from __future__ import annotations

import json
import re
from typing import Any

from starlette.responses import Response

from ...errors import CapabilityError, HandloomError, ParameterError, PromptError
from ..worker import Full

KINDS = {
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
}
JSON = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
LOST = re.compile(
    r"logits hold NaN|out of memory|the run ended|no block|blocks"
)  # errors that are not the caller's


class Refusal(Exception):
    """A request that is not answered as it was asked.

    Args:
        message: what is wrong and what would be valid. status: of HTTP. param: the field. code: OpenAI's word for it.
        headers: of the answer.
    """

    def __init__(
        self, message: str, status: int = 400, *, param: str | None = None, code: str | None = None,
        headers: dict[str, str] | None = None,
    ):  # fmt: skip
        super().__init__(message)
        self.message, self.status, self.param, self.code, self.headers = message, status, param, code, headers

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """The answer."""
        return as_json(self.body(), self.status, self.headers)


def refusal_of(error: Refusal | HandloomError) -> Refusal:
    """What the engine or a worker would not do, as an answer."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, Full):
        return Refusal(
            f"{error}; try again later", 429, code="too_many_requests", headers={"Retry-After": "1"}
        )
    if isinstance(error, ParameterError | PromptError | CapabilityError):
        message = re.sub(r"^request \d+: ", "", str(error))
        field = re.match(r"(\w+)=|unknown sampling parameter '(\w+)'", message)
        long = "too many for max_length" in message
        code = "context_length_exceeded" if long else None
        return Refusal(message, param=field and (field[1] or field[2]), code=code)
    return Refusal(str(error), 500)


def refusal_of_result(error: str) -> Refusal:
    """A sample that ended in error, as an answer."""
    message = re.sub(r"^request \d+: ", "", error)
    return Refusal(message, 500 if LOST.search(message) else 400)


def as_json(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Content as JSON; lone surrogates that a caller sent come back as they were escaped."""
    return Response(encoded(content), status, headers, "application/json")


def encoded(content: Any) -> bytes:
    """Content as the bytes of JSON."""
    if isinstance(content, str):
        return json.encoder.encode_basestring(content).encode("utf-8", "backslashreplace")
    return JSON.encode(content).encode("utf-8", "backslashreplace")


def decoded(body: bytes) -> dict[str, Any]:
    """The JSON object of a request's body.

    Raises:
        Refusal: it is none.
    """

    def no_number(text: str):
        raise ValueError(f"{text} is not JSON")

    try:
        content = json.loads(body, parse_constant=no_number)
    except (ValueError, RecursionError) as error:
        raise Refusal(f"the body is not valid JSON: {error}", code="invalid_json") from error
    if not isinstance(content, dict):
        raise Refusal(f"the body must be a JSON object, got {type(content).__name__}", code="invalid_json")
    return content
