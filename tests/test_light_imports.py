"""The benchmarks are imported where only JAX, Flax, optax, NumPy and jaxtyping are: a GPU that is lent for an hour."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = {path.stem for path in BENCHMARKS.glob("*.py")}
# torchvision, which they are compared with, brings Pillow. These scripts read images.
OF_IMAGES = {"full_size", "on_cpu", "throughput", "train_minutes"}
# Compares with torchvision and is imported where it is.
OF_TORCHVISION = {"torchvision_detectors"}

RUN = """
import runpy, sys
sys.path.insert(0, sys.argv[1])
for name in sys.argv[2:]:
    runpy.run_path(f"{sys.argv[1]}/{name}.py", run_name=name)
"""


def import_where_others_are_blocked(scripts, also_allowed=""):
    command = [sys.executable, "-c", RUN, str(BENCHMARKS), *sorted(scripts)]
    environment = os.environ | {"PYTHONPATH": str(BENCHMARKS / "rehearsal"), "ALSO_ALLOWED": also_allowed}
    return subprocess.run(command, cwd=BENCHMARKS, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    "scripts, also_allowed",
    [(SCRIPTS - OF_IMAGES - OF_TORCHVISION, ""), (OF_IMAGES, "PIL")],
    ids=["networks and operations", "images"],
)
def test_benchmarks_import_nothing_that_a_machine_with_a_gpu_may_lack(scripts, also_allowed):
    done = import_where_others_are_blocked(scripts, also_allowed)
    assert done.returncode == 0, done.stderr


def test_what_is_blocked_is_seen():
    done = import_where_others_are_blocked({"throughput"})
    assert done.returncode == 1 and "No module named 'PIL': blocked for the rehearsal" in done.stderr
