"""The example `serve.py` over real connections: a server in a thread, with a runner whose detection the test controls.

Without the extra the tests are skipped: pip install 'fasterrcnn_jax[serve]'.
"""

import contextlib
import dataclasses
import http.client
import io
import json
import socket
import sys
import textwrap
import threading
import time
from pathlib import Path

import hostile_images
import numpy as np
import pytest
import tiny
from PIL import Image

import fasterrcnn_jax

pytest.importorskip("starlette", reason="pip install 'fasterrcnn_jax[serve]'")
pytest.importorskip("uvicorn", reason="pip install 'fasterrcnn_jax[serve]'")
pytest.importorskip("prometheus_client", reason="pip install 'fasterrcnn_jax[serve]'")
pytest.importorskip("python_multipart", reason="pip install 'fasterrcnn_jax[serve]'")

from fasterrcnn_jax.config.model import TtaConfig  # noqa: E402
from fasterrcnn_jax.data.records import ImageDetections  # noqa: E402
from fasterrcnn_jax.inference.results import json_fields  # noqa: E402
from fasterrcnn_jax.inference.stream import Drawn, ExportedRunner, ModelRunner, detect_stream  # noqa: E402
from fasterrcnn_jax.training import compilations  # noqa: E402

ROOT = Path(__file__).parents[1]
OPTIONS = dict(queue=8, deadline=300.0, max_bytes=100_000, max_pixels=1_000_000, batch_wait=0.0, threads=2)


def imported(folder, name):
    sys.path.insert(0, str(ROOT / folder))
    try:
        return __import__(name)
    finally:
        sys.path.remove(str(ROOT / folder))


serve, load = imported("examples", "serve"), imported("benchmarks", "service")


class Controlled:
    """A runner whose only detection is the image; it waits for `gate` and fails if told to."""

    def __init__(self, rows=2):
        self.rows, self.views = rows, (None,)
        self.gate, self.compiled, self.batches, self.error = threading.Event(), threading.Event(), [], None
        self.gate.set()
        self.compiled.set()

    def draw(self, pixels, view):
        height, width = pixels.shape[:2]
        return Drawn((1, 2) if height < width else (2, 1), (pixels,), (height, width))

    def detect(self, parts):
        assert len({part.canvas for part in parts}) == 1 and len(parts) <= self.rows
        self.batches.append([part.original_hw for part in parts])
        assert self.gate.wait(300)
        if self.error is not None:
            raise self.error
        return [
            ImageDetections(
                np.float32([[0, 0, part.original_hw[1], part.original_hw[0]]]), np.float32([1]), np.int32([1])
            )
            for part in parts
        ]

    def merged(self, found, windows):
        return found[0][0]

    def warm_up(self):
        for canvas in ((1, 2), (2, 1)):
            assert self.compiled.wait(300)
            if self.error is not None:
                raise self.error
            yield canvas


@contextlib.contextmanager
def running(runner, class_names=("thing",), *, ready=True, **options):
    """Yields a service that listens at `service.port`."""
    service = serve.Service(runner, class_names, **(OPTIONS | options))
    server = serve.Server(service, port=0, log_level="warning")
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until(lambda: server.started)
    service.port, service.thread = server.servers[0].sockets[0].getsockname()[1], thread
    if ready:
        until(lambda: load.get(service.port, "/ready")[0] == 200)
    try:
        yield service
    finally:
        if isinstance(runner, Controlled):
            runner.gate.set()
        server.should_exit = True
        thread.join(300)
    assert not thread.is_alive()


def until(true, seconds=300):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def picture(width=30, height=20, kind="PNG", mode="RGB", **options):
    pixels = np.random.default_rng(width).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return hostile_images.encoded(Image.fromarray(pixels).convert(mode), kind, **options)


def ask(port, body=b"", headers=None, method="POST", path="/predict"):
    """Returns status, headers and content of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=3000)
    try:
        connection.request(method, path, body, {"Content-Type": "image/png"} if headers is None else headers)
        response = connection.getresponse()
        content = response.read()
        return response.status, response.headers, json.loads(content) if content else None
    finally:
        connection.close()


def asked(port, body, results):
    """Starts a request in a thread; its answer is appended to `results`."""
    thread = threading.Thread(target=lambda: results.append(ask(port, body)))
    thread.start()
    return thread


def metric(service, name):
    text = load.get(service.port, "/metrics")[1].decode()
    return float(next(line.split()[-1] for line in text.splitlines() if line.startswith(f"{name} ")))


def test_answers_are_the_detections_of_a_stream_and_nothing_is_compiled_after_ready(random_weights):
    """Of two views: the image and its mirror image. Of one canvas: each takes a compilation."""
    model = tiny.quick_model(random_weights)[0]
    image = dataclasses.replace(tiny.IMAGE, canvases=((96, 96),))
    model.config = dataclasses.replace(model.config, image=image, test_augment=TtaConfig(flip=True))
    turned = Image.Exif()
    turned[0x0112] = 6
    images = {
        "landscape": picture(72, 48),
        "portrait": picture(40, 70),
        "turned by EXIF": picture(64, 40, "JPEG", exif=turned.tobytes()),
    }
    with tiny.quick_compilation():
        runner = ModelRunner(model, batch_size=1)
        with running(runner, model.class_names) as service:
            compilations.watch()
            before = compilations.so_far()["compilations"]
            answers = [ask(service.port, content) for content in images.values()]
            assert compilations.so_far()["compilations"] == before
        upright = [np.asarray(Image.open(io.BytesIO(content)).convert("RGB")) for content in images.values()]
        upright[2] = np.ascontiguousarray(np.rot90(upright[2], 3))
        found = list(detect_stream(upright, lambda pixels: pixels, runner))
    for (status, _, answer), one in zip(answers, found, strict=True):
        assert status == 200 and len(answer["scores"]) > 0
        assert answer == json_fields(one.image_hw, one.detections, model.class_names)


def test_an_exported_file_is_served_with_the_detections_of_its_own_predict():
    (path,) = (ROOT / "tests" / "golden").glob("exported_by_jax_0.10.2.zip")
    with tiny.quick_compilation():
        runner, class_names = serve.load_runner(path, 2)
        assert isinstance(runner, ExportedRunner)
        with running(runner, class_names) as service:
            contents = [picture(*size) for size in ((90, 60), (50, 88))]
            answers = [ask(service.port, content) for content in contents]
            large = ask(service.port, picture(1, 500))
        pixels = [np.asarray(Image.open(io.BytesIO(content))) for content in contents]
        expected = fasterrcnn_jax.load_exported(path).predict(pixels, batch_size=2)
    for (status, _, answer), found, given in zip(answers, expected, pixels):
        assert status == 200 and (answer["height"], answer["width"]) == given.shape[:2]
        assert answer["class_names"] == list(found.names) and len(found.names) > 0
        np.testing.assert_array_equal(np.float32(answer["boxes"]), found.boxes)
        np.testing.assert_array_equal(np.float32(answer["scores"]), found.scores)
    assert large[0] == 422 and "larger than the canvas" in large[2]["error"]


def form(*parts, boundary="edge", end=True):
    """Returns the body of a form of (disposition, content) parts."""
    body = b"".join(
        f"--{boundary}\r\nContent-Disposition: form-data{disposition}\r\n\r\n".encode() + content + b"\r\n"
        for disposition, content in parts
    )
    return body + (f"--{boundary}--\r\n".encode() if end else b"")


FORM = {"Content-Type": "multipart/form-data; boundary=edge"}
FILE = '; name="file"; filename="a.png"'
GOOD = picture()
JPEG = picture(300, 200, "JPEG")
DEEP = hostile_images.encoded(Image.fromarray(np.full((20, 30), 4000, np.uint16)), "PNG")
TURNED = Image.Exif()
TURNED[0x0112] = 6
# Method, headers, body; the status, and the size in the answer or a part of the error.
UPLOADS = {
    "no content type": ("POST", {}, GOOD, 200, (30, 20)),
    "another type of image": ("POST", {"Content-Type": "IMAGE/webp; q=1"}, GOOD, 200, (30, 20)),
    "bytes": ("POST", {"Content-Type": "application/octet-stream"}, GOOD, 200, (30, 20)),
    "a form": ("POST", FORM, form((FILE, GOOD), ('; name="title"', b"a")), 200, (30, 20)),
    "16 bits": ("POST", None, DEEP, 200, (30, 20)),
    "CMYK": ("POST", None, picture(kind="JPEG", mode="CMYK"), 200, (30, 20)),
    "a palette": ("POST", None, picture(mode="P"), 200, (30, 20)),
    "turned by EXIF": ("POST", None, picture(kind="JPEG", exif=TURNED.tobytes()), 200, (20, 30)),
    "an animation": ("POST", None, hostile_images.gif_frames(5), 200, (9, 9)),
    "chunks": ("POST", None, iter([GOOD[:50], GOOD[50:]]), 200, (30, 20)),
    "text by its type": ("POST", {"Content-Type": "text/plain"}, b"hello", 415, "Content-Type must be image/..., "),
    "curl's type": ("POST", {"Content-Type": "application/x-www-form-urlencoded"}, GOOD, 415, "got 'application/x-"),
    "text": ("POST", None, b"hello", 422, "the upload: not an image: the content has none of the formats JPEG, PNG"),
    "nothing": ("POST", None, b"", 422, "the upload: not an image: the file is empty"),
    "a truncated JPEG": ("POST", None, JPEG[: len(JPEG) // 2], 422, "the upload: the image cannot be decoded"),
    "a head alone": ("POST", None, GOOD[:20], 422, "the upload: the image cannot be decoded"),
    "floats": ("POST", None, hostile_images.encoded(Image.new("F", (9, 9)), "TIFF"), 422, "floating point"),
    "too many pixels": ("POST", None, picture(1001, 1000, "JPEG", quality=1), 422, "max_pixels = 1,000,000 allows"),
    "a bomb": ("POST", None, hostile_images.HOSTILE["a PNG of 400 million pixels"][0], 422, "too large: 20000 x 20000"),
    "a profile that expands": ("POST", None, hostile_images.HOSTILE["a profile that expands"][0], 422, "decoded"),
    "too many bytes": ("POST", None, bytes(100_001), 413, "the body has more than 100,000 bytes"),
    "too many bytes in chunks": ("POST", None, iter([bytes(60_000)] * 2), 413, "the body has more than 100,000 bytes"),
    "too many bytes in a form": ("POST", FORM, form((FILE, bytes(100_000))), 413, "more than 100,000 bytes"),
    "a form without boundary": ("POST", {"Content-Type": "multipart/form-data"}, form(), 400, "No boundary"),
    "another boundary": ("POST", FORM, form((FILE, GOOD), boundary="rim"), 400, "the form cannot be read: "),
    "a form without file": ("POST", FORM, form(('; name="file"', b"a")), 400, "one complete file, got 0"),
    "an empty form": ("POST", FORM, b"", 400, "one complete file, got 0"),
    "a form without end": ("POST", FORM, form((FILE, GOOD), end=False)[:-40], 400, "one complete file, got 0"),
    "a part without name": ("POST", FORM, form(("", GOOD)), 400, "Field name not found"),
    "two files": ("POST", FORM, form((FILE, GOOD), (FILE, GOOD)), 400, "one complete file, got 2"),
    "a form of many parts": ("POST", FORM, form(*[('; name="a"', b"a")] * 900), 400, "more than 9 parts"),
    "an empty file in a form": ("POST", FORM, form((FILE, b"")), 422, "the file is empty"),
    "HEAD": ("HEAD", {}, b"", 405, None),
    "PUT": ("PUT", None, GOOD, 405, "Method Not Allowed"),
    "GET": ("GET", {}, b"", 405, "Method Not Allowed"),
}  # fmt: skip


@pytest.fixture(scope="module")
def controlled():
    with running(Controlled()) as service:
        yield service


@pytest.mark.parametrize("name", UPLOADS)
def test_an_upload_is_answered_or_refused_in_one_sentence(controlled, name):
    method, headers, body, status, said = UPLOADS[name]
    found, _, answer = ask(controlled.port, body, headers, method)
    assert found == status, answer
    if status == 200:
        assert (answer["width"], answer["height"]) == said
        assert answer["boxes"] == [[0, 0, *said]]
    elif said is not None:
        assert list(answer) == ["error"] and said in answer["error"] and "\n" not in answer["error"]
    until(lambda: metric(controlled, "detector_admitted") == 0)


def raw(port, text, *, close=False):
    """Sends bytes as they are and returns the first line of the answer."""
    with socket.create_connection(("127.0.0.1", port), timeout=300) as connection:
        connection.sendall(text)
        return connection.makefile("rb").readline().decode().strip()


@pytest.mark.parametrize(
    "head, status",
    [
        (b"POST /predict HTTP/1.1\r\nHost: a\r\nX-Long: " + b"a" * 66_000, "400"),
        (b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n", "400"),
        (b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: many\r\n\r\n", "400"),
        (b"POST /predict HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "400"),
        (b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03\r\n\r\n", "400"),
        # It is refused before the client sends the body.
        (b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: 999999\r\nExpect: 100-continue\r\n\r\n", "413"),
        (b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Type: \xff\xfe;;=\r\nContent-Length: 0\r\n\r\n", "415"),
        (b"POST /predict/../x HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n", "404"),
    ],
    ids=["long header", "negative length", "no length", "no chunk", "TLS", "expect", "odd type", "path"],
)
def test_a_malformed_request_gets_4xx(controlled, head, status):
    assert raw(controlled.port, head).split()[1] == status
    assert ask(controlled.port, GOOD)[0] == 200


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # as `main` sets it
def test_damaged_images_and_forms_never_get_5xx(controlled):
    rng, statuses = np.random.default_rng(0), set()
    originals = [GOOD, picture(kind="JPEG"), picture(kind="GIF"), picture(kind="TIFF"), picture(kind="BMP")]
    originals += [picture(kind="WEBP"), picture(kind="JPEG", progressive=True), form((FILE, GOOD))]
    connection = http.client.HTTPConnection("127.0.0.1", controlled.port, timeout=3000)
    for number in range(240):
        body = bytearray(originals[number % len(originals)])
        for place in rng.integers(0, len(body), rng.integers(1, 6)):
            body[place] = rng.integers(256)
        body = body[: rng.integers(1, len(body) + 1)] if number % 3 == 0 else body
        connection.request("POST", "/predict", bytes(body), FORM if number % len(originals) == 7 else {})
        response = connection.getresponse()
        response.read()
        statuses.add(response.status)
    connection.close()
    assert 200 in statuses and 422 in statuses and statuses <= {200, 400, 422}


def test_a_full_queue_gets_503_and_the_other_endpoints_answer_meanwhile():
    runner, results = Controlled(rows=1), []
    with running(runner, queue=2) as service:
        runner.gate.clear()
        waiting = [asked(service.port, GOOD, results) for _ in range(2)]
        until(lambda: metric(service, "detector_admitted") == 2)
        status, headers, answer = ask(service.port, GOOD)
        assert status == 503 and headers["Retry-After"] == "1" and "the queue is full (2 requests)" in answer["error"]
        # The event loop is free although the device works.
        assert load.get(service.port, "/health")[0] == load.get(service.port, "/ready")[0] == 200
        runner.gate.set()
        for thread in waiting:
            thread.join()
        assert [result[0] for result in results] == [200, 200]
        assert ask(service.port, GOOD)[0] == 200
        assert metric(service, 'detector_answers_total{status="200"}') == 3
        assert metric(service, 'detector_answers_total{status="503"}') == 1


def test_after_the_deadline_a_request_gets_503_and_is_not_detected_in():
    runner, results = Controlled(rows=1), []
    with running(runner) as service:
        runner.gate.clear()
        first = asked(service.port, picture(40, 20), results)
        until(lambda: runner.batches)
        service._deadline = 1.0
        status, headers, answer = ask(service.port, GOOD)
        assert status == 503 and headers["Retry-After"] == "1" and "within 1 seconds" in answer["error"]
        service._deadline = 300.0
        runner.gate.set()
        first.join()
        until(lambda: metric(service, "detector_admitted") == 0)
        assert results[0][0] == 200 and runner.batches == [[(20, 40)]]
        assert ask(service.port, GOOD)[0] == 200


def test_a_body_that_does_not_arrive_within_the_deadline_gets_408():
    with running(Controlled(), deadline=0.3) as service:
        head = b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: 999\r\n\r\nabc"
        assert raw(service.port, head).split()[1] == "408"
        until(lambda: metric(service, "detector_admitted") == 0)


def test_a_client_that_leaves_while_it_waits_is_left_out_and_the_others_of_its_batch_are_answered():
    runner, results = Controlled(rows=3), []
    with running(runner) as service:
        runner.gate.clear()
        first = asked(service.port, GOOD, results)
        until(lambda: runner.batches)
        head = f"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: {len(GOOD)}\r\n\r\n"
        leaving = socket.create_connection(("127.0.0.1", service.port))
        leaving.sendall(head.encode() + GOOD)
        until(lambda: metric(service, "detector_admitted") == 2)
        staying = asked(service.port, picture(31, 20), results)
        until(lambda: metric(service, "detector_admitted") == 3)
        leaving.close()
        until(lambda: 'status="499"' in load.get(service.port, "/metrics")[1].decode())
        runner.gate.set()
        first.join()
        staying.join()
        assert [result[0] for result in results] == [200, 200]
        assert runner.batches == [[(20, 30)], [(20, 31)]]
        # And one that leaves before its image has arrived.
        with socket.create_connection(("127.0.0.1", service.port)) as leaving:
            leaving.sendall(head.encode() + GOOD[:10])
            until(lambda: metric(service, "detector_admitted") == 1)
        until(lambda: metric(service, "detector_admitted") == 0)


def test_an_image_that_is_still_decoded_keeps_its_place_in_the_queue(monkeypatch):
    """Otherwise images that take long to decode would pile up, each with its bytes, behind clients that left."""
    gate, real = threading.Event(), serve.read_image
    monkeypatch.setattr(serve, "read_image", lambda *given, **options: gate.wait(300) and real(*given, **options))
    with running(Controlled(), deadline=2.0, queue=2, threads=1) as service:
        results = []
        threads = [asked(service.port, GOOD, results) for _ in range(2)]
        for thread in threads:
            thread.join()
        assert ["within 2 seconds" in answer["error"] for _, _, answer in results] == [True, True]
        assert "the queue is full (2 requests)" in ask(service.port, GOOD)[2]["error"]
        service._deadline = 300.0
        gate.set()
        until(lambda: metric(service, "detector_admitted") == 0)
        assert ask(service.port, GOOD)[0] == 200


def test_batches_have_one_canvas_are_filled_and_the_oldest_goes_first():
    runner, results = Controlled(rows=3), []
    with running(runner) as service:
        runner.gate.clear()
        threads = [asked(service.port, picture(29, 20), results)]
        until(lambda: runner.batches)
        # One tall image between wide ones.
        for number, size in enumerate([(30, 20), (20, 40), (31, 20), (32, 20), (33, 20)], start=2):
            threads.append(asked(service.port, picture(*size), results))
            until(lambda number=number: metric(service, "detector_admitted") == number)
            until(lambda number=number: len(service._batches._waiting) == number - 1)
        runner.gate.set()
        for thread in threads:
            thread.join()
        assert runner.batches[1:] == [[(20, 30), (20, 31), (20, 32)], [(40, 20)], [(20, 33)]]
        assert sorted(answer["width"] for _, _, answer in results) == [20, 29, 30, 31, 32, 33]


def test_a_batch_that_is_not_full_waits_for_others_as_long_as_it_may():
    runner, results = Controlled(rows=2), []
    with running(runner, batch_wait=1000.0) as service:
        threads = [asked(service.port, picture(width, 20), results) for width in (30, 31)]
        for thread in threads:
            thread.join()
        assert [len(batch) for batch in runner.batches] == [2]
    with running(Controlled(rows=2), batch_wait=0.3) as service:
        began = time.monotonic()
        assert ask(service.port, GOOD)[0] == 200 and time.monotonic() - began > 0.3


def test_a_batch_that_fails_gets_500_and_the_next_one_runs():
    runner = Controlled()
    with running(runner) as service:
        runner.error = RuntimeError("RESOURCE_EXHAUSTED: out of memory")
        status, _, answer = ask(service.port, GOOD)
        assert status == 500 and answer == {"error": "the detection failed; the log of the service says why"}
        runner.error = None
        assert ask(service.port, GOOD)[0] == 200


def test_it_is_ready_when_every_canvas_is_compiled():
    runner = Controlled()
    runner.compiled.clear()
    with running(runner, ready=False) as service:
        status, headers, answer = ask(service.port, GOOD)
        assert status == 503 and headers["Retry-After"] == "1" and "it compiles its programs" in answer["error"]
        assert load.get(service.port, "/ready")[0] == 503 and load.get(service.port, "/health")[0] == 200
        runner.compiled.set()
        until(lambda: load.get(service.port, "/ready")[0] == 200)
        assert ask(service.port, GOOD)[0] == 200


def test_a_compilation_that_fails_stops_the_server():
    runner = Controlled()
    runner.error = RuntimeError("no memory")
    runner.compiled.clear()
    with running(runner, ready=False) as service:
        runner.compiled.set()
        service.thread.join(300)
        assert not service.thread.is_alive() and service.failed


def test_a_runner_compiles_every_canvas_of_every_view():
    from fasterrcnn_jax.config.checks import fitted

    class Noting(ModelRunner):
        def __init__(self, config):
            self.views, self.config, self._implementation, self.seen = serve_views(config), config, None, []

        def detect(self, parts):
            (part,) = parts
            self.seen.append((part.canvas, part.arrays[0].shape, part.arrays[0].dtype.name))

    from fasterrcnn_jax.inference.augmentation import views as serve_views

    config = dataclasses.replace(tiny.MODEL, test_augment=TtaConfig(scales=(0.5,)))
    runner = Noting(config)
    runner.merged = lambda found, windows: None
    canvases = [canvas for view in runner.views for canvas in fitted(view.image.canvases, "canvases")]
    assert list(runner.warm_up()) == canvases == [(64, 96), (96, 64), *fitted(runner.views[1].image.canvases, "c")]
    assert runner.seen == [(canvas, (*canvas, 3), "float32") for canvas in canvases]


def command(folder):
    """Returns the command of a server whose batches end as soon as there is a file `open`."""
    script = f"""
        import pathlib, sys, time
        sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
        import test_serve
        class Waiting(test_serve.Controlled):
            def detect(self, parts):
                while not pathlib.Path({str(folder / "open")!r}).exists():
                    time.sleep(0.02)
                return super().detect(parts)
        test_serve.serve.load_runner = lambda path, batch_size: (Waiting(batch_size), ("thing",))
        test_serve.serve.main(["model", "--port", "0", "--batch_size", "2", "--deadline", "300"])
    """
    (folder / "waiting.py").write_text(textwrap.dedent(script))
    return [sys.executable, folder / "waiting.py"]


def test_sigterm_answers_what_is_queued_accepts_nothing_more_and_exits_with_0(tmp_path, request):
    server = load.ServerProcess(command(tmp_path))
    request.addfinalizer(server.kill)
    server.wait_until_ready()
    idle = http.client.HTTPConnection("127.0.0.1", server.port, timeout=300)
    results = []
    threads = [asked(server.port, picture(30 + number, 20), results) for number in range(6)]
    until(lambda: "detector_admitted 6.0" in load.get(server.port, "/metrics")[1].decode())
    idle.request("GET", "/health")
    idle.getresponse().read()
    server.process.terminate()

    def refused():
        try:
            socket.create_connection(("127.0.0.1", server.port)).close()
        except ConnectionRefusedError:
            return True

    until(refused)
    assert idle.sock.recv(1) == b""
    idle.close()
    time.sleep(0.5)  # what is queued may take long
    assert server.process.poll() is None and not results
    (tmp_path / "open").touch()
    for thread in threads:
        thread.join()
    assert sorted(answer["width"] for _, _, answer in results) == [30, 31, 32, 33, 34, 35]
    # A client learns that it cannot send its next request on this connection.
    assert {(status, headers["Connection"]) for status, headers, _ in results} == {(200, "close")}
    assert server.stop() == (0, 6)


def test_a_rolling_stop_loses_no_request_and_answers_none_twice(tmp_path):
    (tmp_path / "open").touch()
    commands = [command(tmp_path)] * 2
    contents = [picture(30 + number, 20) for number in range(7)]
    found = load.rolling_stop(commands, contents, requests=300, clients=6)
    assert found["lost"] == found["wrong"] == found["answered_twice"] == 0
    assert found["exit_statuses"] == [0, 0] and all(count > 20 for count in found["answered_by_each_server"])
    # It was stopped while clients sent to it.
    assert sum(found["sent_again"].values()) > 0


@pytest.mark.parametrize(
    "given, said", [(["/nowhere"], "/nowhere: no such file"), (["m", "--queue", "0"], "--queue must")]
)
def test_a_wrong_argument_is_one_sentence(given, said, capsys):
    with pytest.raises(SystemExit, match="2"):
        serve.main(given)
    assert said in capsys.readouterr().err
