"""What a client is told when something is not to be: OpenAI's form, and nothing of the inside.

{"error": {"message": "...", "type": "invalid_request_error", "param": "messages", "code": null}}
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from gptoss.errors import ContextExceeded, GrammarError, Overloaded

RETRY = {"retry-after": "1"}  # seconds


class ApiError(Exception):
    """An answer that is no answer. The message is for the client, word for word."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.type = status, message, type
        self.param, self.code, self.headers = param, code, dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """As JSON."""
        said = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": said}


def refused(message: str, param: str | None = None) -> ApiError:
    """The request cannot be meant so."""
    return ApiError(400, message, param=param)


def overloaded(message: str) -> ApiError:
    """Too many requests wait."""
    return ApiError(
        429, message, type="rate_limit_error", code="rate_limit_exceeded", headers=RETRY
    )


def unavailable(message: str = "the server is shutting down") -> ApiError:
    """Nobody can be served just now."""
    return ApiError(503, message, type="server_error", code="unavailable", headers=RETRY)


def failed() -> ApiError:
    """Our fault; what it was stands in the log, under the request's id."""
    return ApiError(500, "the server failed on this request; its log says why", type="server_error")


@contextmanager
def refusing(param: str | None = None) -> Iterator[None]:
    """What the library refuses of a request becomes an ``ApiError``.

    It names the field that the library's sentence begins with, else ``param``.
    """
    try:
        yield
    except Overloaded as error:
        raise overloaded(str(error)) from None
    except ContextExceeded as error:
        code = "context_length_exceeded"
        raise ApiError(400, str(error), param=param or "messages", code=code) from None
    except (ValueError, GrammarError) as error:
        raise refused(str(error), _field(str(error)) or param) from None


def as_api_error(error: Exception) -> ApiError:
    """What a request is told that ended with this error."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, GrammarError):
        return refused(str(error))
    return failed()


def _field(message: str) -> str | None:
    """The library's sentences begin with the field: "top_p must be ...", "tools: ..."."""
    found = re.match(r"(\w+)(?::| must be)", message)
    return found[1] if found else None
