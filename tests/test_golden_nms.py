"""Non-maximum suppression keeps the same indices as the reference implementations.

tests/golden/README.md describes the arrays and their origin. A digit T in a name is a threshold of T tenths.
"""

import functools
import itertools
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest
from fidelity import compare, continuous
from oracles import iou_matrix

from fasterrcnn_jax.ops.suppression import nms

GOLDEN = np.load(Path(__file__).parent / "golden" / "nms.npz")
DIGITS = (3, 5, 7)
SIZES = (512, 2048, 12288)  # cases are padded to these, so that few programs are compiled

jitted_nms = functools.partial(jax.jit, static_argnames=("iou_threshold", "max_output"))(nms)


def kept(boxes, scores, threshold, *, groups=None) -> list[int]:
    """Returns the kept indices by descending score; invalid copies of the first box follow the boxes as padding."""
    count = len(boxes)
    size = next(size for size in SIZES if size >= count)
    source = np.minimum(np.arange(size), max(count - 1, 0))
    if not count:
        boxes, scores = np.zeros((1, 4), np.float32), np.zeros(1, np.float32)
    groups = np.zeros(len(boxes), np.int32) if groups is None else groups.astype(np.int32)
    indices, valid = jitted_nms(
        boxes[source],
        scores[source],
        np.arange(size) < count,
        iou_threshold=threshold,
        max_output=min(size, 6400),
        groups=groups[source],
    )
    return np.asarray(indices)[np.asarray(valid)].tolist()


@functools.cache
def case(name):
    """Returns (boxes, scores); the 12000 boxes are drawn again as tests/golden/README.md describes."""
    if name != "n12000":
        return GOLDEN[f"{name}_boxes"], GOLDEN[f"{name}_scores"]
    n, generator = 12000, np.random.default_rng(int(GOLDEN["n12000_seed"]))
    clusters = n // 12
    x, y = generator.uniform(0, 1000, clusters), generator.uniform(0, 600, clusters)
    w, h = (np.exp(generator.uniform(np.log(16), np.log(300), clusters)) for _ in range(2))
    cluster, jitter = generator.integers(0, clusters, n), generator.normal(0, 0.12, (n, 4))
    x, y, w, h = (values[cluster] for values in (x, y, w, h))
    xs = np.sort([x - w / 2 + jitter[:, 0] * w, x + w / 2 + jitter[:, 2] * w], axis=0)
    ys = np.sort([y - h / 2 + jitter[:, 1] * h, y + h / 2 + jitter[:, 3] * h], axis=0)
    boxes = np.stack([xs[0], ys[0], xs[1], ys[1]], axis=1).astype(np.float32)
    scores = (generator.permutation(n).astype(np.float32) + 1) / np.float32(n)
    checksums = [zlib.crc32(values.tobytes()) for values in (boxes, scores)]
    assert checksums == GOLDEN["n12000_crc32"].tolist()
    return boxes, scores


@pytest.mark.parametrize(
    "name, digit",
    [
        *itertools.product(["n1", "n40", "n40tie", "n200alleq", "n300", "edge", "n2000", "n12000"], DIGITS),
        ("ident", 5),
        ("ident", 1),
    ],
)
def test_torchvisions_kept_indices(name, digit):
    threshold = 1.0 if (name, digit) == ("ident", 1) else digit / 10
    ours, theirs = kept(*case(name), threshold), GOLDEN[f"{name}_tv_keep_{digit}"]
    compare("NMS", "torchvision", f"{name} at {threshold:g}", ours, theirs)


def test_no_boxes_keep_nothing():
    nothing = np.zeros((0, 4), np.float32)
    assert kept(nothing, nothing[:, 0], 0.5) == []


@pytest.mark.parametrize("name", ["bat_tv_keep_5", "bat_tv_vanilla_5"])
def test_torchvisions_kept_indices_by_class(name):
    """torchvision offsets the classes or runs once per class; both give our result."""
    ours = kept(GOLDEN["bat_boxes"], GOLDEN["bat_scores"], 0.5, groups=GOLDEN["bat_idxs"])
    compare("NMS", "torchvision", name, ours, GOLDEN[name])


@pytest.mark.parametrize(
    "name, digit",
    [*itertools.product(["n1", "n40", "n300", "n2000", "n12000"], DIGITS), ("ident", 5)],
)
def test_py_faster_rcnns_kept_indices(name, digit):
    boxes, scores = case(name)
    ours = kept(continuous(boxes), scores, digit / 10)
    compare("NMS", "py-faster-rcnn", f"{name} at 0.{digit}", ours, GOLDEN[f"{name}_pf_keep_{digit}"])


@pytest.mark.parametrize("name, digit", list(itertools.product(["n1", "n40", "n40tie", "n300", "n2000"], DIGITS)))
def test_faster_rcnn_pytorchs_kept_boxes(name, digit):
    """Its C++ code also suppresses at exactly the threshold, where no pair is; it returns ascending indices."""
    boxes, scores = case(name)
    ours = sorted(kept(continuous(boxes), scores, digit / 10))
    compare("NMS", "faster-rcnn.pytorch", f"{name} at 0.{digit}", ours, GOLDEN[f"{name}_jwcpp_keep_{digit}"])


@pytest.mark.parametrize("digit", DIGITS)
def test_faster_rcnn_pytorchs_choice_among_equal_scores_is_one_of_many(digit):
    """Its sort is not stable, so only order-independent results are compared; ours prefers lower indices."""
    boxes, scores = case("n200alleq")
    iou = iou_matrix(continuous(boxes), continuous(boxes))
    for chosen in (kept(continuous(boxes), scores, digit / 10), GOLDEN[f"n200alleq_jwcpp_keep_{digit}"]):
        chosen = np.asarray(chosen)
        among = iou[np.ix_(chosen, chosen)] > digit / 10
        assert among.sum() == len(chosen)  # a box overlaps only itself
        assert (iou[chosen] > digit / 10).any(axis=0).all()


@pytest.mark.parametrize("digit, at_threshold", [(3, (0, 1)), (5, (2, 3)), (7, (4, 5))])
def test_edge_pairs_are_the_only_difference(digit, at_threshold):
    """Pairs of IoU 3/10, 1/2, 7/10: float32(.3) is above .3, so the first is suppressed at .3; the others are not."""
    boxes, scores = continuous(GOLDEN["edge_boxes_p1"]), GOLDEN["edge_scores"]
    iou = [iou_matrix(boxes[i : i + 1], boxes[i + 1 : i + 2])[0, 0] for i in (0, 2, 4)]
    np.testing.assert_array_equal(iou, np.float32([0.3, 0.5, 0.7]))
    ours = kept(boxes, scores, digit / 10)
    # The same boxes as `edge`, so what torchvision keeps of them.
    compare("NMS", "torchvision", f"edge_boxes_p1 at 0.{digit}", ours, GOLDEN[f"edge_tv_keep_{digit}"])
    lower = at_threshold[1]
    # py-faster-rcnn's threshold is float32(.3), which the IoU does not exceed.
    theirs = set(GOLDEN[f"edge_pf_keep_{digit}"].tolist())
    assert theirs - set(ours) == ({lower} if digit == 3 else set()) and set(ours) <= theirs
    # faster-rcnn.pytorch suppresses at the threshold itself.
    theirs = set(GOLDEN[f"edge_jwcpp_keep_{digit}"].tolist())
    assert set(ours) - theirs == (set() if digit == 3 else {lower}) and theirs <= set(ours)
