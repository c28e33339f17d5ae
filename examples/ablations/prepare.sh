#!/usr/bin/env bash
# Collects the text of this machine, deduplicates it, and makes tokenizer, token files and questions of it.
#   bash examples/ablations/prepare.sh
# PYTHON is the interpreter, by default .venv/bin/python if it exists. Debian's documentation packages are
# downloaded where apt can; nothing is installed. An interrupted run goes on where it stopped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

if [[ -z ${PYTHON:-} ]]; then
    PYTHON=python3
    [[ -x .venv/bin/python ]] && PYTHON=.venv/bin/python
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
work=runs/ablations/data
packages=(python3.11-doc debian-reference-en git-doc postgresql-doc-15 sqlite3-doc apache2-doc
    debian-policy developers-reference bash-doc)
megabytes=${MEGABYTES:-24}

step() { printf '\n== %s\n' "$*"; }

manuals=$work/manuals
if [[ ! -d $manuals ]]; then
    step "Debian's documentation packages"
    mkdir -p "$manuals.part"
    if command -v apt-get > /dev/null && command -v dpkg-deb > /dev/null; then
        for package in "${packages[@]}"; do
            (cd "$manuals.part" && timeout 120 apt-get download -qq "$package" 2> /dev/null) ||
                { echo "$package is not to be had"; continue; }
            dpkg-deb -x "$manuals.part/$package"_*.deb "$manuals.part"
        done
    fi
    mv "$manuals.part" "$manuals"
fi

if [[ ! -f $work/corpus/manuals.jsonl ]]; then
    step "corpus: what is installed here, up to $megabytes MB a domain"
    "$PYTHON" examples/ablations/texts.py "$work/corpus" --manuals "$manuals" --max-megabytes "$megabytes"
fi

step "deduplication"
"$PYTHON" tools/filter_data.py --input "$work"/corpus/{code,docs,manuals}.jsonl --output "$work/unique" \
    --filter length:min=200 --filter exact --filter minhash --workers 2

tokenizer=$work/tokenizer
if [[ ! -f $tokenizer/tokenizer.model ]]; then
    step "tokenizer"
    "$PYTHON" tools/train_tokenizer.py --input "$work"/unique/kept/{code,docs,manuals}.jsonl \
        --output-dir "$tokenizer" --vocab-size 2048
fi

step "token files"
for domain in code docs manuals; do
    ln -f "$work/unique/kept/$domain.jsonl" "$work/$domain.jsonl"
    [[ -f $work/${domain}_text_document.idx ]] ||
        "$PYTHON" tools/preprocess_data.py --input "$work/$domain.jsonl" --json-keys text \
            --output-prefix "$work/$domain" --tokenizer-type SentencePieceTokenizer \
            --tokenizer-model "$tokenizer/tokenizer.model" --append-eod --workers 2
done

step "questions: which word comes next in documents that are held back"
mkdir -p "$work/tasks"
for domain in docs manuals; do
    [[ -f $work/tasks/next_word_$domain.jsonl ]] ||
        "$PYTHON" examples/quickstart/next_word.py items examples/ablations/olmoe_small.yaml \
            "$work/tasks/next_word_$domain.jsonl" "$domain"
done
