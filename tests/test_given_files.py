"""The images and videos that a user gives to `predict`: files, folders, trees, patterns and a list."""

import io
import sys
from pathlib import Path

import pytest
import tiny
from PIL import Image

from fasterrcnn_jax.data.given_files import list_given
from fasterrcnn_jax.errors import InputError


@pytest.fixture
def images(tmp_path):
    """Writes a folder with the images b.png and A.JPG."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("b.png", "A.JPG"):
        Image.fromarray(tiny.rectangle_image((30, 50), (10, 5, 20, 15))).save(folder / name)
    return folder


def ids(given, **options):
    return [file.id for file in list_given(given, **options)[0]]


def with_days(images):
    for folder in ("day 1", "day 2"):
        (images / folder).mkdir()
        Image.new("RGB", (40, 30)).save(images / folder / "b.png")


def test_a_folder_is_in_the_order_of_its_names_and_other_files_are_ignored_with_a_note(images):
    (images / "notes.txt").write_text("no image")
    (images / "more.jpg").mkdir()
    (images / "._b.png").write_bytes(b"what macOS stores beside b.png")
    files, (note,) = list_given([images])
    assert [(file.id, file.path) for file in files] == [("A.JPG", images / "A.JPG"), ("b.png", images / "b.png")]
    assert note == (
        "Hidden files, subfolders and files without an image extension were ignored: 3, the first in "
        f"{images / '._b.png'}."
    )


def test_files_and_folders_are_in_their_order_and_each_image_once(images):
    given = [images / "b.png", images, images / ".." / images.name / "A.JPG"]
    assert ids(given) == ["b.png", "A.JPG"]


def test_images_of_one_name_have_ids_with_their_folders(images, monkeypatch):
    with_days(images)
    monkeypatch.chdir(images / "day 1")
    given = [Path("b.png"), Path("../day 2"), Path("../A.JPG")]
    assert ids(given) == ["day 1/b.png", "day 2/b.png", "A.JPG"]


def test_a_given_file_is_an_image_whatever_its_name(images):
    (images / "b.png").rename(images / ".hidden")
    assert ids([images / ".hidden"]) == [".hidden"]


def test_a_folder_without_images_is_refused(images):
    for path in images.iterdir():
        path.unlink()
    for folder, said in ((images, "contains no readable image"), (images / "absent", "no such file or folder")):
        with pytest.raises(InputError, match=said) as caught:
            list_given([folder])
        assert str(folder) in str(caught.value)


def test_a_tree_is_read_where_it_is_asked_for(images):
    with_days(images)
    (images / ".cache").mkdir()
    Image.new("RGB", (40, 30)).save(images / ".cache" / "c.png")
    assert ids([images]) == ["A.JPG", "b.png"]
    assert ids([images], recursive=True) == ["A.JPG", "b.png", "day 1/b.png", "day 2/b.png"]


def test_a_pattern_gives_the_images_and_videos_that_fit(images):
    with_days(images)
    (images / "day 1" / "clip.mp4").write_bytes(b"")
    (images / "day 1" / "notes.txt").write_text("no image")
    assert ids([images / "day *" / "*"]) == ["day 1/b.png", "clip.mp4", "day 2/b.png"]
    assert ids([images / "**" / "*.JPG"]) == ["A.JPG"]
    with pytest.raises(InputError, match=r"\*\.tif: no image or video fits this pattern"):
        list_given([images / "*.tif"])
    # A file whose name looks like a pattern is that file.
    (images / "A.JPG").rename(images / "a[1].jpg")
    assert ids([images / "a[1].jpg"]) == ["a[1].jpg"]


def test_a_list_on_standard_input_may_name_files_that_do_not_exist(images, monkeypatch):
    lines = f"{images / 'b.png'}\n\n{images / 'gone.png'}\r\n{images / 'A.JPG'}"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    assert ids([Path("-")]) == ["b.png", "gone.png", "A.JPG"]


def test_names_on_standard_input_may_end_with_null_bytes(images, monkeypatch):
    (images / "b.png").rename(images / "b\n2.png")
    names = [images / "b\n2.png", images / "A.JPG"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{name}\0" for name in names)))
    assert ids([Path("-")]) == ["b\n2.png", "A.JPG"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    with pytest.raises(InputError, match="^standard input: no file is listed"):
        list_given([Path("-")])


def test_results_are_no_input(images):
    """Folders that `predict` wrote in a tree, and the folders that it is going to write images into."""
    earlier, out = images / "found", images / "now"
    for folder in (earlier / "images", out / "images", images / "photos"):
        folder.mkdir(parents=True)
        Image.new("RGB", (40, 30)).save(folder / "c.png")
    for name in ("job.json", "detections.jsonl"):
        (earlier / name).touch()
    assert ids([images], recursive=True, written=[out / "images"]) == ["A.JPG", "b.png", "c.png"]
    files, notes = list_given([images / "*" / "images" / "*"], written=[out / "images"])
    assert [file.path for file in files] == [earlier / "images/c.png"]
    assert any("hold drawn images and crops were ignored: 1, the first in" in note for note in notes)
    with pytest.raises(InputError, match="--out writes images into this folder"):
        list_given([out / "images"], written=[out / "images"])
