"""Runs every comparison with the references and writes docs/fidelity.md: python tests/write_fidelity.py"""

import platform
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "fidelity.md"

HEADER = """# Fidelity

This page lists every number of this library that is compared with a number from a reference implementation. The inputs
and outputs of the references are in `tests/golden`. Its README names the program and version behind each of them.
The comparisons are tests. `python tests/write_fidelity.py` runs them and writes this page
({where}).

*Identical* means that every value, or every index and label, is the same. Otherwise the last column is the tolerance
that the test asserts, where |x| is the absolute value of the reference. The relative difference is the largest over all
values that are not zero. It is therefore large if a value is nearly zero.

{count:,} values in {rows} comparisons. The first table groups them by concept; the second table lists each one.
"""

EACH = """
## Every comparison
"""

FOOTER = """
## What is not compared

- For detections of whole models of faster-rcnn.pytorch, the recorded regions go through our `postprocess`. The
  reference also hands padded regions to its head, and it orders equal scores by an unstable sort. If several regions
  have exactly the same score, the regions that the reference kept are therefore given first. The reference keeps all
  detections that share the hundredth score; these detections are left out.
- For losses of whole models of faster-rcnn.pytorch, we use the RoIs, labels and targets that the reference drew
  (background with replacement), and its normalisation by the count of the last image. Its two-logit objectness is
  compared through the difference of the logits. The gradient of its two-logit layer is compared with our gradient and
  the negative of our gradient.
- No numbers of torchvision's second version and of detectron2 are recorded. For torchvision's first version, the canvas
  is the size of its padded batch, and detections and losses come from `detect` and `training_losses` without changes.
- RoI crop has no recorded numbers. It is compared with a loop written from its formula.
- The random choice of anchors and RoIs is not compared, because random generators differ. Tests check the counts, the
  labels, and that every choice is equally likely.
- The resize of images in the Caffe programs is not compared, because the recorded networks got images in their original
  size. It is compared with a formula.
- Everything here ran on a CPU in float32. Nothing has been compared on a GPU.
"""


def rows(records) -> list[str]:
    columns = (
        "concept", "reference", "comparison", "values", "largest difference", "relative", "identical", "tolerance",
    )  # fmt: skip
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for r in records:
        apart = ("0", "0", "yes") if r.identical else (f"{r.max_abs:.1e}", f"{r.max_rel:.1e}", "no")
        tolerance = r.tolerance.replace("|", "\\|")
        lines.append(f"| {r.concept} | {r.reference} | {r.name} | {r.values:,} | {' | '.join(apart)} | {tolerance} |")
    return lines


def summary(records) -> list[str]:
    columns = ("concept", "reference", "comparisons", "identical", "values", "largest difference", "relative")
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for concept, reference in dict.fromkeys((r.concept, r.reference) for r in records):
        of = [r for r in records if (r.concept, r.reference) == (concept, reference)]
        same, values = sum(r.identical for r in of), sum(r.values for r in of)
        apart = (max(r.max_abs for r in of), max(r.max_rel for r in of))
        differences = " | ".join(f"{size:.1e}" if size else "0" for size in apart)
        lines.append(f"| {concept} | {reference} | {len(of)} | {same} | {values:,} | {differences} |")
    return lines


def main() -> None:
    sys.path.insert(0, str(TESTS))
    files = sorted(str(path) for path in TESTS.glob("test_*.py") if "from fidelity import" in path.read_text())
    status = pytest.main(["-q", "-p", "no:cacheprovider", *files])
    if status:
        sys.exit("a comparison failed; the page is left as it was")
    import fidelity

    # In the order of the path, and a comparison that several tests make once.
    records = sorted(dict.fromkeys(fidelity.RECORDS), key=lambda r: (r.concept, r.reference, r.name))
    where = f"JAX {jax.__version__}, NumPy {np.__version__}, Python {platform.python_version()}, CPU"
    header = HEADER.format(where=where, count=sum(r.values for r in records), rows=len(records))
    PAGE.write_text("\n".join([header, *summary(records), EACH, *rows(records)]) + "\n" + FOOTER)
    print(f"{PAGE}: {len(records)} comparisons, {sum(r.values for r in records):,} values")


if __name__ == "__main__":
    main()
