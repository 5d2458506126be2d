#!/usr/bin/env bash
# Measure on a bare machine with a GPU, torch and transformers, in one go:
#
#   benchmarks/run_gpu.sh throughput=240 cold_start=200         # scenario=seconds, most important first
#   TINY=1 benchmarks/run_gpu.sh throughput=60                  # the embedded model: does the script work?
#   benchmarks/run_gpu.sh tests=200 throughput=200             # the GPU tests first, each outcome as it comes
#
# WHEELS: folder of wheels to install (default .whl; none is fine when everything is installed already).
# DATA: local disk for the synthetic checkpoint and the caches. OUT: where results and the log go.
# TRANSFORMER: fp32 (as published) or bf16. SCALE: full or tiny. EXTRA: more options for `python -m benchmarks.run`.
set -u
cd "$(dirname "$0")/.." || exit 1
OUT=${OUT:-benchmarks/results}
WHEELS=${WHEELS:-.whl}
DATA=${DATA:-/var/tmp/zimage_bench}
TRANSFORMER=${TRANSFORMER:-fp32}
SCALE=${SCALE:-full}
PYTHON=${PYTHON:-python3}
MODEL=$DATA/turbo_${SCALE}_$TRANSFORMER
mkdir -p "$OUT" "$DATA"
began=$SECONDS
say() { echo "[$((SECONDS - began)) s] $*"; }

if ls "$WHEELS"/*.whl >/dev/null 2>&1; then
  $PYTHON -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$DATA/site" "$WHEELS"/*.whl || exit 1
  $PYTHON -m compileall -q -j 0 "$DATA/site" >/dev/null 2>&1
  export PYTHONPATH=$DATA/site${PYTHONPATH:+:$PYTHONPATH}
  say "wheels installed"
fi
$PYTHON -m compileall -q zimage_runner benchmarks
export ZIMAGE_RUNNER_CACHE=$DATA/cache HF_HUB_OFFLINE=1
df -h "$DATA" | tail -1
# Library files into the page cache, so that the first contestant does not pay for all.
$PYTHON -c "from diffusers import ZImagePipeline; import transformers.models.qwen3.modeling_qwen3, PIL.Image" 2>/dev/null
say "libraries read once"

options=(--results "$OUT" --machine "$DATA/machine.json")
if [ "${TINY:-}" ]; then
  options+=(--tiny)
else
  if [ ! -d "$MODEL" ]; then
    $PYTHON benchmarks/synthetic_checkpoint.py "$MODEL" --scale "$SCALE" --transformer "$TRANSFORMER" || exit 1
    say "synthetic checkpoint written"
  fi
  options+=(--model "$MODEL")
  # First use of a checkpoint computes its digests and makes the prepared copy; both are done once per download.
  $PYTHON -m zimage_runner model=local model.path="$MODEL" prompt=first dry_run=true >/dev/null && say "digests checked"
  if [ -f zimage_runner/prepare.py ]; then
    $PYTHON -m zimage_runner.prepare model=local model.path="$MODEL" && say "prepared"
  fi
fi
[ "$SCALE" = tiny ] && options+=(--size 128)
for argument in "$@"; do
  scenario=${argument%%=*}
  seconds=${argument#*=}
  [ "$seconds" = "$argument" ] && seconds=300
  if [ "$scenario" = tests ]; then
    timeout "$seconds" $PYTHON -m pytest -m gpu -v --tb=short --durations=10 -p no:cacheprovider \
      2>&1 | tee "$OUT/gpu_tests.txt" | tail -n 60
    timeout "$seconds" $PYTHON -m pytest -p no:cacheprovider tests/engines/native/test_kernels.py 2>&1 | tail -n 20
    say "tests done"
    continue
  fi
  # shellcheck disable=SC2086
  $PYTHON -m benchmarks.run "$scenario" --seconds "$seconds" "${options[@]}" ${EXTRA:-} 2>&1 | tee -a "$OUT/log.txt"
  say "$scenario done"
done
