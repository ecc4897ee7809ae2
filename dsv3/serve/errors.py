"""Refusals and failures, as HTTP statuses with an OpenAI-shaped body."""
from __future__ import annotations

import json
from typing import Any

TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 504: "timeout_error"}


class ApiError(Exception):
    """An answer other than 200. param: the field of the request it is about; code: a word for programs."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None,
                 headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers or {}

    def body(self) -> dict[str, Any]:
        """{"error": {"message", "type", "param", "code"}}."""
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Any:
        """For the web framework."""
        from fastapi import Response

        return Response(json.dumps(self.body()), self.status, self.headers, "application/json")


def busy(message: str) -> ApiError:
    """429: the queue is full."""
    return ApiError(429, message, code="queue_full", headers={"Retry-After": "1"})


def closing() -> ApiError:
    """503: the server is shutting down."""
    headers = {"Retry-After": "10", "Connection": "close"}
    return ApiError(503, "the server is shutting down", code="shutting_down", headers=headers)


def gone() -> ApiError:
    """For the books: nobody reads it."""
    return ApiError(499, "the client has gone")


def broken(failure: str) -> ApiError:
    """500: the engine has stopped."""
    return ApiError(500, f"the engine has stopped: {failure}; the server must be restarted", code="engine_failure")
