#!/usr/bin/env bash
# Runs what needs a GPU, stage by stage; a stage that fails does not stop the next.
#
#   benchmarks/gpu.sh [--out DIR] [--cache ARCHIVE] [STAGE ...]
#
# Stages (all, without an argument):
#   tests    the suite with its gpu tests, at most 9 minutes -> DIR/tests.json
#
# --out      folder of the results; default: benchmarks/results
# --cache    one tar archive of at most 16 MiB that carries JAX's compilation cache from run to run
# PYTHON     the interpreter; default: python
# PYTEST_ADDOPTS reaches pytest as always.
#
# Exits with 1 when a stage failed, with 2 when an argument is wrong.
set -uo pipefail

STAGES=(tests)
CACHE_LIMIT=$((16 * 1024 * 1024))

usage() {
    echo "usage: benchmarks/gpu.sh [--out DIR] [--cache ARCHIVE] [STAGE ...]; stages: ${STAGES[*]}" >&2
    exit 2
}

root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python}
out=$root/benchmarks/results
archive=
chosen=()
while (($#)); do
    case $1 in
    --out | --cache)
        [[ -n ${2:-} ]] || usage
        # Taken from where the caller stands, before we go to the root.
        [[ $1 == --out ]] && out=$(realpath -m "$2") || archive=$(realpath -m "$2")
        shift 2
        ;;
    *)
        [[ " ${STAGES[*]} " == *" $1 "* ]] || usage
        chosen+=("$1")
        shift
        ;;
    esac
done
((${#chosen[@]})) || chosen=("${STAGES[@]}")

cd "$root" || exit 2
mkdir -p "$out" || exit 2
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$scratch/jax_cache}
mkdir -p "$JAX_COMPILATION_CACHE_DIR"

restore_cache() {
    [[ -f $archive ]] || return 0
    tar -C "$JAX_COMPILATION_CACHE_DIR" -xf "$archive" || echo "the cache $archive cannot be read: starting empty" >&2
}

# The newest entries first, as many as fit: a file takes its header and whole blocks of 512 bytes, the end
# of the archive up to 20 of them.
save_cache() {
    find "$JAX_COMPILATION_CACHE_DIR" -type f -printf '%T@ %s %P\n' | sort -rn |
        awk -v limit=$((CACHE_LIMIT - 20 * 512)) '
            { need = 512 * (1 + int(($2 + 511) / 512)) }
            used + need <= limit { used += need; print $3 }' |
        tar -C "$JAX_COMPILATION_CACHE_DIR" -cf "$archive.part" --verbatim-files-from -T - &&
        mv "$archive.part" "$archive"
}

# The suite once, and what came of it as JSON. SIGINT lets pytest write its report when time is up.
stage_tests() {
    local start=$SECONDS status
    timeout --signal=INT --kill-after=20 540 \
        "$python" -m pytest -c pyproject.toml -m "not slow" --junitxml="$scratch/tests.xml" 2>&1 | tee "$out/tests.log"
    status=${PIPESTATUS[0]}
    "$python" - "$scratch/tests.xml" "$status" $((SECONDS - start)) >"$out/tests.json" <<'REPORT' || status=1
import json
import sys
import xml.etree.ElementTree as ElementTree
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import jax

xml, status, seconds = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
outcomes, not_passed = None, []
# Absent or cut short where pytest was killed.
try:
    suites = list(ElementTree.parse(xml).iter("testsuite"))
except (OSError, ElementTree.ParseError):
    suites = []
if suites:
    count = {name: sum(int(suite.get(name)) for suite in suites) for name in ("tests", "failures", "errors", "skipped")}
    passed = count["tests"] - count["failures"] - count["errors"] - count["skipped"]
    outcomes = {
        "passed": passed, "failed": count["failures"], "errors": count["errors"], "skipped": count["skipped"]
    }
    not_passed = [
        f"{case.get('classname')}::{case.get('name')}"
        for suite in suites
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
device = jax.devices()[0]
versions = {name: version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")}
report = {
    "date": datetime.now(UTC).isoformat(timespec="seconds"),
    "device": {"platform": device.platform, "kind": device.device_kind, "count": jax.device_count()},
    "versions": {"python": sys.version.split()[0], "driver": device.client.platform_version, **versions},
    "outcomes": outcomes,
    "not_passed": not_passed,
    "exit_status": status,
    "timed_out": status in (124, 137),
    "seconds": seconds,
}
print(json.dumps(report, indent=2))
REPORT
    return "$status"
}

[[ -z $archive ]] || restore_cache
failed=()
for stage in "${chosen[@]}"; do
    echo "== $stage"
    "stage_$stage" || failed+=("$stage")
done
[[ -z $archive ]] || save_cache || failed+=(cache)
((${#failed[@]} == 0)) || {
    echo "failed: ${failed[*]}" >&2
    exit 1
}
