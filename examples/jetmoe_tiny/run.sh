#!/usr/bin/env bash
# Trains a small JetMoE: the quickstart's data, a run of two phases, a branch of it, reports.
#   bash examples/jetmoe_tiny/run.sh
# PYTHON names the interpreter, .venv/bin/python if there is one. An interrupted run is resumed;
# remove runs/jetmoe_tiny to start over.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

if [[ -z ${PYTHON:-} ]]; then
    PYTHON=python3
    [[ -x .venv/bin/python ]] && PYTHON=.venv/bin/python
fi
data=runs/quickstart/data
# One compute thread per rank: two ranks share this machine's cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

step() { printf '\n== %s\n' "$*"; }
pretrain() {
    "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node 2 tools/pretrain.py "$@"
}

if [[ ! -f $data/docs_text_document.idx ]]; then
    step "corpus, tokenizer and token files, as in examples/quickstart"
    "$PYTHON" tools/build_corpus.py --output-dir "$data"
    "$PYTHON" tools/train_tokenizer.py --input "$data/code.jsonl" "$data/docs.jsonl" \
        --output-dir "$data" --vocab-size 4096
    for domain in code docs; do
        "$PYTHON" tools/preprocess_data.py --input "$data/$domain.jsonl" --json-keys text \
            --output-prefix "$data/$domain" --tokenizer-type SentencePieceTokenizer \
            --tokenizer-model "$data/tokenizer.model" --append-eod --workers 2
    done
fi

step "two phases: mostly code at the peak, mostly documentation in the decay"
pretrain --config examples/jetmoe_tiny/jetmoe_tiny.yaml --load runs/jetmoe_tiny/run

step "a branch: from iteration 80 on a line to 0, on documentation"
pretrain --config examples/jetmoe_tiny/anneal.yaml

for run in run anneal; do
    step "report: $run"
    "$PYTHON" tools/report.py --run "runs/jetmoe_tiny/$run"
done
