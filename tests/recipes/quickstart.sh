#!/usr/bin/env bash
# Runs the quick start in a copy of its files, so that it neither finds nor leaves a run here:
#   bash tests/recipes/quickstart.sh PYTHON [flags for pretrain.py]
set -euo pipefail

python=$1
shift
where=$(mktemp -d)
trap 'rm -rf "$where"' EXIT
cp -r "$(dirname "${BASH_SOURCE[0]}")/../../"{examples,tools} "$where"
PYTHON=$python bash "$where/examples/quickstart/run.sh" "$@"
