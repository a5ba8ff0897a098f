"""A detector as an HTTP service: POST an image, get its detections as JSON.

python examples/serve.py runs/shapes --port 8000
curl --data-binary @image.jpg -H 'Content-Type: image/jpeg' http://127.0.0.1:8000/predict
curl -F file=@image.jpg http://127.0.0.1:8000/predict

The model is a run folder, a weights file, or a file of `fasterrcnn-jax export`. The answer has the names of
detections.jsonl: width, height, boxes (x1, y1, x2, y2 in pixels), scores, labels, class_names. GET /health says that
the process works, /ready that all canvases are compiled, and /metrics has numbers for Prometheus. After SIGTERM the
service accepts no connection, answers what is queued, and exits with status 0.

One process uses all devices. There is no TLS and no authentication. pip install 'fasterrcnn_jax[serve]'
"""

import argparse
import asyncio
import contextlib
import dataclasses
import logging
import math
import signal
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import prometheus_client as prometheus  # pyright: ignore[reportMissingImports]
import uvicorn  # pyright: ignore[reportMissingImports]
from python_multipart.exceptions import FormParserError  # pyright: ignore[reportMissingImports]
from python_multipart.multipart import (  # pyright: ignore[reportMissingImports]
    File,
    FormParser,
    parse_options_header,
)
from starlette.applications import Starlette  # pyright: ignore[reportMissingImports]
from starlette.exceptions import HTTPException  # pyright: ignore[reportMissingImports]
from starlette.requests import ClientDisconnect, Request  # pyright: ignore[reportMissingImports]
from starlette.responses import JSONResponse, Response  # pyright: ignore[reportMissingImports]
from starlette.routing import Route  # pyright: ignore[reportMissingImports]

import fasterrcnn_jax
from fasterrcnn_jax.config import DataConfig
from fasterrcnn_jax.data.images import read_image
from fasterrcnn_jax.data.records import StoredImage
from fasterrcnn_jax.errors import InputError
from fasterrcnn_jax.exported import is_exported, load_exported
from fasterrcnn_jax.inference.results import json_fields
from fasterrcnn_jax.inference.stream import Drawn, ExportedRunner, ModelRunner, core_count
from fasterrcnn_jax.inference.tiling import windows_of

logger = logging.getLogger("uvicorn.error")
AGAIN = {"Retry-After": "1"}
FORM = "multipart/form-data"
MOST_PARTS = 9  # of a form


def kind_of(request):
    return request.headers.get("Content-Type", "").partition(";")[0].strip().lower()


def file_in_form(content_type, content):
    """Returns the bytes of the file in a form.

    Raises:
      HTTPException: the content is not a form, or it does not contain one file.
    """
    parts = []

    def keep(part):
        parts.append(part)
        if len(parts) > MOST_PARTS:
            raise FormParserError(f"it has more than {MOST_PARTS} parts")

    try:
        boundary = parse_options_header(content_type)[1].get(b"boundary")
        parser = FormParser(FORM, keep, keep, boundary=boundary, config={"MAX_MEMORY_FILE_SIZE": math.inf})
        parser.write(content)
        parser.finalize()
    except FormParserError as error:
        raise HTTPException(400, f"the form cannot be read: {error}") from None
    files = [part for part in parts if isinstance(part, File)]
    if len(files) != 1:
        raise HTTPException(400, f"the form must contain exactly one complete file, got {len(files)}")
    files[0].file_object.seek(0)
    return files[0].file_object.read()


@dataclasses.dataclass
class Asked:
    """A request. The service skips its work when no client waits for the answer."""

    wanted: bool = True


@dataclasses.dataclass(eq=False)
class Part:
    """A part of an image that waits for the device."""

    asked: Asked
    drawn: Drawn
    since: float
    found: asyncio.Future


class Batches:
    """Runs batches of the parts that wait, one after the other, in a thread of its own.

    The part that has waited longest decides the canvas, so that no canvas waits for ever. A batch that is not full
    starts when this part has waited for `wait` seconds.
    """

    def __init__(self, runner, wait, registry):
        self._runner, self._wait = runner, wait
        self._waiting, self._arrived = [], asyncio.Event()
        self._device = ThreadPoolExecutor(1, "device")
        sizes = [2**k for k in range(runner.rows.bit_length())]
        self._images = prometheus.Histogram("detector_batch_images", "Images in it", registry=registry, buckets=sizes)
        self._seconds = prometheus.Histogram("detector_batch_seconds", "Time of a batch", registry=registry)

    async def detect(self, asked, drawn):
        """Returns the detections in a part; is cancelled when the client has left or the deadline has passed."""
        loop = asyncio.get_running_loop()
        part = Part(asked, drawn, loop.time(), loop.create_future())
        self._waiting.append(part)
        self._arrived.set()
        return await part.found

    async def in_thread(self, function, *arguments):
        return await asyncio.get_running_loop().run_in_executor(self._device, function, *arguments)

    async def run(self):
        while True:
            batch = await self._next()
            self._images.observe(len(batch))
            try:
                with self._seconds.time():
                    found = await self.in_thread(self._runner.detect, [part.drawn for part in batch])
                for part, of in zip(batch, found, strict=True):
                    part.found.set_result(of)
            except Exception as error:  # such as too little memory: the next batch may run
                for part in batch:
                    if not part.found.done():
                        part.found.set_exception(error)

    async def _next(self):
        while True:
            for part in self._waiting:
                if not part.asked.wanted:
                    part.found.cancel()
            self._waiting = [part for part in self._waiting if part.asked.wanted]
            left = None
            if self._waiting:
                first = self._waiting[0]
                same = [part for part in self._waiting if part.drawn.canvas == first.drawn.canvas]
                left = first.since + self._wait - asyncio.get_running_loop().time()
                if len(same) >= self._runner.rows or left <= 0:
                    batch = same[: self._runner.rows]
                    self._waiting = [part for part in self._waiting if part not in batch]
                    return batch
            self._arrived.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._arrived.wait(), left)


class Service:
    """Answers requests. At most `queue` are admitted at a time, from reading the body to the answer."""

    def __init__(self, runner, class_names, *, queue, deadline, max_bytes, max_pixels, batch_wait, threads):
        self._runner, self._class_names = runner, class_names
        self._queue, self._deadline = queue, deadline
        self._max_bytes, self._max_pixels = max_bytes, max_pixels
        self._decoders = ThreadPoolExecutor(threads, "decoder")
        self._admitted, self._ready, self.failed, self.stopping = 0, False, False, False
        self._registry = registry = prometheus.CollectorRegistry()
        prometheus.ProcessCollector(registry=registry)
        self._batches = Batches(runner, batch_wait, registry)
        self._answers = prometheus.Counter("detector_answers", "Answers of /predict", ["status"], registry=registry)
        self._seconds = prometheus.Histogram("detector_answer_seconds", "Time of an answer 200", registry=registry)
        admitted = prometheus.Gauge("detector_admitted", "Requests in work", registry=registry)
        admitted.set_function(lambda: self._admitted)
        self.application = Starlette(
            routes=[
                Route("/predict", self._predict, methods=["POST"]),
                Route("/health", self._say_healthy),
                Route("/ready", self._say_ready),
                Route("/metrics", self._say_metrics),
            ],
            exception_handlers={HTTPException: self._refuse},
            lifespan=self._running,
        )

    @contextlib.asynccontextmanager
    async def _running(self, application):
        work = asyncio.create_task(self._run())
        yield
        self.stopping = True
        work.cancel()
        answered = self._registry.get_sample_value("detector_answers_total", {"status": "200"})
        logger.info("images answered: %d", answered or 0)
        self._decoders.shutdown(wait=False, cancel_futures=True)

    async def _run(self):
        try:
            await self._batches.in_thread(self._warm_up)
            self._ready = True
            await self._batches.run()
        except Exception:
            logger.exception("the detector cannot go on")
            self.failed = True

    def _warm_up(self):
        for canvas in self._runner.warm_up():
            logger.info("compiled canvas %d x %d", *canvas)
            if self.stopping:
                return

    def _json(self, content, status=200, headers=None):
        # While it stops, the next request on this connection would find it closed.
        closing = {"Connection": "close"} if self.stopping else {}
        return JSONResponse(content, status, {**(headers or {}), **closing})

    async def _refuse(self, request, error):
        return self._json({"error": error.detail}, error.status_code, error.headers)

    async def _say_healthy(self, request):
        return self._json({"status": "failed"}, 500) if self.failed else self._json({"status": "ok"})

    async def _say_ready(self, request):
        self._check_compiled()
        return self._json({"status": "ready"})

    async def _say_metrics(self, request):
        return Response(prometheus.generate_latest(self._registry), media_type=prometheus.CONTENT_TYPE_LATEST)

    def _check_compiled(self):
        if not self._ready:
            raise HTTPException(503, "the service is not ready: it compiles its programs", AGAIN)

    async def _predict(self, request):
        began, status = asyncio.get_running_loop().time(), 500
        try:
            answer = await self._answer(request, began + self._deadline)
            status = 200
            self._seconds.observe(asyncio.get_running_loop().time() - began)
            return self._json(answer)
        except HTTPException as error:
            status = error.status_code
            raise
        except ClientDisconnect:
            status = 499  # for the metrics: nobody reads it
            return Response(status_code=status)
        except Exception:
            logger.exception("a detection failed")
            return self._json({"error": "the detection failed; the log of the service says why"}, 500)
        finally:
            self._answers.labels(status).inc()

    async def _answer(self, request, deadline):
        self._check_compiled()
        if self._admitted >= self._queue:
            raise HTTPException(503, f"the queue is full ({self._queue} requests); try again", AGAIN)
        self._admitted += 1
        asked, tasks = Asked(), []
        try:
            try:
                async with asyncio.timeout_at(deadline):
                    content = await self._read(request)
            except TimeoutError:
                late = f"the body did not arrive within {self._deadline:g} seconds"
                raise HTTPException(408, late, {"Connection": "close"}) from None
            tasks = [asyncio.create_task(work) for work in (self._detect(asked, request, content), self._gone(request))]
            left = deadline - asyncio.get_running_loop().time()
            done, _ = await asyncio.wait(tasks, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if tasks[0] in done:
                return tasks[0].result()
            if done:
                raise ClientDisconnect
            raise HTTPException(503, f"no detections within {self._deadline:g} seconds; try again", AGAIN)
        finally:
            asked.wanted = False
            if tasks:
                tasks[1].cancel()
                # A thread may still decode: the place in the queue is free when the thread is.
                tasks[0].add_done_callback(self._leave)
            else:
                self._admitted -= 1

    def _leave(self, work):
        self._admitted -= 1
        if not work.cancelled():
            work.exception()  # nobody may wait for it, and asyncio would log it

    async def _gone(self, request):
        while (await request.receive())["type"] != "http.disconnect":
            pass

    async def _read(self, request):
        """Returns the body."""
        kind = kind_of(request)
        if kind not in ("", "application/octet-stream", FORM) and not kind.startswith("image/"):
            known = f"image/..., application/octet-stream or {FORM}"
            raise HTTPException(415, f"Content-Type must be {known}, got {kind[:80]!r}")
        too_large = HTTPException(413, f"the body has more than {self._max_bytes:,} bytes, which is the limit")
        if int(request.headers.get("Content-Length", 0)) > self._max_bytes:
            raise too_large
        size = 0

        async def receive():
            nonlocal size
            message = await request.receive()
            size += len(message.get("body", b""))
            if size > self._max_bytes:
                raise too_large
            return message

        return await Request(request.scope, receive).body()

    async def _detect(self, asked, request, content):
        run = asyncio.get_running_loop().run_in_executor
        try:
            image_hw, parts = await run(self._decoders, self._draw, asked, request, content)
        except InputError as error:
            raise HTTPException(422, str(error)) from None
        found = await asyncio.gather(*(self._batches.detect(asked, part) for part in parts))
        # Not among the decoders: a detection that is done would wait behind images that are not.
        merged = await run(None, self._runner.merged, [found], windows_of(image_hw, None, 0.0))
        return json_fields(image_hw, merged, self._class_names)

    def _draw(self, asked, request, content):
        """Returns the size of an image and its parts on their canvases; called in threads."""
        if not asked.wanted:
            raise InputError("nobody waits for the image")
        if kind_of(request) == FORM:
            content = file_in_form(request.headers["Content-Type"], content)
        pixels = read_image(StoredImage("the upload", lambda: content), upright=True, max_pixels=self._max_pixels)
        return pixels.shape[:2], [self._runner.draw(pixels, view) for view in self._runner.views]


class Server(uvicorn.Server):
    """A server that stops if its service fails, and tells the service that it stops."""

    def __init__(self, service, **options):
        # h11 limits the head of a request to 64 kB.
        super().__init__(uvicorn.Config(service.application, http="h11", ws="none", access_log=False, **options))
        self._service = service

    async def on_tick(self, counter):
        self.should_exit |= self._service.failed
        self._service.stopping = self.should_exit
        return await super().on_tick(counter)


def load_runner(path, batch_size):
    """Returns what runs the detector in a run folder or file, and its class names."""
    if is_exported(path):
        detector = load_exported(path)
        return ExportedRunner(detector, batch_size=batch_size), detector.class_names
    model = fasterrcnn_jax.load(path)
    return ModelRunner(model, batch_size=batch_size), model.class_names


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="run folder, weights file, or file of fasterrcnn-jax export")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0: all of this machine")
    parser.add_argument("--port", type=int, default=8000, help="0: a free one, which the log names")
    parser.add_argument("--batch_size", type=int, default=1, help="images that each device detects in at once")
    parser.add_argument("--batch_wait", type=float, default=0.005, help="seconds that a batch waits until it is full")
    parser.add_argument("--queue", type=int, default=32, help="requests in work; more get status 503")
    parser.add_argument("--deadline", type=float, default=10.0, help="seconds until a request gets status 503")
    parser.add_argument("--max_bytes", type=int, default=20_000_000, help="largest body of a request")
    parser.add_argument("--max_pixels", type=int, default=DataConfig.max_pixels, help="largest image")
    parser.add_argument("--threads", type=int, default=core_count(), help="threads that decode and resize")
    options = vars(parser.parse_args(argv))
    for name in ("batch_size", "queue", "deadline", "max_bytes", "max_pixels", "threads"):
        if not 0 < options[name] < math.inf:
            parser.error(f"--{name} must be positive and finite, got {options[name]}")
    if not 0 <= options["batch_wait"] < math.inf:
        parser.error(f"--batch_wait must be at least 0 and finite, got {options['batch_wait']}")
    path, host, port, batch_size = (options.pop(name) for name in ("model", "host", "port", "batch_size"))
    # Python keeps the text of each warning, and an upload can make Pillow warn in any number of texts.
    warnings.filterwarnings("ignore", module="PIL")
    # uvicorn raises the signal again after it has stopped; without this the exit status would be that of a kill.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    try:
        service = Service(*load_runner(path, batch_size), **options)
    except ValueError as error:  # also InputError
        parser.error(str(error))
    Server(service, host=host, port=port, timeout_graceful_shutdown=math.ceil(options["deadline"]) + 1).run()
    sys.exit(1)  # no signal has stopped it


if __name__ == "__main__":
    main()
