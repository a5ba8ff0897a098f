"""One list of images is divided by seed; near copies of an image stay together, and rare classes are on both sides."""

import numpy as np
import pytest
import tiny

from fasterrcnn_jax.data.division import ChangedImages, TooFewImages, divide, division_text, part, read_division
from fasterrcnn_jax.errors import InputError

NAMES = ("ring", "disc", "rare")


def images(count, *, rare=(), copies=()):
    """Returns `count` images of noise; `copies` are (index, index of the image whose pixels it has)."""
    made = []
    for index in range(count):
        rng = np.random.default_rng(index)
        pixels = np.kron(rng.integers(0, 255, (4, 5, 3)), np.ones((8, 8, 1))).astype(np.uint8)
        made.append((pixels, [[4, 4, 20, 20]], [3 if index in rare else 1 + index % 2]))
    for index, original in copies:
        made[index] = (made[original][0], *made[index][1:])
    return made


def dataset(folder, *arguments, **options):
    return tiny.dataset(folder / "images", images(*arguments, **options), class_names=NAMES)


def test_one_fraction_leaves_the_rest_for_validation(tmp_path):
    parts = divide(dataset(tmp_path, 20), (0.8,), seed=0)
    assert {name: len(ids) for name, ids in parts.items()} == {"train": 16, "val": 4}
    assert sorted(parts["train"] + parts["val"]) == [f"{index:03d}" for index in range(20)]


def test_three_fractions_make_a_test_part(tmp_path):
    parts = divide(dataset(tmp_path, 20), (0.6, 0.2, 0.2), seed=0)
    # Whole objects of each class are dealt, so a part can be off by one image.
    assert list(parts) == ["train", "val", "test"]
    assert all(abs(len(parts[name]) - n) <= 1 for name, n in (("train", 12), ("val", 4), ("test", 4)))


def test_fractions_below_one_leave_images_out(tmp_path):
    parts = divide(dataset(tmp_path, 20), (0.5, 0.2), seed=0)
    assert 9 <= len(parts["train"]) <= 11 and 3 <= len(parts["val"]) <= 5


def test_the_seed_decides(tmp_path):
    data = dataset(tmp_path, 20)
    assert divide(data, (0.8,), seed=1) == divide(data, (0.8,), seed=1) != divide(data, (0.8,), seed=2)


def test_near_copies_of_an_image_are_on_one_side(tmp_path):
    data = dataset(tmp_path, 12, copies=[(3, 2), (9, 2), (11, 10)])
    for seed in range(5):
        parts = divide(data, (0.6,), seed=seed)
        side = {image_id: name for name, ids in parts.items() for image_id in ids}
        assert side["002"] == side["003"] == side["009"] and side["010"] == side["011"]


def test_shifted_views_of_a_scene_are_on_one_side(tmp_path):
    rng = np.random.default_rng(0)
    scene = np.kron(rng.integers(0, 255, (20, 24, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    views = [scene[shift : shift + 128, shift : shift + 160] for shift in (0, 6, 12, 18)]
    made = images(12) + [(np.ascontiguousarray(view), [[4, 4, 20, 20]], [1]) for view in views]
    data = tiny.dataset(tmp_path / "images", made, class_names=NAMES)
    for seed in range(3):
        parts = divide(data, (0.5,), seed=seed)
        side = {image_id: name for name, ids in parts.items() for image_id in ids}
        assert len({side[f"{index:03d}"] for index in range(12, 16)}) == 1


def test_a_rare_class_is_in_both_parts(tmp_path):
    data = dataset(tmp_path, 24, rare=(5, 17))
    for seed in range(3):
        parts = divide(data, (0.5,), seed=seed)
        assert {"005", "017"} & set(parts["train"]) and {"005", "017"} & set(parts["val"])


@pytest.mark.parametrize("count, fractions", [(2, (0.8,)), (3, (0.9,)), (3, (0.8, 0.1, 0.1)), (5, (0.5, 0.01))])
def test_every_part_of_few_images_has_one(tmp_path, count, fractions):
    for seed in range(3):
        parts = divide(dataset(tmp_path, count), fractions, seed=seed)
        assert all(parts.values()) and max(parts.values(), key=len) == parts["train"]


def test_fewer_groups_than_parts_cannot_be_divided(tmp_path):
    with pytest.raises(TooFewImages, match="the 2 images form 1 groups; --data.split 1.0 trains on all images"):
        divide(dataset(tmp_path, 2, copies=[(1, 0)]), (0.8,), seed=0)


def test_a_division_survives_its_file(tmp_path):
    data, path = dataset(tmp_path, 10), tmp_path / "splits.json"
    first = divide(data, (0.7,), seed=0)
    path.write_text(division_text(first))
    assert read_division(path, data, accept_changed=False) == first
    assert [record.id for record in part(data, first, "val").records] == sorted(first["val"])


@pytest.mark.parametrize("text", ["", "[]", "{", '{"train": "000"}', '{"other": []}', '{"train": [1]}', "[" * 10_000])
def test_a_damaged_division_is_refused(tmp_path, text):
    path = tmp_path / "splits.json"
    path.write_text(text)
    with pytest.raises(InputError, match="splits.json: the division of the images cannot be read"):
        read_division(path, dataset(tmp_path, 3), accept_changed=False)


def test_images_that_are_new_or_gone_are_refused_unless_accepted(tmp_path, caplog):
    path, data = tmp_path / "splits.json", dataset(tmp_path, 3)
    path.write_text('{"train": ["000", "gone"], "val": ["001"]}')
    with pytest.raises(ChangedImages, match="1 images are new and 1 are gone, for example '002'"):
        read_division(path, data, accept_changed=False)
    assert read_division(path, data, accept_changed=True) == {"train": ("000",), "val": ("001",)}
    assert "1 images are new and 1 are gone" in caplog.text
