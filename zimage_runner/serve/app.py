"""The service's web application: pictures in OpenAI's form, and how the service is."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import logging
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from zimage_runner.errors import RunStopped, UserError
from zimage_runner.logs import say
from zimage_runner.outputs.config import Format
from zimage_runner.serve.edits import plan_edit, private_folder, read_edit
from zimage_runner.serve.errors import ApiError
from zimage_runner.serve.fields import Generation, Planned, parse, plan_generation
from zimage_runner.serve.guard import Guard, read_json
from zimage_runner.serve.orders import NOTHING_SENT, NotDrawn, Picture, PictureOrder, numbered
from zimage_runner.serve.run_routes import add_runs
from zimage_runner.serve.scheduler import Full
from zimage_runner.serve.service import Service

log = logging.getLogger(__name__)

MEDIA_TYPES = {Format.png: "image/png", Format.jpeg: "image/jpeg", Format.webp: "image/webp"}
CLIENT_GONE = 499
"""As nginx counts it; nobody reads it."""
WHILE_LOADING_S = 5.0
NUMBERS = 100_000


def application(service: Service, token: str | None = None) -> Guard:
    """The ASGI application. It starts the service, and does not end it."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    _add_health(app, service)
    _add_models(app, service)
    _add_images(app, service)
    add_runs(app, service)

    @app.exception_handler(ApiError)
    async def refuse(request: Request, error: ApiError) -> JSONResponse:
        return JSONResponse(error.body(), error.status, headers=error.headers)

    @app.exception_handler(UserError)
    async def refuse_input(request: Request, error: UserError) -> JSONResponse:
        return await refuse(request, ApiError(400, " ".join(str(error).split())))

    @app.exception_handler(RequestValidationError)
    async def refuse_query(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        name = str(first["loc"][-1])
        return await refuse(request, ApiError(400, f"{name}: {first['msg']}", param=name))

    @app.exception_handler(HTTPException)
    async def refuse_route(request: Request, error: HTTPException) -> JSONResponse:
        return await refuse(
            request, ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
        )

    @app.exception_handler(Exception)
    async def apologise(request: Request, error: Exception) -> JSONResponse:
        log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return await refuse(request, ApiError(500, "this is a fault of the service: its log says more"))

    return Guard(app, service.settings.server, token, service.metrics)


def _add_health(app: FastAPI, service: Service) -> None:
    @app.get("/live")
    async def live() -> dict[str, bool]:
        return {"live": True}

    @app.get("/ready")
    async def ready() -> dict[str, bool]:
        check_ready(service)
        return {"ready": True}

    @app.get("/metrics")
    def metrics() -> Response:
        return Response(service.metrics_text(), media_type="text/plain; version=0.0.4")


def check_ready(service: Service) -> None:
    """Raise ApiError unless pictures can be drawn now."""
    if (why := service.why_not_ready) is not None:
        raise ApiError(503, why, code="not_ready", retry_after_s=WHILE_LOADING_S)


def _add_models(app: FastAPI, service: Service) -> None:
    name = service.settings.config.model.name
    model = {"id": name, "object": "model", "created": service.created, "owned_by": "zimage_runner"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{id:path}")
    async def one_model(id: str) -> dict[str, Any]:
        if id != name:
            raise ApiError(404, f"this service has one model, {name!r}", param="model", code="model_not_found")
        return model


def _add_images(app: FastAPI, service: Service) -> None:
    server = service.settings.server
    numbers = itertools.cycle(range(NUMBERS))

    @app.post("/v1/images/generations")
    async def generations(request: Request) -> Response:
        began = time.perf_counter()
        asked = parse(Generation, await read_json(request, server))
        check_ready(service)
        planned = await asyncio.to_thread(plan_generation, asked, service.settings)
        return await draw(asked, planned, request, began)

    @app.post("/v1/images/edits")
    async def edits(request: Request) -> Response:
        began = time.perf_counter()
        asked, uploads = await read_edit(request, server)
        check_ready(service)
        with private_folder(service.runs.uploads) as folder:
            planned = await asyncio.to_thread(plan_edit, asked, uploads, folder, service.settings)
            names = {field: upload.name for field, upload in uploads.items()}
            return await draw(asked, planned, request, began, names)

    async def draw(
        asked: Generation, planned: Planned, request: Request, began: float, sent_as: Mapping[str, str] = NOTHING_SENT
    ) -> Response:
        """Answer with the pictures of a plan. ``sent_as``: as ``PictureOrder`` has it."""
        spec, output = planned
        size = "{0.width}x{0.height}".format(spec.plan.items[0].params)
        if server.log_prompts:
            say(f"{len(spec.plan)} x {size}: {asked.prompt}")
        order = PictureOrder(numbered(spec, next(numbers)), output, service.scheduler, service.pool, sent_as)
        try:
            order.submit()
        except Full:
            wait = service.scheduler.seconds_to_wait
            raise ApiError(429, "the queue is full: ask again later", code="queue_full", retry_after_s=wait) from None
        except RunStopped as error:
            raise ApiError(503, str(error), code="not_ready", retry_after_s=WHILE_LOADING_S) from None
        pictures = await _finished(order, request, server.request_timeout_s)
        if pictures is None:
            return Response(status_code=CLIENT_GONE)
        answer: dict[str, Any] = {
            "created": int(time.time()),
            "output_format": output.format.name,
            "size": size,
            "queue_seconds": order.queue_seconds,
            "data": [told(picture, output.format, asked.response_format, request) for picture in pictures],
        }
        if spec.plan.truncations:
            answer["warnings"] = [str(truncation) for truncation in spec.plan.truncations]
        service.metrics.drew(time.perf_counter() - began, order.queue_seconds or 0.0)
        return JSONResponse(answer, headers={"cache-control": "no-store"})

    def told(picture: Picture, format: Format, as_what: str | None, request: Request) -> dict[str, Any]:
        if as_what == "url":
            name = service.kept.put(picture.data, MEDIA_TYPES[format]) + format.suffix
            return {"url": str(request.url_for("kept", name=name)), "seed": picture.seed}
        return {"b64_json": base64.b64encode(picture.data).decode("ascii"), "seed": picture.seed}

    @app.get("/v1/images/files/{name}", name="kept")
    async def kept(name: str) -> Response:
        found = service.kept.get(name.partition(".")[0])
        if found is None:
            raise ApiError(404, "this picture is not kept, or not any more", code="not_found")
        return Response(found[1], media_type=found[0], headers={"cache-control": "private, max-age=3600"})

    @app.post("/v1/images/variations")
    async def variations() -> None:
        message = "this model draws no picture without a prompt: send both to /v1/images/edits"
        raise ApiError(501, message, code="not_implemented")


async def _finished(order: PictureOrder, request: Request, timeout_s: float) -> list[Picture] | None:
    """The pictures once they are drawn; None when the client has gone away. Raises ApiError."""
    drawn = asyncio.ensure_future(asyncio.wrap_future(order.done))
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({drawn, gone}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if drawn.done():
            return drawn.result()
        order.cancel()
        if gone.done():
            return None
        raise ApiError(504, f"not drawn within {timeout_s:g} s: the place in the queue is free", code="timeout")
    except NotDrawn as error:
        raise ApiError(500, str(error), code="not_drawn") from None
    except RunStopped as error:
        raise ApiError(503, str(error), code="not_ready", retry_after_s=WHILE_LOADING_S) from None
    finally:
        gone.cancel()
        if not order.done.done():
            order.cancel()
        drawn.cancel()


async def _gone(request: Request) -> None:
    """Return once the client has closed its connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
