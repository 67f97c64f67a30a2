#!/usr/bin/env bash
# REPA-E in minutes on two CPU cores: train a VAE and a SiT together on real digits, sample, evaluate.
# Everything lands in exps/quickstart/. Run it again: a killed run continues, a finished one is moved aside.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" requirements.txt
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
export OMP_WAIT_POLICY=passive # threads that spin while they wait crawl on a shared machine
out=exps/quickstart
if [ -e $out/summary.json ]; then
    kept=$out-$(date +%Y%m%d-%H%M%S)
    mv $out "$kept" && echo "the finished run is kept as $kept"
fi
mkdir -p $out
[ -e $out/started ] || date +%s >$out/started

echo "1/5  a frozen encoder to align with, and another network to judge the samples"
# side by side, on one thread each: two threads gain little in networks as small as these
judge=
trap '[ -z "$judge" ] || kill $judge 2>/dev/null || true' EXIT # also where this script ends early
if [ ! -e $out/judge.safetensors ]; then
    OMP_NUM_THREADS=1 python scripts/train_classifier.py \
        --network test_byobnet --size 16 --steps 300 --seed 1 --out $out/judge.safetensors &
    judge=$!
fi
[ -e $out/encoder.safetensors ] || OMP_NUM_THREADS=1 python scripts/train_classifier.py \
    --network test_resnet --size 32 --steps 200 --seed 0 --out $out/encoder.safetensors
[ -z "$judge" ] || wait $judge
judge=
echo "2/5  joint training of VAE and SiT"
python train_repae.py --config configs/quickstart.yaml
checkpoint=$(ls -d $out/checkpoints/[0-9]* | tail -1)
echo "3/5  1,000 digits from $checkpoint"
python sample_ddp.py --checkpoint "$checkpoint" --out $out/samples.npz --num-samples 1000 \
    --class-balanced --solver ode-ab2 --steps 12 --cfg-scale 2.5 --precision fp32 --batch-size 100
echo "4/5  evaluation"
python evaluate_fid.py --samples $out/samples.npz --reference digits:train@16 \
    --features timm:test_byobnet@$out/judge.safetensors --metrics fid,precision,recall \
    --out $out/evaluation.json
echo "5/5  pictures and summary"
python scripts/quickstart_report.py --run $out
