#!/usr/bin/env bash
# Fine-tunes and aligns the quickstart's model on questions about this Python's standard library.
#   bash examples/adapt_tiny/run.sh
# PYTHON is the interpreter, by default .venv/bin/python if it exists. What an interrupted demo has made is
# kept when it is started again; remove runs/adapt_tiny to start over.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

if [[ -z ${PYTHON:-} ]]; then
    PYTHON=python3
    [[ -x .venv/bin/python ]] && PYTHON=.venv/bin/python
fi
export PYTHON
# One compute thread per rank, because two ranks share the cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
base=runs/quickstart/run
work=runs/adapt_tiny
data=$work/data

step() { printf '\n== %s\n' "$*"; }
ranks() { "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node 2 "$@"; }
# Trains with a recipe, from what it names, or on from where it stopped.
train() {
    local tool=$1 name=$2 flags=(--config "examples/adapt_tiny/$2.yaml")
    [[ ! -f $work/$name/latest_checkpointed_iteration.txt ]] || flags+=(--load "$work/$name")
    ranks "tools/$tool.py" "${flags[@]}"
}
# Answers the held-out questions, and scores both answers of the held-out pairs, on a core each.
ask() {
    local name=$1 run=$2 answering=
    if [[ ! -f $work/answers_$name.jsonl ]]; then
        "$PYTHON" tools/generate.py --load "$run" --template olmoe --greedy --max-new-tokens 48 \
            --input "$data/questions.jsonl" --output "$work/answers_$name.jsonl" --batch-size 60 &
        answering=$!
    fi
    if [[ ! -f $work/scored_$name.jsonl ]]; then
        "$PYTHON" tools/score.py --load "$run" --input "$data/held_out_tokens.jsonl" \
            --output "$work/scored_$name.jsonl"
    fi
    [[ -z $answering ]] || wait "$answering"
}

if [[ ! -f $base/latest_checkpointed_iteration.txt ]]; then
    step "the quickstart's model, which takes minutes"
    bash examples/quickstart/run.sh
fi
mkdir -p "$work"

step "questions with better and worse answers, from docstrings and signatures"
[[ -f $data/questions.jsonl ]] || "$PYTHON" examples/adapt_tiny/make_pairs.py "$data"
tokenizer=$(find "$base" -name tokenizer.model | sort | tail -n 1)
[[ -f $data/held_out_tokens.jsonl ]] || "$PYTHON" examples/adapt_tiny/held_out.py lines \
    "$data/pairs_held_out.jsonl" "$tokenizer" "$data/held_out_tokens.jsonl"

step "before: the quickstart's model"
ask base "$base"

step "fine-tuning: 2 ranks, expert parallel 2"
train finetune sft
ask sft "$work/sft"

step "alignment: DPO, from the fine-tuned model"
train align dpo
ask dpo "$work/dpo"

step "alignment: KTO, from the fine-tuned model"
train align kto
ask kto "$work/kto"

step "reports"
for name in sft dpo kto; do
    "$PYTHON" tools/report.py --run "$work/$name"
done

step "before and after, on questions and pairs that no model was trained on"
{
    "$PYTHON" examples/adapt_tiny/held_out.py answers "base=$work/answers_base.jsonl" \
        "sft=$work/answers_sft.jsonl" "dpo=$work/answers_dpo.jsonl" "kto=$work/answers_kto.jsonl"
    echo
    "$PYTHON" examples/adapt_tiny/held_out.py accuracy 0.1 "sft=$work/scored_sft.jsonl" \
        "base=$work/scored_base.jsonl" "dpo=$work/scored_dpo.jsonl" "kto=$work/scored_kto.jsonl"
} | tee "$work/samples.txt"

step "export: transformers chats with it, as this code does"
[[ -d $work/hf ]] || "$PYTHON" tools/convert_checkpoint.py export --load "$work/dpo" --hf "$work/hf"
"$PYTHON" examples/adapt_tiny/chat.py "$work/hf" "$work/answers_dpo.jsonl"
