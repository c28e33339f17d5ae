"""Collect routing under several layouts, in the ranks that the launcher started.

Usage: worker_analyze.py CASES.json, with {NAME: [flag of `collect`, ...]}; the error of the case
called dense is printed.
"""

import json
import sys
from pathlib import Path

from megatron.trainer.errors import CheckpointError
from megatron.trainer.runtime.launch import connect, environment_rank, shut_down
from megatron.trainer.runtime.log import configure_logging
from moe_app.analyze.analyze_routing import make_parser
from moe_app.analyze.collect import collect
from moe_app.infer import open_model


def main() -> None:
    configure_logging(environment_rank())
    for name, flags in json.loads(Path(sys.argv[1]).read_text()).items():
        args = make_parser().parse_args(["collect", *flags])
        connect(open_model.parallel_config(args))
        try:
            collect(args)
        except CheckpointError as error:
            if name != "dense":
                raise
            print(f"{type(error).__name__}: {error}", flush=True)
        shut_down(keep_world=True)


if __name__ == "__main__":
    main()
