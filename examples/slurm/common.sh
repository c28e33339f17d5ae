# shellcheck shell=bash disable=SC2034
# What the scripts in this directory share. They set REPO before they source it.

REPO=$(cd "$REPO" && pwd)

say() { echo "[$(date +%FT%T)] $*"; }

die() {
    say "$*" >&2
    exit 2
}

# How a step runs Python: sets PYTHON, and the options of srun in the array container.
#   choose_python DIRECTORY...   what a container must see beside this directory and the repository
choose_python() {
    container=()
    if [[ -n ${CONTAINER_IMAGE:-} ]]; then
        PYTHON=${PYTHON:-python3}
        local mounts=$PWD:$PWD directory
        for directory in "$REPO" "$@"; do
            [[ $directory/ == "$PWD"/* ]] || mounts+=,$directory:$directory
        done
        container=(
            --container-image="$CONTAINER_IMAGE"
            --container-mounts="$mounts${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}"
            --container-workdir="$PWD"
        )
    elif [[ -z ${PYTHON:-} ]]; then
        PYTHON=python3
        [[ -x $REPO/.venv/bin/python ]] && PYTHON=$REPO/.venv/bin/python
    fi
    export PYTHON
    # srun does not take over sbatch's --cpus-per-task by itself.
    [[ -z ${SLURM_CPUS_PER_TASK:-} ]] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
    # Text appears in the logs when it is written.
    export PYTHONUNBUFFERED=1
}
