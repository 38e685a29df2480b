#!/usr/bin/env bash
# Everything a bare CUDA machine can tell, in one command and under nine minutes, without a network:
# builds in place, runs the GPU tests and the benchmarks, leaves logs and JSON in $OUT. Goes on past
# failures; the exit code says whether there were any.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-bench/results}
mkdir -p "$out"
failed=0
deadline=$((SECONDS + 520))

# step NAME SECONDS COMMAND...: at most SECONDS, and never past the deadline.
step() {
  local name=$1 limit=$2 left=$((deadline - SECONDS))
  [ "$left" -gt 5 ] || { echo "== $name: no time left"; failed=1; return; }
  [ "$limit" -lt "$left" ] || limit=$left
  echo "== $name"
  timeout "$limit" "${@:3}" 2>&1 | tee "$out/$name.log" | tail -n 40
  local rc=${PIPESTATUS[0]}
  [ "$rc" -eq 0 ] || { echo "== $name failed with $rc"; failed=1; }
}

export PYTHONUNBUFFERED=1  # a step that runs out of time leaves what it printed
python=${PYTHON:-python3}
step machine 30 nvidia-smi
FASTRL_CUDA=on step build 240 "$python" -m pip install --no-deps --no-build-isolation -e .
# Most of the tests' time is compilation, which several processes share.
workers=$("$python" -c "import xdist; print('-n4')" 2>/dev/null)
step test 240 "$python" -m pytest -m gpu -q $workers
# Without torch.compile, which compiles anew in every shape's process.
step bench 200 "$python" -m fastrl.bench logprob scan attention quant --device cuda \
  --against eager,torch,liger,cce,trl,torchao,bitsandbytes --json "$out/bench_gpu.json" --plot "$out/bench_gpu.png"
step bench_layers 60 "$python" -m fastrl.bench layers --device cuda --against eager,liger \
  --json "$out/bench_layers_gpu.json"
step bench_attention 90 "$python" -m fastrl.bench.bench_attention_gpu \
  --json "$out/bench_attention_gpu.json"
step table_logprob 90 "$python" -m fastrl.bench.bench_logprob_gpu --table --rounds 3 \
  --json "$out/table_logprob_gpu.json"
step tiles_logprob 40 "$python" -m fastrl.bench.bench_logprob_gpu --tiles --rounds 3 \
  --json "$out/tiles_logprob_gpu.json"
exit "$failed"
