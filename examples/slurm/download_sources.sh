#!/usr/bin/env bash
# Fetches the sources of a data recipe from the Hugging Face Hub, on a machine that reaches it.
#
#   HF_HOME=/scratch/hf bash examples/slurm/download_sources.sh RECIPE DATA [NAME...]
#
# RECIPE is a directory with sources.tsv, such as examples/olmoe_mix. Files go to DATA/hub/OWNER/NAME as
# plain files; DATA/raw/SOURCE links to those that are texts as they are (layout as-is). Started again, it fetches what is missing. Without
# NAMEs all sources are fetched. Some need `hf auth login` and accepted terms first: README.md says which.
set -euo pipefail

[[ $# -ge 2 && -f $1/sources.tsv ]] || {
    echo "usage: download_sources.sh RECIPE DATA [NAME...]; RECIPE must hold sources.tsv" >&2
    exit 2
}
recipe=$1 data=$2
shift 2
while IFS=$'\t' read -r name ids files _ _ layout _; do
    [[ $name != \#* ]] || continue
    [[ $# -eq 0 || " $* " == *" $name "* ]] || continue
    for id in ${ids//,/ }; do
        echo "$name: $id"
        hf download --repo-type dataset "$id" --include "$files" --local-dir "$data/hub/$id"
        [[ $layout != as-is ]] || {
            folder=$id
            [[ $files != */* ]] || folder=$id/${files%/*}
            mkdir -p "$data/raw"
            ln -sfn "../hub/$folder" "$data/raw/$name"
        }
    done
done < "$recipe/sources.tsv"
