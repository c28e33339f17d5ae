"""Pretrains; on the first start rank 1 damages the newest checkpoint at step 8 and kills itself.

Usage: torchrun ... faults_restart_worker.py MARKS FLAGS...
"""

import os
import signal
import sys
from pathlib import Path

from moe_app.pretrain import command
from tests.distributed.faults_worker import arm


def main() -> int:
    mark, flags = Path(sys.argv[1]) / "killed", sys.argv[2:]
    run = Path(flags[flags.index("--save") + 1])

    def damage_and_die() -> None:
        shard = run / "iter_0000006" / "__1_0.distcp"
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 0x10
        shard.write_bytes(content)
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)

    if os.environ["RANK"] == "1" and not mark.exists():
        arm("step", 7, damage_and_die)
    return command.main(flags)


if __name__ == "__main__":
    sys.exit(main())
