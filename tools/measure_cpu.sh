#!/usr/bin/env bash
# All figures of a CPU in one go, some 12 minutes for the 2B shape: tools/measure_cpu.sh FOLDER [NAME=URL...]
#
# FOLDER is a checkpoint with weights. Servers of peers that already run on the same folder are measured beside ours.
# Every comparison takes turns round by round. $OUT says where the outputs go (else ./cpu-figures).
set -u
cd "$(dirname "$0")/.."
folder=$1
shift
qvl=.venv/bin/qvl
out=${OUT:-cpu-figures}
port=${PORT:-8960}
short="--prompt-tokens 32 --output-tokens 33 --picture none"
few="--prompt-tokens 32 --output-tokens 16 --streams 8 --repeats 1"
mkdir -p "$out"

part() { # NAME COMMAND...: its output goes into a file of that name, and its table is shown
  local name=$1 start=$SECONDS
  shift
  "$@" >"$out/$name.txt" 2>"$out/$name.log" || echo "$name failed, see $out/$name.log"
  echo "== $name ($((SECONDS - start)) s): $*"
  grep -v '^{' "$out/$name.txt"
}

engine() { # NAME FLAGS...
  local name=$1
  shift
  part "$name" "$qvl" bench engine "$folder" --dtype bfloat16 "$@"
}

echo "$(date -u +%FT%TZ), commit $(git rev-parse --short HEAD), $(nproc) cores,$(uptime | sed 's/.*load/ load/')"
for round in 1 2; do # asleep, or spinning as the runtime does by default, on a machine that nothing else uses
  part "wait-asleep-$round" "$qvl" bench engine demo $short --repeats 3
  part "wait-spinning-$round" env GOMP_SPINCOUNT=300000 "$qvl" bench engine demo $short --repeats 3
done
engine limit --against limit --prompt-tokens 96 --output-tokens 16 --repeats 2
if [ $# -gt 0 ]; then
  "$qvl" serve "$folder" --dtype bfloat16 --port "$port" --max-num-seqs 8 --max-model-len 2048 \
    --no-enable-prefix-caching >"$out/serve.log" 2>&1 &
  server=$!
  for _ in $(seq 300); do curl -sf -m 1 -o /dev/null "http://127.0.0.1:$port/ready" && break; sleep 1; done
  part beside "$qvl" bench beside "qvl=http://127.0.0.1:$port" "$@" --input-tokens 32 --output-tokens 16 \
    --picture 224x224 --streams 4 --rounds 2
  kill "$server"
  wait "$server"
fi
engine int8 --quantization int8 --against unquantised $few
engine int4 --quantization int4 --against unquantised $few --picture none
part precision .venv/bin/python tools/measure_precision.py --seconds 60
engine transformers --against transformers --prompt-tokens 24 --output-tokens 12 --repeats 2 --picture none
