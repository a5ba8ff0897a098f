"""benchmarks/gpu.sh on any device, with four small tests instead of the whole test suite."""

import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import jax
import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.sh"
LIMIT = 16 * 1024 * 1024

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


def test_cache_travels_in_one_archive_that_stays_under_its_limit(tmp_path, selection):
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    for age, (name, size) in enumerate([("new", 1000), ("large", LIMIT - 5000), ("old", 9000), ("tiny", 10)]):
        (first / name).write_bytes(os.urandom(size))
        os.utime(first / name, (1e9 - age, 1e9 - age))
    arguments = ("--out", "out", "--cache", "cache.tar", "tests")
    passing = f"{selection}::test_right"
    done = gpu_script(*arguments, cwd=tmp_path, cache=first, selection=passing)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "cache.tar").stat().st_size <= LIMIT
    with tarfile.open(tmp_path / "cache.tar") as archive:
        assert {"new", "old", "tiny"} <= set(archive.getnames())
        assert "large" not in archive.getnames()

    done = gpu_script(*arguments, cwd=tmp_path, cache=second, selection=passing)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (second / "old").read_bytes() == (first / "old").read_bytes()


def test_an_unknown_stage_is_an_error_that_names_the_stages(tmp_path, selection):
    done = gpu_script("test", cwd=tmp_path, cache=tmp_path / "cache", selection=selection)
    assert done.returncode == 2
    assert "stages: tests ops e2e train" in done.stderr


STUB = """#!/usr/bin/env bash
echo "$@" >>{calls}
echo "$JAX_COMPILATION_CACHE_DIR" >>{caches}
[[ $1 != benchmarks/kernels.py ]]
"""


@pytest.fixture
def stub(tmp_path):
    path = tmp_path / "python"
    path.write_text(STUB.format(calls=tmp_path / "calls", caches=tmp_path / "caches"))
    path.chmod(0o755)
    return path


def test_a_failed_stage_does_not_stop_the_next(tmp_path, selection, stub):
    arguments = ("--out", "out", "--data", "cells", "ops", "e2e", "train")
    done = gpu_script(*arguments, cwd=tmp_path, cache=None, selection=selection, python=stub)
    assert done.returncode == 1
    assert done.stderr == "failed: ops\n"
    ops, e2e, train = (tmp_path / "calls").read_text().splitlines()
    out = tmp_path / "out"
    assert ops.startswith(f"benchmarks/kernels.py --out {out}/ops.json --minutes ")
    assert e2e.startswith(f"benchmarks/end_to_end.py --out {out}/e2e.json --minutes ")
    assert train.startswith(f"benchmarks/train_minutes.py --out {out}/train.json --data {tmp_path}/cells --minutes ")
    assert "tiny" not in ops + e2e
    # Without a given cache folder, the stages share a folder of their own.
    caches = (tmp_path / "caches").read_text().split()
    assert len(caches) == 3 and len(set(caches)) == 1 and not Path(caches[0]).exists()


def test_training_without_images_fails_and_tiny_reaches_the_benchmarks(tmp_path, selection, stub):
    arguments = ("--out", "out", "--tiny", "e2e", "train")
    done = gpu_script(*arguments, cwd=tmp_path, cache=tmp_path / "cache", selection=selection, python=stub)
    assert done.returncode == 1
    assert "needs --data" in done.stderr and "failed: train" in done.stderr
    assert (tmp_path / "calls").read_text().rstrip().endswith("--tiny --no_compile")


def test_benchmarks_end_before_the_limit_of_their_stage_and_all_stages_in_22_minutes():
    text = SCRIPT.read_text()
    limits = {name: int(seconds) for name, seconds in re.findall(r"\[(\w+)\]=(\d+)", text)}
    assert list(limits) == ["tests", "ops", "e2e", "train"]
    assert max(limits.values()) < 9 * 60 and sum(limits.values()) < 22 * 60
    for stage in ("ops", "e2e"):
        minutes = float(re.search(rf"benchmark {stage} .* --minutes ([\d.]+)", text)[1])
        assert 60 * minutes + 10 < limits[stage]
