#!/usr/bin/env bash
# Makes token files of OLMoE-Mix's recipe at toy scale from the text of this machine, and trains on them.
#   bash examples/data_demo/run.sh
# PYTHON is the interpreter, by default .venv/bin/python if it exists. An interrupted demo goes on where
# it stopped; remove runs/data_demo to start over.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

if [[ -z ${PYTHON:-} ]]; then
    PYTHON=python3
    [[ -x .venv/bin/python ]] && PYTHON=.venv/bin/python
fi
export PYTHON OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
work=runs/data_demo
data=$work/olmoe-mix
tokenizer=$work/tokenizer/tokenizer.json

step() { printf '\n== %s\n' "$*"; }

if [[ ! -f $tokenizer ]]; then
    step "corpus: the standard library, its documentation, and manuals of installed packages"
    "$PYTHON" tools/build_corpus.py --output-dir "$work/corpus" --max-megabytes 3
    "$PYTHON" examples/data_demo/manuals.py "$work/corpus"
    step "tokenizer"
    "$PYTHON" tools/train_tokenizer.py --input "$work/corpus/code.jsonl" "$work/corpus/docs.jsonl" \
        --output-dir "$work/tokenizer" --vocab-size 4096 --tokenizer-type HFTokenizer
fi

step "deduplication and decontamination of all text"
"$PYTHON" tools/filter_data.py --input "$work"/corpus/{code,docs,manuals}.jsonl --output "$work/unique" \
    --filter length:min=50 --filter exact --filter minhash \
    --filter "decontaminate:against=$work/corpus/evaluation/questions.jsonl" --workers 2

step "OLMoE-Mix's recipe: filters and token files for each source"
"$PYTHON" examples/data_demo/toy_sources.py "$work/unique" "$data"
WORKERS=2 bash examples/slurm/prepare_sources.sh examples/olmoe_mix "$data" "$tokenizer"

step "report on the token files, and on the code before and after its filters"
tokens=()
while IFS=$'\t' read -r name _; do
    [[ $name == \#* ]] || tokens+=("$data/${name}_text_document")
done < examples/olmoe_mix/sources.tsv
"$PYTHON" tools/report_data.py --token-file "${tokens[@]}" --input "$work/corpus/code.jsonl" \
    "$work/unique/kept/code.jsonl" --tokenizer-type HFTokenizer --tokenizer-model "$tokenizer" \
    --output "$work/report"

step "training on the mixture, a few steps"
blend=()
while IFS=$'\t' read -r name _ _ _ _ _ share; do
    [[ $name == \#* ]] || blend+=("$share" "$data/${name}_text_document")
done < examples/olmoe_mix/sources.tsv
echo "--data-path ${blend[*]}"
"$PYTHON" -m torch.distributed.run --standalone --nproc-per-node 2 tools/pretrain.py \
    --config examples/quickstart/olmoe_tiny.yaml --tokenizer-type HFTokenizer \
    --tokenizer-model "$tokenizer" --data-path "${blend[@]}" --split 1,0 --mask-repetitions \
    --seq-length 128 --train-iters 6 --log-interval 1 --lr-warmup-fraction None --lr-warmup-iters 2 \
    --save "$work/run" --load "$work/run"
