#!/usr/bin/env bash
# Filters and tokenizes the sources of a data recipe: here, or as SLURM arrays that wait for each other.
# Run it from the repository's root, at the prompt:
#
#   bash examples/slurm/prepare_sources.sh RECIPE DATA TOKENIZER [NAME...]
#
# RECIPE is a directory with sources.tsv and filters/, such as examples/olmoe_mix. DATA/raw/NAME holds a
# source's files. Kept documents go to DATA/filtered/NAME/kept, token files to DATA/NAME_text_document.
# Started again, it does what is missing, and refuses token files that are not this recipe's. Variables,
# all optional:
#
#   EXECUTOR   local (default) or slurm
#   WORKERS    processes of this machine (1), or array tasks at the same time
#   SHARDS     parts in which a source is tokenized on SLURM (16)
#   OPTIONS    options of sbatch for tokenizing: --partition=cpu --time=12:00:00 --cpus-per-task=16
#   SLURM_FLAGS  the same for filtering, as the command takes them: --slurm partition=cpu
set -euo pipefail

export REPO=${REPO:-$PWD}
# shellcheck source=examples/slurm/common.sh
source "$REPO/examples/slurm/common.sh" || {
    echo "$REPO is not the repository: run this there, or set REPO" >&2
    exit 2
}
[[ $# -ge 3 && -f $1/sources.tsv ]] || die "usage: prepare_sources.sh RECIPE DATA TOKENIZER [NAME...]"
[[ -e $3 ]] || die "there is no tokenizer $3"
recipe=$1 data=$2 tokenizer=$3
shift 3
choose_python "$data"
read -ra options <<< "${OPTIONS:-}"
read -ra filter_options <<< "${SLURM_FLAGS:-}"

prepare() {
    local name=$1 text_key=$2 filters=$recipe/filters/$3.yaml
    local filtered=$data/filtered/$name prefix=$data/$name kind
    kind=$(sed -n 's/^tokenizer_type: //p' "$filters")
    local filter=("$PYTHON" "$REPO/tools/filter_data.py" --recipe "$filters" --input "$data/raw/$name"
        --output "$filtered" --text-key "$text_key" --tokenizer-model "$tokenizer"
        --max-bad-lines "${MAX_BAD_LINES:-100}")
    local tokenize=("$PYTHON" "$REPO/tools/preprocess_data.py" --input "$filtered/kept"
        --output-prefix "$prefix" --json-keys "$text_key" --output-key text --append-eod
        --tokenizer-type "$kind" --tokenizer-model "$tokenizer")
    local made=${prefix}_text_document queued
    queued=$(queued_jobs)
    if [[ -n $queued ]]; then
        say "$name: being made by jobs $queued"
        return
    fi
    if [[ -e $made.idx && ! -e $filtered/summary.json ]]; then
        die "$made is there, but $filtered, which it must be made of, is not finished: remove one, or name other sources"
    fi
    if [[ ${EXECUTOR:-local} == local ]]; then
        say "$name: filter"
        "${filter[@]}" --workers "${WORKERS:-1}"
        if ! is_finished; then
            say "$name: tokenize"
            "${tokenize[@]}" --workers "${WORKERS:-1}"
        fi
    else
        submit
    fi
}

# Whether the token files are there and are what this recipe makes; ends the script where others are.
is_finished() {
    local shown
    # A killed start leaves the folder .part; the next one goes on from it.
    [[ -e $made.idx && ! -d $made.part ]] || return 1
    shown=$("${tokenize[@]}" --check) || die "$shown; move or remove $made.bin, .idx and .json, or name another DATA"
    say "$name: $made is there"
}

# The jobs of an earlier start that SLURM still has.
queued_jobs() {
    [[ -s $data/logs/$name.jobs ]] || return 0
    squeue --noheader --format=%i --jobs="$(paste -sd, "$data/logs/$name.jobs")" 2> /dev/null | paste -sd' ' || true
}

submit() {
    local shown job shards=${SHARDS:-16} last=() kept
    local merge=("$PYTHON" "$REPO/tools/preprocess_data.py" --output-prefix "$prefix" --json-keys "$text_key"
        --output-key text --merge)
    [[ $shards -ge 2 ]] || die "SHARDS is $shards; it must be at least 2"
    shown=$("${filter[@]}" --executor slurm ${WORKERS:+--workers "$WORKERS"} "${filter_options[@]}")
    echo "$shown"
    kept=$(sed -n 's/^summary: job \([0-9]*\)$/\1/p' <<< "$shown")
    if [[ -n $kept ]]; then
        last=(--dependency="afterok:$kept" --kill-on-invalid-dep=yes)
    elif is_finished; then
        return
    fi
    mkdir -p "$data/logs"
    job=$(sbatch --parsable --job-name="tokenize-$name" --array="0-$((shards - 1))" \
        --output="$data/logs/tokenize-$name-%a.log" "${last[@]}" "${options[@]}" \
        <<< $'#!/bin/bash\n'"exec ${tokenize[*]@Q} --num-shards $shards --workers \${SLURM_CPUS_PER_TASK:-1} \
            --shard-index \$SLURM_ARRAY_TASK_ID")
    job=${job%%;*}
    echo "$job" > "$data/logs/$name.jobs"
    say "$name: tokenize in $shards parts: job $job"
    job=$(sbatch --parsable --job-name="merge-$name" --output="$data/logs/merge-$name.log" \
        --dependency="afterok:$job" --kill-on-invalid-dep=yes "${options[@]}" \
        <<< $'#!/bin/bash\n'"exec ${merge[*]@Q} --num-shards $shards")
    job=${job%%;*}
    echo "$job" >> "$data/logs/$name.jobs"
    say "$name: merge: job $job"
}

while IFS=$'\t' read -r name _ _ text_key filters _; do
    [[ $name != \#* ]] || continue
    [[ $# -eq 0 || " $* " == *" $name "* ]] || continue
    [[ -e $data/raw/$name ]] || die "$data/raw/$name does not exist; bring the source there"
    prepare "$name" "$text_key" "$filters"
done < "$recipe/sources.tsv"
