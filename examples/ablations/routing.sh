#!/usr/bin/env bash
# Trains the common recipe for 800 steps with a checkpoint every tenth of the way, and measures what its routers learn.
#   bash examples/ablations/routing.sh [OUTPUT]
# OUTPUT gets the report, by default runs/ablations/routing/report. PYTHON as in run.sh, whose data it needs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

if [[ -z ${PYTHON:-} ]]; then
    PYTHON=python3
    [[ -x .venv/bin/python ]] && PYTHON=.venv/bin/python
fi
export PYTHON OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
data=runs/ablations/data
work=runs/ablations/routing
output=${1:-$work/report}

[[ -d $data/tasks ]] || bash examples/ablations/prepare.sh
"$PYTHON" -m torch.distributed.run --standalone --nproc-per-node 1 tools/pretrain.py \
    --config examples/ablations/olmoe_small.yaml --train-iters 800 --save-interval 80 --save "$work/run" --load "$work/run"
for step in 80 160 240 320 400 480 560 640 720 800; do
    "$PYTHON" tools/analyze_routing.py collect --load "$work/run" --ckpt-step $step \
        --data code="$data/code.jsonl" docs="$data/docs.jsonl" manuals="$data/manuals.jsonl" \
        --tokens-per-domain 32768 \
        --output "$work/step$step"
done
"$PYTHON" tools/analyze_routing.py report --input "$work"/step* --run "$work/run" --output "$output"
