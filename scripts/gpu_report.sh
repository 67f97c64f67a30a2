#!/usr/bin/env bash
# What can be measured on one GPU of 80 GB, without a network: JSON files and a trace in OUT, and the
# gpu tests. Each part takes a few minutes; compiling takes most of them.
#
#     bash scripts/gpu_report.sh OUT [checks] [eager] [compiled] [small] [sampling]      default: all
#
# A part that fails is named, and the others go on. Tables: scripts/benchmark.py --compare A.json B.json
# The Python is that of .venv, or without one that of the PATH: nothing is installed.
set -uo pipefail
out=$(mkdir -p "${1:?name a folder for the results}" && cd "$1" && pwd) || exit 2
shift
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
[ ! -e .venv/bin/activate ] || source .venv/bin/activate
if [ -n "$(ls -A "$out")" ] && [ ! -e "$out/.gpu_report" ]; then # text files are written over
    echo "$out holds other files: name a new folder" >&2
    exit 2
fi
touch "$out/.gpu_report" || exit 2
export HF_HUB_OFFLINE=1
parts=${*:-checks eager compiled small sampling}
xl="repae-sdvae-xl2 repae-invae-xl1"
for part in $parts; do # before any of them takes its minutes
    [[ " checks eager compiled small sampling " = *" $part "* ]] || { echo "unknown part: $part" >&2; exit 2; }
done

measure() { # NAME CONFIG FLAGS...: one result, and what is printed beside it
    local name=$1 config=$2
    shift 2
    python3 scripts/benchmark.py --config "configs/$config.yaml" --json "$out/$name.json" "$@" \
        2>&1 | tee "$out/$name.txt" || echo "FAILED: $name"
}

for part in $parts; do
    case $part in
    checks)
        python3 -m pytest -q -m gpu tests 2>&1 | tee "$out/checks.txt" || echo "FAILED: checks"
        ;;
    eager) # as published (NCHW), then as this code does it by default
        for name in $xl; do
            measure "$name-nchw" "imagenet256/$name" run.batch_size=32 run.channels_last=false
            measure "$name" "imagenet256/$name" run.batch_size=32 --trace "$out/$name.trace.json"
        done
        ;;
    compiled)
        for name in $xl; do
            measure "$name-compiled" "imagenet256/$name" run.batch_size=32 run.compile=true
        done
        ;;
    small) # where launches, not arithmetic, may bind
        for mode in default reduce-overhead; do
            measure "b2-$mode" ablations/repae-sdvae-b2 run.batch_size=32 run.compile=true \
                run.compile_mode=$mode
        done
        ;;
    sampling) # in TF32 as published, then in bf16 and compiled
        steps="--sample --solver-steps 50"
        name=imagenet256/repae-sdvae-xl2
        measure sampling-tf32 $name $steps --precision fp32 --tf32
        measure sampling $name $steps --compile
        ;;
    esac
done
