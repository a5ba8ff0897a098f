"""benchmarks/gpu.sh on any device, with four small tests instead of the whole test suite."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import jax
import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.sh"
LIMIT = 16 * 1024 * 1024
GOALS = ("nms", "regions", "detection", "step")
STAGES = (*GOALS, "tests", "train", "ops", "e2e")

TESTS = """
import pytest
def test_right(): pass
def test_wrong(): assert False
@pytest.mark.gpu
def test_skipped(): pytest.skip("no reason")
@pytest.mark.slow
def test_long(): assert False
"""


def gpu_script(*arguments, cwd, cache, selection, python=sys.executable):
    env = os.environ | {
        "PYTHON": str(python),
        "PYTEST_ADDOPTS": f"-p no:cacheprovider {selection}",
    }
    env.pop("JAX_COMPILATION_CACHE_DIR", None)
    if cache is not None:
        env["JAX_COMPILATION_CACHE_DIR"] = str(cache)
    return subprocess.run(["bash", str(SCRIPT), *map(str, arguments)], cwd=cwd, env=env, capture_output=True, text=True)


@pytest.fixture
def selection(tmp_path):
    path = tmp_path / "test_three.py"
    path.write_text(TESTS)
    return path


def test_outcomes_device_and_versions_are_written_although_a_test_fails(tmp_path, selection):
    done = gpu_script("--out", "out", "tests", cwd=tmp_path, cache=tmp_path / "cache", selection=selection)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "failed: tests" in done.stderr
    report = json.loads((tmp_path / "out" / "tests.json").read_text())
    assert report["outcomes"] == {"passed": 1, "failed": 1, "errors": 0, "skipped": 1}
    assert [name.split("::")[-1] for name in report["not_passed"]] == ["test_wrong"]
    assert report["exit_status"] == 1
    assert not report["timed_out"] and not report["cut_short"]
    log = (tmp_path / "out" / "tests.log").read_text()
    assert log.index("1 skipped") < log.index("1 failed"), "gpu tests come first"
    assert report["device"]["kind"] == jax.devices()[0].device_kind
    assert report["versions"]["jax"] == jax.__version__
    assert report["date"].endswith("+00:00")


@pytest.mark.slow
def test_cache_travels_in_one_archive_that_stays_under_its_limit(tmp_path, selection):
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    for age, (name, size) in enumerate([("new", 1000), ("large", LIMIT - 5000), ("old", 9000), ("tiny", 10)]):
        (first / name).write_bytes(os.urandom(size))
        os.utime(first / name, (1e9 - age, 1e9 - age))
    passing = f"{selection}::test_right"
    done = gpu_script("--out", "out", "tests", cwd=tmp_path, cache=first, selection=passing)
    assert done.returncode == 0, done.stdout + done.stderr
    left = tmp_path / "out" / "jax_cache.tar"
    assert left.stat().st_size <= LIMIT
    with tarfile.open(left) as archive:
        assert {"new", "old", "tiny"} <= set(archive.getnames())
        assert "large" not in archive.getnames()

    arguments = ("--out", "another", "--cache", "out/jax_cache.tar", "tests")
    done = gpu_script(*arguments, cwd=tmp_path, cache=second, selection=passing)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (second / "old").read_bytes() == (first / "old").read_bytes()


def test_an_unknown_stage_is_an_error_that_names_the_stages(tmp_path, selection):
    done = gpu_script("test", cwd=tmp_path, cache=tmp_path / "cache", selection=selection)
    assert done.returncode == 2
    assert f"stages: {' '.join(STAGES)}" in done.stderr


STUB = """#!/usr/bin/env bash
[[ $1 != -c ]] || exit 0
echo "$@" >>{calls}
echo "$JAX_COMPILATION_CACHE_DIR $XLA_PYTHON_CLIENT_PREALLOCATE" >>{environments}
[[ $1 != benchmarks/kernels.py ]]
"""


@pytest.fixture
def stub(tmp_path):
    path = tmp_path / "python"
    path.write_text(STUB.format(calls=tmp_path / "calls", environments=tmp_path / "environments"))
    path.chmod(0o755)
    return path


def test_a_failed_stage_does_not_stop_the_next(tmp_path, selection, stub):
    arguments = ("--out", "out", "--data", "cells", *GOALS, "train", "ops", "e2e")
    done = gpu_script(*arguments, cwd=tmp_path, cache=None, selection=selection, python=stub)
    assert done.returncode == 1
    assert done.stderr == "failed: nms regions ops\n"
    called = (tmp_path / "calls").read_text().splitlines()
    out = tmp_path / "out"
    timed = [
        *("kernels.py nms --goals --skip roi_", "kernels.py regions --goals --only roi_"),
        *("end_to_end.py detection --goals --only detection", "end_to_end.py step --goals --only training"),
        *("kernels.py ops --others", "end_to_end.py e2e --others"),
    ]
    train = called.pop(4)
    assert (
        train
        == f"benchmarks/train_minutes.py --out {out}/train.json --data {tmp_path}/cells --limit 8.33333 --minutes 1.2"
    )
    for line, (script, stage, *rest) in zip(called, map(str.split, timed), strict=True):
        assert line == f"benchmarks/{script} --out {out}/{stage}.json --minutes 8.33333 {' '.join(rest)}"
    # Without a given cache folder, the stages share a folder of their own. No process takes the whole card.
    environments = set((tmp_path / "environments").read_text().splitlines())
    (cache, preallocates), *others = map(str.split, environments)
    assert preallocates == "false" and not others and not Path(cache).exists()


def test_training_without_images_fails_and_tiny_reaches_the_benchmarks(tmp_path, selection, stub):
    arguments = ("--out", "out", "--tiny", "train", "e2e")
    done = gpu_script(*arguments, cwd=tmp_path, cache=tmp_path / "cache", selection=selection, python=stub)
    assert done.returncode == 1
    assert "needs --data" in done.stderr and "failed: train" in done.stderr
    assert (tmp_path / "calls").read_text().rstrip().endswith("--tiny --no_compile --others")


def test_without_python_there_is_python3_and_a_shim_is_no_interpreter(tmp_path, stub):
    """`python` stands on the path and does not run, as a version manager leaves it."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name in ("bash", "dirname", "realpath", "mkdir", "mktemp", "rm", "find", "sort", "awk", "tar", "mv", "timeout"):
        (commands / name).symlink_to(shutil.which(name))
    (commands / "python").write_text("#!/usr/bin/env bash\nexit 127\n")
    (commands / "python").chmod(0o755)
    stub.rename(commands / "python3")
    env = {"PATH": str(commands)}
    done = subprocess.run(
        ["bash", str(SCRIPT), "--out", str(tmp_path / "out"), "e2e"], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "end_to_end.py" in (tmp_path / "calls").read_text()


def test_wheels_are_installed_beside_what_the_machine_has(tmp_path, selection):
    """One wheel without dependencies, whose module a test imports."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "carried-1.0-py3-none-any.whl", "w") as wheel:
        files = {"carried.py": "", "carried-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nTag: py3-none-any\n"}
        files["carried-1.0.dist-info/METADATA"] = "Metadata-Version: 2.1\nName: carried\nVersion: 1.0\n"
        for name, text in files.items():
            wheel.writestr(name, text)
        wheel.writestr("carried-1.0.dist-info/RECORD", "".join(f"{name},,\n" for name in files))
    selection.write_text("def test_of_the_wheel():\n    import carried\n")
    arguments = ("--out", "out", "--wheels", "wheels", "tests")
    done = gpu_script(*arguments, cwd=tmp_path, cache=tmp_path / "cache", selection=selection)
    assert done.returncode == 0, done.stdout + done.stderr


def test_benchmarks_end_before_the_limit_of_their_stage_and_each_stage_within_nine_minutes():
    text = SCRIPT.read_text()
    patterns = r"^LIMIT=\$\{STAGE_SECONDS:-(\d+)\}$", r"^MARGIN=(\d+)$"
    limit, margin = (int(re.search(pattern, text, re.MULTILINE)[1]) for pattern in patterns)
    assert margin >= 30 and limit + 5 <= 9 * 60
