#!/usr/bin/env bash
# Trains the runs of studies.yaml under every seed, resumes them after a stop, and writes the report.
#   bash examples/ablations/run.sh [flags for ablate.py]
# PYTHON is the interpreter, by default .venv/bin/python if it exists; JOBS is how many runs train side
# by side, by default 2. Ctrl-C stops it, the same command goes on; remove runs/ablations to start over.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

if [[ -z ${PYTHON:-} ]]; then
    PYTHON=python3
    [[ -x .venv/bin/python ]] && PYTHON=.venv/bin/python
fi
export PYTHON
data=runs/ablations/data

for file in docs_text_document.idx manuals_text_document.idx code_text_document.idx tasks; do
    if [[ ! -e $data/$file ]]; then
        bash examples/ablations/prepare.sh
        break
    fi
done

exec "$PYTHON" tools/ablate.py examples/ablations/studies.yaml --output runs/ablations/sweep \
    --jobs "${JOBS:-2}" "$@"
