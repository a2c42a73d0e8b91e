"""Which model there is, whether it can be asked, and how it has been doing."""

from typing import Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.responses import Response

from gptoss.server.errors import ApiError, unavailable
from gptoss.server.schema import ERRORS, check_model
from gptoss.server.served import Served

router = APIRouter()


class Model(BaseModel):
    """A model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "gptoss"
    max_model_len: int


class Models(BaseModel):
    """All models: there is one."""

    object: Literal["list"] = "list"
    data: list[Model]


class State(BaseModel):
    """How the server is."""

    status: Literal["ok"] = "ok"


@router.get("/v1/models", responses=ERRORS)
async def models(request: Request) -> Models:
    """The model that is served."""
    return Models(data=[_model(request.app.state.served)])


@router.get("/v1/models/{model:path}", responses=ERRORS)
async def model(model: str, request: Request) -> Model:
    """One model, by its id."""
    check_model(model, request.app.state.served)
    return _model(request.app.state.served)


@router.get("/health", responses={503: ERRORS[503]})
async def health(request: Request) -> State:
    """Whether the engine is alive; needs no key."""
    served: Served = request.app.state.served
    if not served.worker.alive:
        raise ApiError(503, "the engine has stopped", type="server_error", code="dead")
    return State()


@router.get("/ready", responses={503: ERRORS[503]})
async def ready(request: Request) -> State:
    """Whether requests are taken; needs no key."""
    if request.app.state.gate.draining:
        raise unavailable()
    return await health(request)


@router.get("/metrics", responses=ERRORS, response_class=Response)
async def metrics(request: Request) -> Response:
    """For Prometheus."""
    served: Served = request.app.state.served
    return Response(served.metrics.text(), media_type="text/plain; version=0.0.4")


def _model(served: Served) -> Model:
    return Model(id=served.name, created=served.created, max_model_len=served.context)
