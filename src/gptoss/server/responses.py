"""``/v1/responses``: a turn whose answer is a list of items, and which the server remembers."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from gptoss.server.errors import refused
from gptoss.server.gate import tell
from gptoss.server.responses_body import ResponseRequest
from gptoss.server.responses_desk import Desk
from gptoss.server.responses_job import Job
from gptoss.server.responses_tools import left_out
from gptoss.server.schema import EITHER, ERRORS, check_model
from gptoss.server.sse import EventStream, Json, Whole

router = APIRouter(prefix="/v1/responses")


async def _answered(job: Job) -> dict[str, Any]:
    await job.over.wait()
    if job.error is not None:
        raise job.error
    return job.document


def _left(request: Request, job: Job) -> None:
    """The client has what it wanted, or has hung up."""
    if not job.background:
        job.stop()
    said = job.document
    tell(request, usage=said["usage"], finish=[said["status"]])


@router.post("", responses=EITHER, response_class=Response)
async def create(body: ResponseRequest, request: Request) -> Response:
    """The next turn of a conversation."""
    desk = _desk(request)
    check_model(body.model, desk.served)
    outside = [f"tools_{kind}" for kind in left_out(body.tools or [], desk.served)]
    tell(request, ignored=[*body.unknown(), *outside])
    job = await desk.open(body)
    tell(request, response=job.id)
    if body.stream:
        return EventStream(job.follow(), lambda: _left(request, job))
    if body.background:
        return Json(job.document)
    return Whole(lambda: _answered(job), lambda: _left(request, job))


@router.get("/{response_id}", responses=EITHER, response_class=Response)
async def retrieve(
    response_id: str,
    request: Request,
    stream: bool = False,
    starting_after: Annotated[int | None, Query(ge=0)] = None,
) -> Response:
    """A response as it is now, or its events behind a number as they come."""
    desk = _desk(request)
    found = await desk.find(response_id)
    if not stream:
        return Json(found)
    job = desk.running(response_id)
    return EventStream(job.follow(-1 if starting_after is None else starting_after))


@router.delete("/{response_id}", responses=ERRORS)
async def delete(response_id: str, request: Request) -> Response:
    """Forget a response; one that runs is stopped."""
    await _desk(request).delete(response_id)
    return Json({"id": response_id, "object": "response", "deleted": True})


@router.post("/{response_id}/cancel", responses=ERRORS)
async def cancel(response_id: str, request: Request) -> Response:
    """Stop a background response. One that is over stays as it is."""
    return Json(await _desk(request).cancel(response_id))


@router.get("/{response_id}/input_items", responses=ERRORS)
async def input_items(
    response_id: str,
    request: Request,
    after: Annotated[str | None, Query(max_length=256)] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
) -> Response:
    """The items that led to a response, those of the responses before it included."""
    items = await _desk(request).input_items(response_id)
    if order == "desc":
        items.reverse()
    ids = [item["id"] for item in items]
    if after is not None and after not in ids:
        raise refused(f"after: there is no item {after[:80]!r}", "after")
    start = 0 if after is None else ids.index(after) + 1
    page = items[start : start + limit]
    return Json(
        {
            "object": "list",
            "data": page,
            "first_id": page[0]["id"] if page else None,
            "last_id": page[-1]["id"] if page else None,
            "has_more": start + limit < len(items),
        }
    )


def _desk(request: Request) -> Desk:
    desk: Desk = request.app.state.desk
    return desk
