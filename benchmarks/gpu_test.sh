#!/usr/bin/env bash
# The tests and all benchmarks in one call on a GPU machine, with its own python3 and torch: no network, nothing installed.
# A stage that fails does not stop the next. Logs and results land in $OUT, a summary comes last. About 8 minutes.
set -uo pipefail
cd "$(dirname "$0")/.."

OUT=${OUT:-$(mktemp -d)}
mkdir -p "$OUT"
export OUT PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1

summary=
failed=0
stage() { # name, limit in seconds, command
  local name=$1 limit=$2 begin=$SECONDS code
  shift 2
  printf '\n==== %s: %s\n' "$name" "$*"
  timeout -k 10 "$limit" "$@" 2>&1 | tee "$OUT/$name.log"
  code=${PIPESTATUS[0]}
  [[ $code == 0 ]] || failed=1
  summary+=$(printf '%-8s  exit %-3d  %3d s' "$name" "$code" $((SECONDS - begin)))$'\n'
}

# Packaging needs an index and the pinned tools; CI covers it. The workers share the one GPU.
tests=(-q --ignore=tests/test_packaging.py -p no:cacheprovider -p no:benchmark)
python3 -c 'import xdist' 2>/dev/null && tests+=(-n "${WORKERS:-6}" --dist loadgroup)

python3 -c '
import torch, triton
gpu = torch.accelerator.current_accelerator()
name = torch.get_device_module(gpu).get_device_name(gpu) if gpu else "no accelerator"
print(f"torch {torch.__version__}, triton {triton.__version__}, {name}")'
stage tests 300 python3 -m pytest "${tests[@]}" tests compile_tests
stage kernels 110 python3 -m benchmarks.kernels --json "$OUT/kernels.json" --save "$OUT"
stage prefill 180 python3 -m benchmarks.prefill --json "$OUT/prefill.json" --save "$OUT"
stage scan 110 python3 -m benchmarks.scan --save "$OUT"
stage delta_rule 110 python3 -m benchmarks.delta_rule --save "$OUT"
if python3 -c 'import flashinfer' 2>/dev/null; then
  stage flashinfer 240 bash -c 'python3 -m benchmarks.flashinfer --compile && python3 -m benchmarks.flashinfer --save "$OUT"'
  stage flashinfer_kda 120 python3 -m benchmarks.flashinfer_kda --anyway --save "$OUT"
fi
stage bench 300 python3 -m mamba_ops bench --output "$OUT" --limit 280
stage host 60 python3 -m benchmarks.host --save "$OUT"
stage boundary 50 python3 -m benchmarks.boundary --save "$OUT"
stage swap 50 python3 -m benchmarks.swap
stage tokens 150 python3 -m benchmarks.tokens --save "$OUT"

printf '\n==== summary, logs in %s\n%s' "$OUT" "$summary"
tail -n 1 "$OUT/tests.log"
exit $failed
