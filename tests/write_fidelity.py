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

Every number of this library that is compared with one computed by a reference implementation. The inputs and
outputs of the references are in `tests/golden`, whose README says what produced each and by which version. The
comparisons are tests; this page is what they measured, written by `python tests/write_fidelity.py`
({where}).

*Identical* means every value, or every index and label, is the same. Otherwise the tolerance is the one that the
test asserts; |x| is the size of the reference's value. The relative difference is the largest over values other
than zero, so that it is large where a value is nearly zero.

{count:,} values in {rows} comparisons. By concept first, one by one below.
"""

EACH = """
## Every comparison
"""

FOOTER = """
## What is not compared

- Detections of whole models go through this library's `postprocess` with the regions that the reference recorded:
  it hands padded regions to its head as well, and orders equal scores by an unstable sort, so the regions that it
  kept are offered first where several have exactly the same score. Detections that share the hundredth score,
  all of which the reference keeps, are left out.
- Losses of whole models see the RoIs, labels and targets that the reference drew (background with replacement) and
  its normalisation by the last image's count. Its two-logit objectness is compared by the difference of the
  logits; the gradient of the two-logit layer is ours and minus ours.
- torchvision's second version, and detectron2: no numbers of theirs are recorded. The canvas of torchvision's model is
  that of its batch, padding included; its detections and losses come from `detect` and `training_losses` as they are.
- RoI crop and the floor quantisation of RoI pooling have no recorded numbers; they are compared with a loop written
  from their formula. RoIAlign and RoIPool with 2 x 3 cells are recorded, and not compared: outputs here are square.
- Which anchors and RoIs are drawn: random generators differ. Counts, labels and that every draw is equally likely
  are tested.
- The resize of images by the Caffe line: the recorded networks were fed at their images' own size. It is compared with
  a formula.
- Everything here ran on a CPU in float32. Nothing has been compared on a GPU.
"""


def rows(records) -> list[str]:
    columns = ("concept", "reference", "what", "values", "largest difference", "relative", "identical", "asserted")
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
