"""Detection on many machines with Ray Data: an actor with its own copy of the model per device.

python examples/predict_with_ray.py runs/shapes s3://bucket/photos s3://bucket/found --actors 8 --gpus 1

The folders may be local, shared, or any URL that fsspec knows (file://, s3://, gs://, hf://). Ray writes JSON lines
into the second one, one line per image: image, width, height, boxes (x1, y1, x2, y2 in pixels), scores, labels,
class_names. The second folder must be empty or absent. An image that cannot be read has a line with "error" and no
detection; a broken connection is tried again four times, over 15 seconds. Work of an actor that dies is given to
another. Each actor takes one CPU of Ray's count; reading and writing need some beside them.

pip install 'fasterrcnn_jax[ray]'
"""

import argparse
import posixpath
import time

import fsspec
import pyarrow as pa
import ray.data  # pyright: ignore[reportMissingImports]

import fasterrcnn_jax
from fasterrcnn_jax.data.images import read_image
from fasterrcnn_jax.data.layouts import IMAGE_EXTENSIONS
from fasterrcnn_jax.data.records import StoredImage
from fasterrcnn_jax.errors import InputError
from fasterrcnn_jax.inference.stream import Found, ModelRunner, detect_stream

SCHEMA = pa.schema(
    [
        ("image", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("boxes", pa.list_(pa.list_(pa.float32()))),
        ("scores", pa.list_(pa.float32())),
        ("labels", pa.list_(pa.int32())),
        ("class_names", pa.list_(pa.string())),
        ("error", pa.string()),
    ]
)


# Seconds to wait before each further attempt to read an image.
PAUSES = (1, 2, 4, 8)


def list_images(url):
    """Returns the URLs of all images in a folder and in the folders below it, sorted."""
    files, root = fsspec.core.url_to_fs(url)
    names = sorted(name for name in files.find(root) if posixpath.splitext(name)[1].lower() in IMAGE_EXTENSIONS)
    return [files.unstrip_protocol(name) for name in names]


def read_pixels(url):
    """Returns the pixels [height, width, 3] of an image, turned as its EXIF data says.

    Raises:
      InputError: the file is missing, may not be read, or is no image, or the connection broke in every attempt.
    """
    content = read_bytes(url)
    return read_image(StoredImage(url, lambda: content), upright=True)


def read_bytes(url):
    files, path = fsspec.core.url_to_fs(url)
    failed = 0
    while True:
        try:
            return files.cat_file(path)
        # Another attempt would end in the same way.
        except FileNotFoundError:
            raise InputError(f"{url}: no such image file") from None
        except (PermissionError, IsADirectoryError) as error:
            raise InputError(f"{url}: the image cannot be read: {error.strerror or error}") from None
        # Not OSError alone: the library of a file system may have errors of its own.
        except Exception as error:
            if failed == len(PAUSES):
                raise InputError(f"{url}: the image cannot be read in {failed + 1} attempts: {error}") from error
        time.sleep(PAUSES[failed])
        failed += 1


class Detecting:
    """An actor: detects in tables of URLs. It loads the model once."""

    def __init__(self, run, batch_size, load=fasterrcnn_jax.load):
        model = load(run)
        self._class_names = model.class_names
        self._runner = ModelRunner(model, batch_size=batch_size)

    def __call__(self, table):
        rows = lines_of(table["url"].to_pylist(), self._runner, self._class_names)
        return pa.Table.from_pylist(list(rows), schema=SCHEMA)


def lines_of(urls, runner, class_names):
    """Yields the line of each image, in the order of the images."""
    for one in detect_stream(urls, read_pixels, runner):
        if isinstance(one, Found):
            height, width = one.image_hw
            boxes, scores, labels = (values.tolist() for values in one.detections)
            names = [class_names[label - 1] for label in labels]
            found = {"width": width, "height": height, "boxes": boxes, "scores": scores, "labels": labels}
            yield {"image": one.item, **found, "class_names": names, "error": None}
        else:
            nothing = {name: [] for name in ("boxes", "scores", "labels", "class_names")}
            yield {"image": one.item, "width": 0, "height": 0, **nothing, "error": str(one.error)}


def detections(run, urls, *, actors, batch_size=1, gpus=0, actor=Detecting):
    """Returns a Ray data set with the line of each image.

    Args:
      actors: number of actors; give each GPU one.
      batch_size: number of images that an actor detects in at once.
      gpus: GPUs per actor.
      actor: class of the actors.
    """
    # Small blocks: an actor that dies loses the work of one block.
    blocks = max(1, min(len(urls), max(2 * actors, len(urls) // 64)))
    return ray.data.from_items([{"url": url} for url in urls], override_num_blocks=blocks).map_batches(
        actor,
        fn_constructor_args=(run, batch_size),
        batch_format="pyarrow",
        batch_size=None,
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_gpus=gpus,
    )


def is_empty(url):
    """Returns whether a URL is an empty folder, or nothing is there."""
    files, path = fsspec.core.url_to_fs(url)
    try:
        content = files.ls(path, detail=False)
    except FileNotFoundError:
        return True
    # Object stores may list a mark of the folder itself.
    return not files.isfile(path) and not any(name.rstrip("/") != path.rstrip("/") for name in content)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run folder or weights file, at the same place on every machine")
    parser.add_argument("images", help="folder or URL of the images")
    parser.add_argument("out", help="folder or URL for the JSON lines; must be empty or absent")
    parser.add_argument("--actors", type=int, default=1)
    parser.add_argument("--gpus", type=float, default=0, help="GPUs per actor")
    parser.add_argument("--batch_size", type=int, default=1)
    arguments = parser.parse_args(argv)
    if not is_empty(arguments.out):
        parser.error(f"{arguments.out}: is not empty; choose another folder for the results")
    urls = list_images(arguments.images)
    if not urls:
        parser.error(f"{arguments.images}: contains no image")
    options = dict(actors=arguments.actors, gpus=arguments.gpus, batch_size=arguments.batch_size)
    found = detections(arguments.run, urls, **options)
    files, path = fsspec.core.url_to_fs(arguments.out)
    # A part that is written twice, after a failure, has the same name. SaveMode.OVERWRITE would first delete everything
    # in the folder.
    found.write_json(path, filesystem=files, mode=ray.data.SaveMode.APPEND)
    print(f"{len(urls)} images, results in {arguments.out}")


if __name__ == "__main__":
    main()
