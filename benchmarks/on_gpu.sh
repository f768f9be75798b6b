#!/usr/bin/env bash
# What needs a CUDA device, in about eight minutes: its tests, the ratios, a minute of each training.
#   bash benchmarks/on_gpu.sh [FOLDER]     logs, results and the runs' logs go there; PYTHON names another interpreter
# Needs torch, transformers, accelerate, einops, safetensors, scikit-learn, typer, PyYAML and pytest; no notebook tools.
set -u
python=${PYTHON:-python3} out=${1:-runs/on-gpu}
mkdir -p "$out"
export PYTHONPATH=. PYTHONUNBUFFERED=1
say() { printf '\n== %s (%s s)\n' "$*" "$SECONDS"; }

say 'tests'
timeout 150 "$python" -m pytest -q -m cuda -o addopts= tests 2>&1 | tail -n 25

train() { timeout 90 "$python" -m v2flow_nbdev.apps.cli "$@" 2>&1 | tail -n 3; }
say 'a minute of each training'
train pretrain-llm --config configs/digits-text.yaml --out "$out/text"
train train-tokenizer --config configs/digits-tokenizer.yaml --out "$out/tokenizer" "vocabulary=$out/text/model" training.mixed_precision=bf16
train train-llm --config configs/digits-llm.yaml --out "$out/llm" "llm.pretrained=$out/text/model" \
    "image_tokenizer=$out/tokenizer/model" training.mixed_precision=bf16 training.steps=600 training.evaluate_every=0
for run in text tokenizer llm; do tail -n 2 "$out/$run/log.jsonl"; done

for group in training generation resampler step decode compiled; do
    say "ratios: $group"
    timeout 150 "$python" -m benchmarks.bench "$group" 2>&1 | tail -n 20
done
cp benchmarks/results-cuda.json benchmarks/README.md "$out" 2>/dev/null
say 'done'
