#!/usr/bin/env bash
# What could not be measured without a GPU: one command, no network, no extras; 10 minutes, of which LIMIT says how many.
#
#     bash benchmarks/gpu.sh [--small] [part ...]
#
# --small (or SMALL=1) runs every part whole on the CPU, on small sizes: the test of this script.
# Each part has a time limit of its own, and the whole has one: LIMIT seconds; SCALE multiplies both.
# Rows come to $GPU_OUT (gpu_out) as they are made: report.txt to read, rows.jsonl and kernels.csv to keep, errors.txt,
# and pytest's logs. The exit status is 0 if all parts that ran are right. GPU_FAULT=part plants a fault for that part.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

PYTHON="${PYTHON:-python3}"
export GPU_OUT="${GPU_OUT:-$PWD/gpu_out}" GPU_SMALL="${SMALL:-0}"
if [ "${1:-}" = "--small" ]; then GPU_SMALL=1; shift; fi
WANTED=" $* "
SCALE="${SCALE:-1}"
LIMIT=$((${LIMIT:-600} * SCALE))
BEGAN=$(date +%s)
FAILED=""
mkdir -p "$GPU_OUT"

export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 CUDA_MODULE_LOADING=LAZY
unset TRITON_INTERPRET LIGHTNING_EFF_KERNELS
if [ "$GPU_SMALL" = 1 ]; then
  export CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1
elif ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "torch finds no GPU here; --small runs every part on the CPU" >&2
  exit 2
fi

# Plugins by name: others that happen to be installed may warn, and warnings are errors.
export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1
PYTEST=("$PYTHON" -m pytest -q --no-header -rfE --tb=short -p no:cacheprovider)
if "$PYTHON" -c 'import pytest_timeout' 2>/dev/null; then PYTEST+=(-p pytest_timeout); else PYTEST+=(-o timeout=0 -W ignore::pytest.PytestConfigWarning); fi
if [ "$(nproc)" -ge 4 ] && "$PYTHON" -c 'import xdist' 2>/dev/null; then PYTEST+=(-p xdist.plugin -n $(($(nproc) > 16 ? 8 : $(nproc) / 2))); fi
if [ -n "${GPU_FAULT:-}" ]; then PYTEST+=(-p benchmarks.gpu.faults); fi

say() { echo "$*" | tee -a "$GPU_OUT/report.txt"; }

# part NAME SECONDS COMMAND...
part() {
  local name="$1" seconds=$(($2 * SCALE)) left=$((LIMIT - $(date +%s) + BEGAN)) start rc
  shift 2
  if [ -n "${WANTED// /}" ] && [[ "$WANTED" != *" $name "* ]]; then return; fi
  if [ "$left" -lt 8 ]; then say "=== $name: left out, the time is up"; FAILED+=" $name"; return; fi
  if [ "$seconds" -gt "$left" ]; then seconds=$left; fi
  say "=== $name, at $(($(date +%s) - BEGAN)) s, at most $seconds s"
  start=$(date +%s)
  timeout -k 5 "$seconds" "$@" 2> >(tail -n 60 >> "$GPU_OUT/errors.txt") | tee -a "$GPU_OUT/report.txt"
  rc=${PIPESTATUS[0]}
  if [ "$rc" -ne 0 ]; then FAILED+=" $name"; fi
  say "--- $name: $(if [ "$rc" -eq 0 ]; then echo right; elif [ "$rc" -eq 124 ]; then echo out of time; else echo "WRONG ($rc)"; fi), $(($(date +%s) - start)) s"
}

python() { part "$1" "$2" "$PYTHON" -m benchmarks.gpu "$1"; }

# tests NAME SECONDS ARGUMENTS...: the log to a file, what fails and the last line to the report.
tests() {
  local name="$1" seconds="$2" log="$GPU_OUT/$1.txt"
  shift 2
  # shellcheck disable=SC2016
  part "$name" "$seconds" bash -c 'log="$1"; shift; "$@" > "$log" 2>&1; rc=$?; grep -E "^(FAILED|ERROR)" "$log" | cut -c1-250 | head -40; tail -n 1 "$log"; exit $rc' _ "$log" "${PYTEST[@]}" "$@"
}

sanitizer() {
  local tool=()
  if [ "$GPU_SMALL" = 1 ]; then
    export TRITON_INTERPRET=1
  elif command -v compute-sanitizer > /dev/null; then
    tool=(env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 --print-limit 5)
  else
    say "there is no compute-sanitizer here: the kernels run without it"
  fi
  part sanitizer 60 ${tool[@]+"${tool[@]}"} "$PYTHON" -m benchmarks.gpu tiny
  unset TRITON_INTERPRET
}

# In a function, so that all of it has been read before the first part runs.
main() {
  if [ "$GPU_SMALL" = 1 ]; then
    DEVICE=cpu KERNELS=(tests/kernels/test_grad_norm.py tests/kernels/test_tables.py)
    ONE=(-k "ZClip and not skip and single and (resumes or bfloat16 or overflow or waits or hand)")
    SEVERAL=(-k "ZClip and not skip and ranks_agree")
  else
    DEVICE=cuda KERNELS=(tests/kernels tests/training/test_snapshots.py tests/functional/test_fake_gpu.py)
    ONE=(-k "single and not command_line and not refuses and not typed and not touches")
    SEVERAL=(-k "(ranks_agree or resumes) and not single and (Probe or ZClip or GradES or EMA)")
  fi

  # What has not run on one yet comes first.
  python environment 30
  python smoke 75
  tests tests_kernels 100 "${KERNELS[@]}"
  tests suite 110 --device "$DEVICE" tests/suite/test_contract.py "${ONE[@]}"
  tests suite_ranks 80 --device "$DEVICE" tests/suite/test_contract.py "${SEVERAL[@]}"
  python fsdp2 30
  python snapshots 30
  python big 40
  sanitizer
  python compile 60
  python layers 30
  python syncs 75
  python steps 150
  python gloo 60
  python nccl 40
  python zclip 30
  python bench 80

  say "=== $(($(date +%s) - BEGAN)) s in all; $(if [ -z "$FAILED" ]; then echo "all parts are right"; else echo "not right:$FAILED"; fi)"
  [ -z "$FAILED" ]
}

main
