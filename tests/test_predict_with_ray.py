"""The example `predict_with_ray.py`: any fsspec URL, and actors of Ray that can die.

Without Ray the tests are skipped: pip install 'fasterrcnn_jax[ray]'.
"""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image

pytest.importorskip("ray", reason="pip install 'fasterrcnn_jax[ray]'")
fsspec = pytest.importorskip("fsspec")

from fasterrcnn_jax.errors import InputError  # noqa: E402
from fasterrcnn_jax.inference.stream import ModelRunner  # noqa: E402

HERE = Path(__file__).parent
# Warnings of Ray's and pyarrow's own code.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(scope="module")
def example():
    """The example as a module that Ray's processes can import too."""
    paths = [str(HERE.parent / "examples"), str(HERE.parent), str(HERE)]
    sys.path[:0] = paths
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    import predict_with_ray

    yield predict_with_ray
    for path in paths:
        sys.path.remove(path)
    os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)


def write_images(files, root, count):
    """Writes `count` images of two sizes, one of them broken, and a file that is no image."""
    rng = np.random.default_rng(0)
    for number in range(count):
        pixels = rng.integers(0, 255, ((48, 72), (40, 70))[number % 2] + (3,), dtype=np.uint8)
        path = f"{root}/{number % 3}/{number:02d}.png"
        files.makedirs(os.path.dirname(path), exist_ok=True)
        with files.open(path, "wb") as file:
            if number == 5:
                file.write(b"no image")
            else:
                Image.fromarray(pixels).save(file, "PNG")
    with files.open(f"{root}/notes.txt", "wb") as file:
        file.write(b"no image")


@pytest.mark.parametrize("protocol", ["file", "memory"])
def test_images_of_any_url_are_listed_and_read(example, tmp_path, protocol):
    files, root = fsspec.filesystem(protocol), str(tmp_path) if protocol == "file" else "/photos"
    write_images(files, root, 7)
    urls = example.list_images(f"{protocol}://{root}")
    assert [url.rpartition("/")[2] for url in urls] == [
        "00.png",
        "03.png",
        "06.png",
        "01.png",
        "04.png",
        "02.png",
        "05.png",
    ]
    assert all(url.startswith(f"{protocol}://") for url in urls)
    if protocol == "file":
        assert example.list_images(str(tmp_path)) == urls
        np.testing.assert_array_equal(example.read_pixels(urls[0]), np.asarray(Image.open(tmp_path / "0/00.png")))
    assert example.read_pixels(urls[3]).shape == (40, 70, 3)
    with pytest.raises(InputError, match="05.png: not an image"):
        example.read_pixels(urls[6])


def test_a_line_holds_the_detections_of_an_image_or_its_error(example, random_weights, tmp_path):
    write_images(fsspec.filesystem("file"), str(tmp_path), 6)
    model = tiny.quick_model(random_weights)[0]
    urls = example.list_images(str(tmp_path))
    with tiny.quick_compilation():
        lines = list(example.lines_of(urls, ModelRunner(model, batch_size=2), model.class_names))
    assert [line["image"] for line in lines] == urls
    for line in lines:
        broken = line["image"].endswith("05.png")
        assert (line["error"] is not None) == broken and (len(line["boxes"]) == 0) == broken
        assert {len(line[name]) for name in ("boxes", "scores", "labels", "class_names")} == {len(line["boxes"])}


@pytest.mark.parametrize("protocol", ["file", "memory"])
def test_a_folder_that_holds_anything_is_no_place_for_results(example, tmp_path, protocol, capsys, monkeypatch):
    """Neither the images nor the folder above them is emptied or mixed with results."""
    files, root = fsspec.filesystem(protocol), str(tmp_path / "top") if protocol == "file" else "/top"
    write_images(files, f"{root}/photos", 3)
    files.makedirs(f"{root}/nothing")
    before = files.find(root)
    for out in (f"{root}/photos", root, f"{root}/photos/notes.txt"):
        with pytest.raises(SystemExit):
            example.main(["run", f"{protocol}://{root}/photos", f"{protocol}://{out}"])
        assert f"{protocol}://{out}: is not empty; choose another folder" in capsys.readouterr().err
    assert files.find(root) == before
    for out in ("nothing", "absent"):
        assert example.is_empty(f"{protocol}://{root}/{out}")

    class Written:
        def write_json(self, path, *, filesystem, mode):
            assert mode == example.ray.data.SaveMode.APPEND  # OVERWRITE deletes

    monkeypatch.setattr(example, "detections", lambda *given, **options: Written())
    example.main(["run", f"{protocol}://{root}/photos", f"{protocol}://{root}/absent"])


def test_a_missing_file_is_an_error_of_its_image_and_a_broken_connection_is_tried_again(example, tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"gone\.png: no such image file"):
        example.read_pixels(f"file://{tmp_path}/gone.png")

    write_images(fsspec.filesystem("file"), str(tmp_path), 1)
    url, whole, attempts, pauses = f"file://{tmp_path}/0/00.png", (tmp_path / "0/00.png").read_bytes(), [], []

    def break_off(files, path):
        attempts.append(path)
        if len(attempts) < good:
            raise ConnectionError("reset by peer")
        return whole

    monkeypatch.setattr(fsspec.implementations.local.LocalFileSystem, "cat_file", break_off)
    monkeypatch.setattr(example.time, "sleep", pauses.append)
    good = 3
    assert example.read_pixels(url).shape == (48, 72, 3) and pauses == [1, 2]
    good = 100
    attempts.clear()
    with pytest.raises(InputError, match=r"00\.png: the image cannot be read in 5 attempts: reset by peer"):
        example.read_pixels(url)
    assert len(attempts) == 5 and pauses == [1, 2, 1, 2, 4, 8]


ACTOR = """
import os, signal
import tiny
from predict_with_ray import Detecting

class Dying(Detecting):
    '''The first actor that gets image 20 kills itself with its work half done.'''

    def __init__(self, run, batch_size):
        super().__init__(run, batch_size, load=lambda path: tiny.quick_model()[0])
        self._marks = run

    def __call__(self, table):
        found = super().__call__(table)
        with open(f"{self._marks}/{os.getpid()}", "a") as file:
            file.write("\\n".join(table["url"].to_pylist()) + "\\n")
        if any(url.endswith("/20.png") for url in table["url"].to_pylist()):
            try:
                os.close(os.open(f"{self._marks}/killed", os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                pass
            else:
                os.kill(os.getpid(), signal.SIGKILL)
        return found
"""


@pytest.mark.slow
def test_two_workers_do_each_image_once_and_a_killed_one_loses_nothing(example, tmp_path, monkeypatch):
    """Against one process, to the bit; one of two workers gets kill -9 after it has detected and before it answers."""
    import ray

    for name in ("images", "marks", "modules"):
        (tmp_path / name).mkdir()
    (tmp_path / "modules" / "dying.py").write_text(ACTOR)
    monkeypatch.syspath_prepend(tmp_path / "modules")
    paths = os.environ["PYTHONPATH"] + os.pathsep + str(tmp_path / "modules")
    for name, value in {
        "PYTHONPATH": paths,
        "RAY_USAGE_STATS_ENABLED": "0",
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": os.environ["FASTERRCNN_TEST_CACHE"],
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }.items():
        monkeypatch.setenv(name, value)
    write_images(fsspec.filesystem("file"), str(tmp_path / "images"), 40)
    urls = example.list_images(f"file://{tmp_path / 'images'}")
    from dying import Dying

    model = tiny.quick_model()[0]
    with tiny.quick_compilation():
        alone = {
            line["image"]: line for line in example.lines_of(urls, ModelRunner(model, batch_size=1), model.class_names)
        }
    # Two for the actors, and others for reading and writing: Ray counts them, and runs them on whatever there is.
    ray.init(num_cpus=4, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False)
    try:
        found = example.detections(str(tmp_path / "marks"), urls, actors=2, actor=Dying)
        found.write_json(str(tmp_path / "found"))
    finally:
        ray.shutdown()
    lines = [json.loads(line) for path in (tmp_path / "found").iterdir() for line in path.read_text().splitlines()]
    assert sorted(line["image"] for line in lines) == sorted(urls) and len(urls) == 40
    for line in lines:
        expected = alone[line["image"]]
        for name, type_ in (("boxes", np.float32), ("scores", np.float32), ("labels", np.int32)):
            np.testing.assert_array_equal(np.array(line[name], type_), np.array(expected[name], type_))
        assert line.get("error") == expected["error"] and line["class_names"] == expected["class_names"]
    assert (tmp_path / "marks/killed").exists()
    workers = [path for path in (tmp_path / "marks").iterdir() if path.name != "killed"]
    assert len(workers) >= 2
    # The work of the killed one was done again.
    assert sum(path.read_text().count("/20.png") for path in workers) == 2
