#!/usr/bin/env bash
# Requests, shared prefixes and narrow states on this machine's GPU, within four minutes. OUT names the folder for results.
set -uo pipefail
cd "$(dirname "$0")/.."

OUT=${OUT:-$(mktemp -d)}
mkdir -p "$OUT"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1

stage() { # name, limit in seconds, command
  local name=$1 limit=$2 begin=$SECONDS
  shift 2
  printf '\n==== %s: %s\n' "$name" "$*"
  timeout -k 5 "$limit" "$@" 2>&1 | tee "$OUT/$name.log"
  printf '%s: exit %d, %d s\n' "$name" "${PIPESTATUS[0]}" $((SECONDS - begin))
}

stage narrow_states 90 python3 -m benchmarks.narrow_states --steps 128 --json "$OUT/narrow_states.json"
stage prefixes 60 python3 -m benchmarks.prefixes --json "$OUT/prefixes.json"
stage requests 70 python3 -m benchmarks.serving --op requests --json "$OUT/requests.json" --save "$OUT"
