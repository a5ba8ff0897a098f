#!/usr/bin/env bash
# Runs what needs a GPU, stage by stage; a stage that fails does not stop the next.
#
#   benchmarks/gpu.sh [--out DIR] [--cache ARCHIVE] [--data FOLDER] [--tiny] [STAGE ...]
#
# Stages (all, without an argument), 21 minutes together at most:
#   tests    the gpu tests, then the others as time allows, 5 minutes         -> DIR/tests.json
#   ops      benchmarks/kernels.py, 5 minutes                                 -> DIR/ops.json
#   e2e      benchmarks/end_to_end.py, 7 minutes                              -> DIR/e2e.json
#   train    benchmarks/train_minutes.py on the images of --data, 4 minutes -> DIR/train.json
#
# --out      folder of the results; default: benchmarks/results
# --cache    one tar archive of at most 16 MiB that carries JAX's compilation cache from run to run
# --data     folder in VOC layout with the splits train and test; without it the train stage fails
# --tiny     sizes that tell nothing about speed, in a minute on a CPU: to try the script
# PYTHON     the interpreter; default: python
# PYTEST_ADDOPTS reaches pytest as always.
#
# Exits with 1 when a stage failed, with 2 when an argument is wrong.
set -uo pipefail

STAGES=(tests ops e2e train)
# Seconds. No stage takes more, whatever hangs in it.
declare -A LIMIT=([tests]=300 [ops]=300 [e2e]=420 [train]=240)
CACHE_LIMIT=$((16 * 1024 * 1024))

usage() {
    echo "usage: benchmarks/gpu.sh [--out DIR] [--cache ARCHIVE] [--data FOLDER] [--tiny] [STAGE ...]; stages: ${STAGES[*]}" >&2
    exit 2
}

root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python}
out=$root/benchmarks/results
archive= data= tiny=
chosen=()
while (($#)); do
    case $1 in
    --out | --cache | --data)
        [[ -n ${2:-} ]] || usage
        # Taken from where the caller stands, before we go to the root.
        path=$(realpath -m "$2")
        case $1 in --out) out=$path ;; --cache) archive=$path ;; --data) data=$path ;; esac
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

# The tests once, and what came of them as JSON: those that need a GPU first. SIGINT lets pytest write its report
# when time is up.
stage_tests() {
    local start=$SECONDS status=0 cut=False selection left code
    rm -f "$out/tests.log"
    for selection in "gpu and not slow" "not gpu and not slow and not aot"; do
        left=$((LIMIT[tests] - 20 - (SECONDS - start)))
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
    timeout --kill-after=10 "${LIMIT[$1]}" "$python" "benchmarks/$2" --out "$out/$1.json" "${@:3}"
}

stage_ops() { benchmark ops kernels.py --minutes 4.6 ${tiny:+--tiny --no_compile}; }

stage_e2e() { benchmark e2e end_to_end.py --minutes 6.6 ${tiny:+--tiny --no_compile}; }

stage_train() {
    [[ -n $data ]] || {
        echo "the train stage needs --data FOLDER" >&2
        return 1
    }
    # What is not training is compilation and evaluation.
    benchmark train train_minutes.py --data "$data" --minutes "$([[ $tiny ]] && echo 0.1 || echo 1.2)"
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
