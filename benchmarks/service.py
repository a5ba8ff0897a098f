"""Loads examples/serve.py on loopback: latency, throughput, and a rolling stop that loses no request.

    python benchmarks/service.py MODEL IMAGES [--requests 96] [--clients 1 2 4 8 16] [--batch_sizes 1 4] [--out FILE]

MODEL is a run folder or a weights file; IMAGES is a folder. First, `fasterrcnn_jax.predict` in a loop
and the service under each number of clients take turns, over the same image files. A client is a thread with one
connection that sends its next image when it has the answer to the last one. The loop reads each file from the disk, and
the clients hold the bytes. Then two servers run, the clients send to both, and one gets SIGTERM. A client whose
connection is refused or closed sends the same image to the other server; a server that answers 503 is asked again.
Every request must get one answer 200, with the detections of its own image, and the servers may not have answered more
often than that. The exit status is 1 if this does not hold.
"""

import argparse
import contextlib
import http.client
import itertools
import json
import re
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

SERVE = Path(__file__).parents[1] / "examples" / "serve.py"


class ServerProcess:
    """A process of a server, from its start until it listens; its log is read all the time."""

    def __init__(self, command):
        self.process = subprocess.Popen([str(part) for part in command], stderr=subprocess.PIPE, text=True)
        self.log, self.port, self._listens = [], None, threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if not self._listens.wait(300) or self.port is None:
            self.process.kill()
            raise RuntimeError("the server did not start:\n" + "".join(self.log))

    def _read(self):
        for line in self.process.stderr:
            self.log.append(line)
            if found := re.search(r"running on http://[^:]+:(\d+)", line):
                self.port = int(found[1])
                self._listens.set()
        self._listens.set()

    def wait_until_ready(self, seconds=600):
        until = time.monotonic() + seconds
        while get(self.port, "/ready")[0] != 200:
            if time.monotonic() > until or self.process.poll() is not None:
                raise RuntimeError("the server did not become ready:\n" + "".join(self.log))
            time.sleep(0.1)

    def resident_megabytes(self):
        text = get(self.port, "/metrics")[1].decode()
        return float(re.search(r"^process_resident_memory_bytes (\S+)$", text, re.MULTILINE)[1]) / 1e6

    def kill(self):
        """Ends the process, if it runs."""
        self.process.kill()
        self.process.wait(60)

    def stop(self):
        """Returns the exit status after SIGTERM, and the number of images that were answered."""
        self.process.terminate()
        status = self.process.wait(120)
        self._reader.join(10)
        self.process.stderr.close()
        return status, sum(int(count) for count in re.findall(r"images answered: (\d+)", "".join(self.log)))


def get(port, path):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


class Client:
    """A client with one connection to each server, which stays open from request to request."""

    def __init__(self, ports):
        self._ports, self._connections = itertools.cycle(ports), {}
        self.again = Counter()  # reasons for which a request was sent again

    def close(self):
        for connection in self._connections.values():
            connection.close()

    def post(self, content, seconds=300):
        """Returns the status and the answer to an image; tries the servers in turn until one of them answers."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            port = next(self._ports)
            connection = self._connections.setdefault(port, http.client.HTTPConnection("127.0.0.1", port, timeout=120))
            try:
                connection.request("POST", "/predict", content, {"Content-Type": "image/jpeg"})
                response = connection.getresponse()
                answer = json.loads(response.read())
            except (OSError, http.client.HTTPException) as error:
                # Nothing came back: the server had not answered.
                connection.close()
                self.again[type(error).__name__] += 1
                time.sleep(0.01)
                continue
            if response.status != 503:
                return response.status, answer
            self.again["503"] += 1
            time.sleep(0.05)
        raise TimeoutError(f"no server has answered within {seconds} seconds")


def under_load(ports, contents, requests, clients, *, during=lambda sent: None):
    """Sends `requests` images from `clients` threads; returns the answers of each request, seconds, and repetitions.

    Args:
      during: called with the number of each request before it is sent.
    """
    numbers, lock = iter(range(requests)), threading.Lock()
    answers, seconds, again = [[] for _ in range(requests)], [], Counter()

    def work():
        client = Client(ports)
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                break
            during(number)
            began = time.perf_counter()
            answers[number].append(client.post(contents[number % len(contents)]))
            seconds.append(time.perf_counter() - began)
        client.close()
        with lock:
            again.update(client.again)

    threads = [threading.Thread(target=work) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers, seconds, again


def rolling_stop(commands, contents, *, requests, clients):
    """Returns what happens to requests while the first of two servers stops; `lost` and `wrong` must be 0."""
    with contextlib.ExitStack() as running:
        servers = []
        for command in commands:
            servers.append(ServerProcess(command))
            running.callback(servers[-1].kill)
        for server in servers:
            server.wait_until_ready()
        return _rolling_stop(servers, contents, requests, clients)


def _rolling_stop(servers, contents, requests, clients):
    client = Client([servers[1].port])
    expected = [client.post(content)[1] for content in contents]
    client.close()
    stopped = []
    stopping = threading.Thread(target=lambda: stopped.append(servers[0].stop()))

    def stop_in_the_middle(number):
        if number == requests // 3:
            stopping.start()

    ports = [server.port for server in servers]
    answers, _, again = under_load(ports, contents, requests, clients, during=stop_in_the_middle)
    stopping.join()
    stopped.append(servers[1].stop())
    good = [len(of) == 1 and of[0] == (200, expected[number % len(contents)]) for number, of in enumerate(answers)]
    return {
        "requests": requests,
        "clients": clients,
        "lost": sum(not of for of in answers),
        "wrong": requests - sum(good),
        "answered_by_each_server": [answered for _, answered in stopped],
        "answered_twice": sum(answered for _, answered in stopped) - requests - len(contents),
        "exit_statuses": [status for status, _ in stopped],
        "sent_again": dict(again),
    }


def percentile(values, share):
    return sorted(values)[min(len(values) - 1, round(share * (len(values) - 1)))]


def row(name, seconds, took):
    return {
        "side": name,
        "p50_ms": 1e3 * statistics.median(seconds),
        "p99_ms": 1e3 * percentile(seconds, 0.99),
        "longest_ms": 1e3 * max(seconds),
        "images_per_second": len(seconds) / took,
    }


def loop(model, paths, requests):
    """Times `predict` in a loop, one image at a time."""
    import fasterrcnn_jax

    seconds, began = [], time.perf_counter()
    for number in range(requests):
        start = time.perf_counter()
        fasterrcnn_jax.predict(model, paths[number % len(paths)])
        seconds.append(time.perf_counter() - start)
    return row("predict in a loop", seconds, time.perf_counter() - began)


def loads(model, servers, paths, contents, arguments):
    """Returns the rows of the loop and of each load, and the memory of each server before and after them."""
    for server in servers.values():
        server.wait_until_ready()
    rows, memory = [], {batch_size: [server.resident_megabytes()] for batch_size, server in servers.items()}
    for _ in range(arguments.rounds):
        rows.append(loop(model, paths, arguments.requests))
        for clients in arguments.clients:
            for batch_size, server in servers.items():
                began = time.perf_counter()
                answers, seconds, again = under_load([server.port], contents, arguments.requests, clients)
                others = [of for of in answers if len(of) != 1 or of[0][0] != 200]
                if others:
                    raise RuntimeError(f"{len(others)} requests without an answer 200, the first of them: {others[0]}")
                name = f"service, batch size {batch_size}, {clients} clients"
                rows.append(row(name, seconds, time.perf_counter() - began) | {"sent_again": dict(again)})
                memory[batch_size].append(server.resident_megabytes())
                print(rows[-1], flush=True)
    return rows, memory


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("images", type=Path)
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(argv)
    paths = sorted(path for path in arguments.images.iterdir() if path.is_file())[:32]
    contents = [path.read_bytes() for path in paths]

    def command(batch_size):
        return [sys.executable, SERVE, arguments.model, "--port", 0, "--batch_size", batch_size, "--deadline", 120]

    import fasterrcnn_jax

    model = fasterrcnn_jax.load(arguments.model)
    loop(model, paths, len(paths))  # compiles
    with contextlib.ExitStack() as running:
        servers = {}
        for batch_size in arguments.batch_sizes:
            servers[batch_size] = ServerProcess(command(batch_size))
            running.callback(servers[batch_size].kill)
        rows, memory = loads(model, servers, paths, contents, arguments)
        for server in servers.values():
            server.stop()
    rolling = rolling_stop([command(1), command(1)], contents, requests=arguments.requests, clients=8)
    print("| side | p50 ms | p99 ms | images/s |\n|---|---|---|---|")
    for one in rows:
        print(f"| {one['side']} | {one['p50_ms']:.0f} | {one['p99_ms']:.0f} | {one['images_per_second']:.1f} |")
    print(f"resident megabytes of the servers, before and after each load: {memory}")
    print(f"rolling stop: {rolling}")
    if arguments.out is not None:
        arguments.out.write_text(json.dumps({"rows": rows, "memory": memory, "rolling": rolling}, indent=1) + "\n")
    sys.exit(bool(rolling["lost"] or rolling["wrong"] or rolling["answered_twice"] or any(rolling["exit_statuses"])))


if __name__ == "__main__":
    main()
