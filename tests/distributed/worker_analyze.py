"""Collect routing under several layouts, in the ranks that the launcher started.

Usage: worker_analyze.py CASES.json, with {NAME: [flag of `collect`, ...]}.
"""

import json
import sys
from pathlib import Path

from megatron.trainer.runtime.launch import connect, environment_rank, shut_down
from megatron.trainer.runtime.log import configure_logging
from moe_app.analyze.analyze_routing import make_parser
from moe_app.analyze.collect import collect
from moe_app.infer import open_model


def main() -> None:
    configure_logging(environment_rank())
    for flags in json.loads(Path(sys.argv[1]).read_text()).values():
        args = make_parser().parse_args(["collect", *flags])
        connect(open_model.parallel_config(args))
        collect(args)
        shut_down(keep_world=True)


if __name__ == "__main__":
    main()
