#!/usr/bin/env bash
# Writes tests and timings on a GPU into a Markdown file: tests/benchmarks/gpu.sh [FILE]
# PYTHON, by default python3, needs what `pip install '.[test]'` installs, and PyTorch with CUDA.
set -uo pipefail
cd "$(dirname "$0")/../.."
file=${1:-gpu.md} python=${PYTHON:-python3} device=${DEVICE:-cuda}
export PYTHONPATH=$PWD TIMM_ELA_DEVICE=$device
bench() { timeout "$1" "$python" tests/benchmarks/bench_models.py --device "$device" "${@:2}" ${BENCH:-} >> "$file"; }

status=0
printf '# timm_ela on %s\n\nTests of layers and models, with this device as their default:\n\n```\n' "$device" > "$file"
timeout 200 "$python" -m pytest -q -p no:cacheprovider tests/layers tests/models/test_graft.py tests/models/test_models.py \
    tests/models/test_elsa_*.py >> "$file" 2>&1 || status=1
printf '```\n\n' >> "$file"
bench 120 --bases resnet50 --ways contiguous channels_last compile || status=1
bench 60 --bases mobilenetv2_100 --ways channels_last || status=1
bench 60 --bases swin_tiny_patch4_window7_224 --ways contiguous || status=1
cat "$file"
exit $status
