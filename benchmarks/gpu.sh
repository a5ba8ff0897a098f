#!/usr/bin/env bash
# Runs what needs a GPU, stage by stage; a stage that fails does not stop the next, and each ends within 9 minutes.
#
#   benchmarks/gpu.sh [--out DIR] [--cache ARCHIVE] [--wheels FOLDER] [--data FOLDER] [--tiny] [STAGE ...]
#
# Stages (all, without an argument), the most important first:
#   nms        goals of benchmarks/kernels.py: NMS and proposals             -> DIR/nms.json
#   regions    goals of benchmarks/kernels.py: RoIAlign                      -> DIR/regions.json
#   detection  goal of benchmarks/end_to_end.py: detection                   -> DIR/detection.json
#   step       goal of benchmarks/end_to_end.py: training step               -> DIR/step.json
#   tests      the gpu tests, then the others as time allows                 -> DIR/tests.json, DIR/tests.log
#   train      benchmarks/train_minutes.py on the images of --data           -> DIR/train.json
#   ops        benchmarks/kernels.py, what has no goal                       -> DIR/ops.json
#   e2e        benchmarks/end_to_end.py, what has no goal, as time allows    -> DIR/e2e.json
#
# --out      folder of the results; default: benchmarks/results
# --cache    archive of JAX's compilation cache from an earlier run, DIR/jax_cache.tar; each stage leaves a new one, of
#            at most 16 MiB, in DIR
# --wheels   folder of benchmarks/gather_wheels.sh, for a machine that reaches no package index: `tests` and `train`
#            need packages that JAX and torchvision do not bring
# --data     folder in VOC layout with the splits train and test; without it the train stage fails
# --tiny     sizes that tell nothing about speed, for a CPU: to try the script
# PYTHON     the interpreter; default: python, or python3 where there is no python
# STAGE_SECONDS  the time of a stage; default: 535
# PYTEST_ADDOPTS reaches pytest as always.
#
# Exits with 1 when a stage failed, with 2 when an argument is wrong. A case without time left has failed.
set -uo pipefail

STAGES=(nms regions detection step tests train ops e2e)
# Seconds. A stage is ended after LIMIT, whatever hangs in it; a benchmark has MARGIN for its start and ends by itself.
LIMIT=${STAGE_SECONDS:-535}
MARGIN=35
CACHE_LIMIT=$((16 * 1024 * 1024))

usage() {
    echo "usage: benchmarks/gpu.sh [--out DIR] [--cache ARCHIVE] [--wheels FOLDER] [--data FOLDER] [--tiny]" \
        "[STAGE ...]; stages: ${STAGES[*]}" >&2
    exit 2
}

root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-}
# A shim may stand there without an interpreter behind.
for candidate in python python3; do
    [[ -n $python ]] || ! "$candidate" -c "" 2>/dev/null || python=$candidate
done
[[ -n $python ]] || {
    echo "there is neither python nor python3: set PYTHON" >&2
    exit 2
}
out=$root/benchmarks/results
archive= wheels= data= tiny=
chosen=()
while (($#)); do
    case $1 in
    --out | --cache | --wheels | --data)
        [[ -n ${2:-} ]] || usage
        # Taken from where the caller stands, before we go to the root.
        path=$(realpath -m "$2")
        case $1 in --out) out=$path ;; --cache) archive=$path ;; --wheels) wheels=$path ;; --data) data=$path ;; esac
        shift 2
        ;;
    --tiny)
        tiny=--tiny
        shift
        ;;
    *)
        [[ " ${STAGES[*]} " == *" $1 "* ]] || usage
        chosen+=("$1")
        shift
        ;;
    esac
done
((${#chosen[@]})) || chosen=("${STAGES[@]}")

minutes=$(awk "BEGIN { print ($LIMIT - $MARGIN) / 60 }")

cd "$root" || exit 2
mkdir -p "$out" || exit 2
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$scratch/jax_cache}
mkdir -p "$JAX_COMPILATION_CACHE_DIR"
# Two libraries, and the processes that tests start, share the card.
export XLA_PYTHON_CLIENT_PREALLOCATE=false
archive=${archive:-$out/jax_cache.tar}

install_wheels() {
    [[ -n $wheels ]] || return 0
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$scratch/site" "$wheels"/*.whl ||
        return 1
    export PYTHONPATH=$scratch/site${PYTHONPATH:+:$PYTHONPATH}
}

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
        tar -C "$JAX_COMPILATION_CACHE_DIR" -cf "$out/jax_cache.part" --verbatim-files-from -T - &&
        mv "$out/jax_cache.part" "$out/jax_cache.tar"
}

# The tests once, and what came of them as JSON: those that need a GPU first. SIGINT lets pytest write its report
# when time is up.
stage_tests() {
    local start=$SECONDS status=0 cut=False selection left code
    rm -f "$out/tests.log"
    for selection in "gpu and not slow" "not gpu and not slow and not aot"; do
        left=$((LIMIT - 20 - (SECONDS - start)))
        ((left > 0)) || {
            cut=True
            break
        }
        timeout --signal=INT --kill-after=20 "$left" \
            "$python" -m pytest -c pyproject.toml -m "$selection" --junitxml="$scratch/${selection%% *}.xml" 2>&1 |
            tee -a "$out/tests.log"
        code=${PIPESTATUS[0]}
        # 5: nothing was selected. 124: time was up, which the others are selected to fill.
        if ((code == 124)) && [[ $selection == not* ]]; then
            cut=True
        elif ((code != 0 && code != 5 && status == 0)); then
            status=$code
        fi
    done
    "$python" - "$scratch" "$status" $((SECONDS - start)) "$cut" >"$out/tests.json" <<'REPORT' || status=1
import json
import sys
import xml.etree.ElementTree as ElementTree
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import jax

scratch, status, seconds, cut = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "True"
outcomes, not_passed, suites = None, [], []
for name in ("gpu", "not"):
    # Absent or cut short where pytest was killed.
    try:
        suites += ElementTree.parse(scratch / f"{name}.xml").iter("testsuite")
    except (OSError, ElementTree.ParseError):
        pass
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
    "exit_status": status or int(bool(not_passed)),
    "timed_out": status in (124, 137),  # the gpu tests, or a test that did not stop
    "cut_short": cut,  # the others took more time than there was
    "seconds": seconds,
}
print(json.dumps(report, indent=2))
sys.exit(report["exit_status"])
REPORT
    return "$status"
}

# A benchmark under the limit of its stage; it ends by itself before, unless it hangs.
benchmark() { # STAGE SCRIPT ARGUMENTS
    timeout --kill-after=5 "$LIMIT" "$python" "benchmarks/$2" --out "$out/$1.json" "${@:3}"
}

timed() { # STAGE SCRIPT ARGUMENTS: a benchmark with cases
    benchmark "$1" "$2" --minutes "$minutes" ${tiny:+--tiny --no_compile} "${@:3}"
}

stage_nms() { timed nms kernels.py --goals --skip roi_; }

stage_regions() { timed regions kernels.py --goals --only roi_; }

stage_detection() { timed detection end_to_end.py --goals --only detection; }

stage_step() { timed step end_to_end.py --goals --only training; }

stage_ops() { timed ops kernels.py --others; }

stage_e2e() { timed e2e end_to_end.py --others; }

stage_train() {
    [[ -n $data ]] || {
        echo "the train stage needs --data FOLDER" >&2
        return 1
    }
    # What is not training is compilation and evaluation.
    benchmark train train_minutes.py --data "$data" --limit "$minutes" --minutes "$([[ $tiny ]] && echo 0.1 || echo 1.2)" \
        ${tiny:+--config benchmarks/rehearsal/tiny_training.py}
}

install_wheels || exit 2
restore_cache
failed=()
for stage in "${chosen[@]}"; do
    echo "== $stage"
    "stage_$stage" || failed+=("$stage")
    # Now, because a stage is all that one call of a machine may be.
    save_cache || failed+=("the cache after $stage")
done
((${#failed[@]} == 0)) || {
    echo "failed: ${failed[*]}" >&2
    exit 1
}
