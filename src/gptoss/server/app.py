"""The application: routes, errors in one form, and what stands around them."""

import itertools
import re
from collections.abc import Iterable, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp

from gptoss.server import chat, completions, models, responses, tokens
from gptoss.server.errors import ApiError, as_api_error, refused
from gptoss.server.gate import OPEN, Gate
from gptoss.server.keys import Keys
from gptoss.server.responses_desk import Desk
from gptoss.server.served import Served
from gptoss.server.sse import Json, error_response
from gptoss.server.store import Store

LONGEST = 400  # characters of a message: what a client wrote is not repeated at length
FIELD = re.compile(r"[a-z_0-9]{1,40}")
TAGS = ("system", "developer", "user", "assistant", "tool", "text", "texts", "tokens", "batches")
ROUTERS = (
    chat.router,
    responses.router,
    completions.router,
    tokens.router,
    models.router,
)


def application(served: Served, store: Store | None = None) -> FastAPI:
    """The routes over a model, nothing around them."""
    app = FastAPI(
        docs_url=None, redoc_url=None, redirect_slashes=False, default_response_class=Json
    )
    app.state.served = served
    app.state.desk = Desk(served, Store() if store is None else store)
    for router in ROUTERS:
        app.include_router(router)
    app.add_exception_handler(ApiError, _on_error)
    app.add_exception_handler(Exception, _on_error)  # answers; the gate logs it
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http)
    app.openapi = lambda: _described(app)  # type: ignore[method-assign]
    return app


def guarded(
    app: FastAPI, served: Served, *, keys: Sequence[str] = (), origins: Iterable[str] = ()
) -> tuple[ASGIApp, Gate]:
    """The application behind its gate; ``origins``: of web pages that may call it."""
    gate = Gate(app, keys=Keys(keys), metrics=served.metrics)
    if not (allowed := list(origins)):
        return gate, gate
    exposed = ["x-request-id", "retry-after"]
    around = CORSMiddleware(
        gate,
        allow_origins=allowed,
        allow_methods=["GET", "POST", "DELETE"],
        allow_headers=["*"],
        expose_headers=exposed,
    )
    return around, gate


async def _on_error(_: Request, error: Exception) -> Response:
    return error_response(as_api_error(error))


async def _on_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    said = ApiError(error.status_code, str(error.detail), headers=error.headers)
    if error.status_code == 404:
        said = ApiError(404, f"there is no {request.url.path[:200]} here", code="not_found")
    elif error.status_code == 405:
        message = f"{request.url.path[:200]} is not for {request.method[:20]}"
        said = ApiError(405, message, code="method_not_allowed", headers=error.headers)
    elif error.status_code == 400:
        said = refused("the body is no JSON, or nested too deeply")
    return error_response(said)


async def _on_invalid(_: Request, error: Exception) -> Response:
    """One sentence of many errors: that of the innermost place."""
    assert isinstance(error, RequestValidationError)
    first = max(error.errors(), key=lambda e: len(_place(e["loc"])))
    where = _place(first["loc"])
    field = re.sub(r"\.(\d+)", r"[\1]", ".".join(where))
    message = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "json_invalid":
        message, field = f"the body is no JSON: {first['ctx']['error']}", ""
    elif first["type"] in ("model_attributes_type", "model_type", "missing") and not field:
        message = "the body must be a JSON object, and its content-type application/json"
    said = f"{field}: {message}" if field else message
    return error_response(refused(said[:LONGEST], field[:100] or None))


def _place(loc: Sequence[Any]) -> list[str]:
    """Names and numbers, without "body" and without the alternatives that pydantic tried."""
    place: list[str] = []
    for before, x in itertools.pairwise(loc):
        tag = x in TAGS and (isinstance(before, int) or before == "prompt")
        if isinstance(x, int) or (FIELD.fullmatch(x) and not tag and x != "str"):
            place.append(str(x))
    return place


def _described(app: FastAPI) -> dict[str, Any]:
    """OpenAPI, true to what is answered: errors in our form, and keys."""
    if app.openapi_schema is None:
        said = get_openapi(title="gptoss", version=_version(), routes=app.routes)
        for path, operations in said["paths"].items():
            for operation in operations.values():
                operation["responses"].pop("422", None)
                operation["security"] = [] if path in OPEN else [{}, {"key": []}]
        parts = said.setdefault("components", {})
        parts["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for name in ("HTTPValidationError", "ValidationError"):
            parts.get("schemas", {}).pop(name, None)
        app.openapi_schema = said
    return app.openapi_schema


def _version() -> str:
    from importlib.metadata import version

    return version("gptoss")
