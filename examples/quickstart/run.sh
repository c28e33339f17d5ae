#!/usr/bin/env bash
# Builds a corpus, tokenizer and token files, pretrains a model, and prints a report, samples and its accuracy.
#   bash examples/quickstart/run.sh [flags for pretrain.py]
# PYTHON is the interpreter, by default .venv/bin/python if it exists. An interrupted run is resumed;
# remove runs/quickstart to start over.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

if [[ -z ${PYTHON:-} ]]; then
    PYTHON=python3
    [[ -x .venv/bin/python ]] && PYTHON=.venv/bin/python
fi
data=runs/quickstart/data
run=runs/quickstart/run
# One compute thread per rank, because two ranks share the cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

step() { printf '\n== %s\n' "$*"; }

if [[ ! -f $data/docs_text_document.idx ]]; then
    step "corpus: this Python's standard library (code) and its documentation (docs)"
    "$PYTHON" tools/build_corpus.py --output-dir "$data"

    step "tokenizer"
    "$PYTHON" tools/train_tokenizer.py --input "$data/code.jsonl" "$data/docs.jsonl" \
        --output-dir "$data" --vocab-size 4096

    step "token files"
    for domain in code docs; do
        "$PYTHON" tools/preprocess_data.py --input "$data/$domain.jsonl" --json-keys text \
            --output-prefix "$data/$domain" --tokenizer-type SentencePieceTokenizer \
            --tokenizer-model "$data/tokenizer.model" --append-eod --workers 2
    done
fi

items=$data/next_word.jsonl
if [[ ! -f $items ]]; then
    step "questions: which word comes next in documentation that is held back"
    "$PYTHON" examples/quickstart/next_word.py items examples/quickstart/olmoe_tiny.yaml "$items"
fi

step "pretraining: 2 ranks, expert parallel 2"
"$PYTHON" -m torch.distributed.run --standalone --nproc-per-node 2 tools/pretrain.py \
    --config examples/quickstart/olmoe_tiny.yaml --load "$run" --eval-tasks "$items" "$@"

step "report"
"$PYTHON" tools/report.py --run "$run" --require-below-entropy

step "sample"
"$PYTHON" tools/generate.py --load "$run" --max-new-tokens 60 --temperature 0.7 --seed 1 \
    --prompt 'def read_file(path):' --prompt 'Return a new '

step "accuracy: the next word, out of four, in documentation that was held back"
"$PYTHON" examples/quickstart/next_word.py accuracy "$run" "$items"
