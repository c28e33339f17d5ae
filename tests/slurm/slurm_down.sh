#!/usr/bin/env bash
# Stops what slurm_up.sh started in DIR: first the jobs, then the daemons by their pid files.
#   slurm_down.sh DIR
set -uo pipefail

dir=$1
export SLURM_CONF=$dir/slurm.conf

running() { squeue --noheader --states=RUNNING,COMPLETING,SUSPENDED 2> /dev/null | grep -q .; }

# Jobs first: without slurmd their processes would keep running.
timeout 10 scancel --full --signal=KILL --user="$(id -un)" 2> /dev/null
timeout 10 scancel --user="$(id -un)" 2> /dev/null
for _ in {1..80}; do
    running || break
    sleep 0.1
done

end() {
    local pids=("$@") pid alive
    kill "${pids[@]}" 2> /dev/null
    for _ in {1..100}; do
        alive=0
        for pid in "${pids[@]}"; do kill -0 "$pid" 2> /dev/null && alive=1; done
        [[ $alive == 0 ]] && return
        sleep 0.1
    done
    kill -KILL "${pids[@]}" 2> /dev/null
}

for file in "$dir"/run/slurmd.*.pid "$dir"/run/slurmctld.pid "$dir"/run/munged.pid; do
    [[ -f $file ]] && pids+=("$(< "$file")")
done
[[ -n ${pids[*]:-} ]] && end "${pids[@]}"
exit 0
