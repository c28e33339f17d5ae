# shellcheck shell=bash disable=SC2034
# Functions that the scripts in this directory share; they set REPO before sourcing it.

REPO=$(cd "$REPO" && pwd)

say() { echo "[$(date +%FT%T)] $*"; }

die() {
    say "$*" >&2
    exit 2
}

# Sets PYTHON, and the container options of srun in the array `container`.
#   choose_python DIRECTORY...   directories to mount besides this one and the repository
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
    # srun does not inherit --cpus-per-task from sbatch.
    [[ -z ${SLURM_CPUS_PER_TASK:-} ]] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
    export PYTHONUNBUFFERED=1
}
