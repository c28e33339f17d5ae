#!/usr/bin/env bash
# Entry point of the image.
#   NAME [ARGUMENTS]      runs a tool of tools/: pretrain, report, generate, ...
#   COMMAND [ARGUMENTS]   runs any other program: torchrun, python, bash, ...
#   help                  lists the tools
# It sets no variable, keeps the working directory and execs the program, which so gets the signals and
# sets the exit status of the container. It uses bash, because NVIDIA's images set up their libraries
# for the driver in BASH_ENV.
set -euo pipefail

tools=$(cd "$(dirname "${BASH_SOURCE[0]}")/../tools" && pwd)

is_tool() { [[ $1 =~ ^[a-z_]+$ && -f $tools/$1.py ]]; }

list_tools() {
    local file name
    for file in "$tools"/*.py; do
        name=$(basename "$file" .py)
        if is_tool "$name"; then printf '  %s\n' "$name"; fi
    done
}

usage() {
    printf 'usage: [NAME | COMMAND] [ARGUMENTS]\nNAME is a tool; NAME --help explains it:\n'
    list_tools
    printf 'COMMAND is any other program, for example:\n'
    printf '  torchrun --nproc-per-node 8 %s/pretrain.py ...\n' "$tools"
}

name=${1:-help}
case $name in
    help) usage && exit 0 ;;
    -*)
        {
            printf "error: expected a tool or a command, not the flag %s\n" "$name"
            usage
        } >&2
        exit 2
        ;;
esac
if is_tool "$name"; then
    shift
    exec python "$tools/$name.py" "$@"
fi
if ! type -P -- "$name" >/dev/null; then
    {
        printf "error: %s is neither a tool nor a program of this image\n" "$name"
        usage
    } >&2
    exit 127
fi
exec "$@"
