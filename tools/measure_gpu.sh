#!/usr/bin/env bash
# Correctness first, then figures, on one GPU, with random weights in a true shape:
#
#   tools/measure_gpu.sh right    the GPU's tests, then where an engine's time goes       (about 9 minutes on an H200)
#   tools/measure_gpu.sh suite    start-up, and every case of `qvl bench serve suite`     (about 8 minutes)
#   tools/measure_gpu.sh knobs    the bound on prompts beside answers, and fp8            (about 6 minutes)
#
# SHAPE=7b (or 2b) is the model, or MODEL a folder; OUT a folder for logs and full outputs; PYTHON the interpreter.
set -uo pipefail
cd "$(dirname "$0")/.."
part=${1:?right, suite or knobs}
shape=${SHAPE:-7b}
python=${PYTHON:-python3}
export OUT=${OUT:-$(mktemp -d)} PYTHONUNBUFFERED=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-4} HF_HUB_OFFLINE=1
model=${MODEL:-${TMPDIR:-/tmp}/qvl-shape-$shape}
qvl="$python -m qvl"
server=

# up PORT FLAGS...: a server of the shape; prints the seconds to the first 200 on /ready.
up() {
  local line
  line=$($python tools/time_to_ready.py "$1" "$model" --load-format dummy "${@:2}") || { echo "$line"; return 1; }
  echo "serve ${*:2}: $line"
  server=${line##* }
}

down() {
  [ -n "$server" ] && kill "$server" 2>/dev/null
  server=
  sleep 4
}
trap down EXIT

# The measured lines of a case without the JSON line, which goes to a file.
load() {
  timeout "${3:-60}" $qvl bench serve "$1" --base-url "http://127.0.0.1:$2" >"$OUT/$1-$2.txt" 2>&1
  grep -v '^{' "$OUT/$1-$2.txt" | tail -"${4:-6}"
}

[ -d "$model" ] || $qvl bench shape "$shape" "$model"
nvidia-smi --query-gpu=name,memory.total --format=csv,noheader || echo 'no GPU: figures of a CPU'
git log -1 --format='commit %h' 2>/dev/null || true

case $part in
right)
  timeout 200 $python -m pytest -q -p no:cacheprovider -m gpu tests/engine/test_gpu.py tests/kernels tests/models >"$OUT/tests.txt" 2>&1
  tail -35 "$OUT/tests.txt"
  timeout 200 $qvl bench engine "$model" --load-format dummy --stages --prompt-tokens 531 --picture 1024x1024 --repeats 5 \
    --batches 1,8,64,256 >"$OUT/stages.txt" 2>"$OUT/stages.log"
  grep -iE 'warn|graph|instead' "$OUT/stages.log" | head -12
  cat "$OUT/stages.txt"
  timeout 60 $python tools/profile_steps.py "$model" --batch 1 --picture 1024 >"$OUT/profile-1.txt" 2>&1
  timeout 60 $python tools/profile_steps.py "$model" --batch 256 >"$OUT/profile-256.txt" 2>&1
  tail -50 "$OUT/profile-1.txt"
  tail -30 "$OUT/profile-256.txt"
  ;;
suite)
  up 8000 --max-model-len 16384 --gpu-memory-utilization 0.9 || exit 1 # kernels are compiled here on a fresh machine
  load suite 8000 400 40
  grep -iE 'warn|graph|KV|ready' "$OUT/serve-8000.log" | head -12
  down
  up 8001 --max-model-len 16384 || exit 1 # compiled before
  ;;
knobs)
  port=8002
  for flags in '--max-num-mixed-tokens 512' '--max-num-mixed-tokens 1024' '--max-num-mixed-tokens 2048' '--quantization fp8'; do
    port=$((port + 1))
    # shellcheck disable=SC2086  # flags are words
    up $port $flags || continue
    [[ $flags == *fp8 ]] || load image-throughput $port
    load text-throughput $port
    down
  done
  ;;
*)
  echo "unknown part: $part" >&2
  exit 2
  ;;
esac
