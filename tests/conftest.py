"""Settings of every test: annotations are enforced, promotion is strict, and there are several virtual devices.

Everything here happens before the package or JAX is imported.
"""

import atexit
import importlib.metadata
import os
import shutil
import tarfile
import tempfile
from pathlib import Path

FLAGS = {
    # Four CPU devices, so that code for several devices meets several. Harmless where JAX finds a GPU.
    "--xla_force_host_platform_device_count": "4",
}
if importlib.metadata.version("jaxlib").startswith("0.10."):
    # Most of the time of the suite is compilation, and without these emitters it takes a third less. A newer XLA may
    # not know the flag, and an unknown flag ends the process.
    FLAGS["--xla_cpu_use_fusion_emitters"] = "false"
for flag, value in FLAGS.items():
    if flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}={value}".strip()

import hypothesis  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from flax import nnx  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

# beartype checks every annotation of the package, shapes included, while the tests run. By the
# numeric tower of PEP 484 an int is a float: `sizes=(16, 32)` is right.
install_import_hook("fasterrcnn_jax", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

# Implicit promotion hides mistakes: an int32 times a float32 raises, and so does [n 4] times [4].
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Most of the time of the suite is compilation, and many tests compile the same program. Each session has a cache of its
# own, which its processes share: a program from an earlier session would not be the one under test.
if "FASTERRCNN_TEST_CACHE" not in os.environ:
    os.environ["FASTERRCNN_TEST_CACHE"] = tempfile.mkdtemp(prefix="fasterrcnn_tests_")
    atexit.register(shutil.rmtree, os.environ["FASTERRCNN_TEST_CACHE"], ignore_errors=True)
jax.config.update("jax_compilation_cache_dir", os.environ["FASTERRCNN_TEST_CACHE"])

# Examples share one compiled program per test, but the first one pays for it: no deadline.
# Derandomised: a red test is red for everybody.
hypothesis.settings.register_profile("suite", max_examples=25, deadline=None, derandomize=True)
hypothesis.settings.load_profile("suite")


# A compiled program takes dozens of memory maps. Linux gives a process 65,530 (vm.max_map_count); at the next one XLA
# ends in a segmentation fault.
MEMORY_MAPS = Path("/proc/self/maps")
MANY_MAPS = 25_000


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Frees the compiled programs of a file of tests if there are many."""
    yield
    if MEMORY_MAPS.exists() and MEMORY_MAPS.read_bytes().count(b"\n") > MANY_MAPS:
        jax.clear_caches()


@pytest.fixture(scope="module")
def quick_compilation():
    """Compiles small programs faster, on a CPU, where compiling them takes longer than running them."""
    if jax.default_backend() != "cpu":
        yield
        return
    import tiny  # imports the package, so after the hook above

    with tiny.quick_compilation():
        yield


@pytest.fixture(scope="session")
def random_weights():
    """Returns a function: (builder of an nnx module, seed) -> the module with NumPy-drawn weights.

    No weight keeps a special start value (zero biases, zero last scale of a residual branch), which
    would hide what it multiplies; and nothing has to be compiled.
    """

    def build(builder, seed=0):
        generator = np.random.default_rng(seed)

        def draw(path, leaf):
            name = next(str(part.key) for part in reversed(path) if hasattr(part, "key"))
            noise = generator.standard_normal(leaf.shape)
            if name == "kernel":
                noise *= np.sqrt(2 / np.prod(leaf.shape[:-1]))
            elif name in ("scale", "var"):
                noise = 0.8 + 0.2 * np.abs(noise)
            else:
                noise *= 0.1
            return jax.numpy.asarray(noise, leaf.dtype)

        graphdef, state = nnx.split(nnx.eval_shape(builder))
        return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(draw, state))

    return build


@pytest.fixture(scope="session")
def small_run(tmp_path_factory):
    """Returns a run folder that version 0.1.0 (commit 5e3a57f) wrote: step 2 of 4, of `tiny.config`."""
    folder = tmp_path_factory.mktemp("small_run")
    with tarfile.open(Path(__file__).parent / "golden" / "run_of_0.1.0.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder / "run"


# Modules that compile or train much, the longest first. If they came last, one process would work alone at the end.
LONGEST = [
    "test_scripts",
    "test_detector",
    "test_whole_models",
    "test_fine_tuning",
    "test_whole_pyramid",
    "test_stages",
    "test_kill",
    "test_training",
    "test_fpn",
    "test_distributed",
    "test_own_backbone",
    "test_summary",
    "test_benchmarks",
    "test_inference",
    "test_parallel",
]


def pytest_configure(config):
    # pytest-xdist would sort the modules by their number of tests.
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    rank = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    from fasterrcnn_jax.kernels import choice  # after the hook above

    if item.get_closest_marker("mosaic_kernel") and jax.__version_info__[:2] < choice.OLDEST_JAX:
        pytest.skip("the Mosaic kernels need JAX " + ".".join(map(str, choice.OLDEST_JAX)) + " or newer")
