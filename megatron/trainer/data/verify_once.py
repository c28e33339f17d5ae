"""Verifies token files once on a machine, however many of its ranks read them; a collective call.

Ranks tell each other which files they see. Of the ranks of a machine that see the very same one,
one reads it through, and the others take over what it found.
"""

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron.trainer.data.indexed import TokenFacts, open_tokens
from megatron.trainer.runtime.collective import gather, on_all_ranks, rank_of

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_Stat = tuple[int, int, int, int, int]


@dataclass(frozen=True)
class FileIdentity:
    """Says which files a token file is on which machine; files that changed are others."""

    machine: str
    index: _Stat
    tokens: _Stat


def verify_once(prefixes: Sequence[str], *, vocab_size: int) -> dict[str, TokenFacts]:
    """Verify token files, each on one rank of every machine; see `open_tokens`.

    Files are dealt out to the ranks of a machine, which read them at the same time.

    Args:
        prefixes: What this rank will read.
        vocab_size: Token ids the model has an embedding for.

    Returns:
        What is in the files, by prefix; nothing on a file that this rank does not see.

    Raises:
        DataError: A file is damaged; on every rank.
    """
    own = {prefix: files for prefix in prefixes if (files := identify(prefix)) is not None}
    holders: dict[FileIdentity, list[int]] = {}
    for rank, seen in enumerate(gather(list(dict.fromkeys(own.values())))):
        for identity in seen:
            holders.setdefault(identity, []).append(rank)
    readers = {
        identity: ranks[number % len(ranks)]
        for number, (identity, ranks) in enumerate(holders.items())
    }
    mine = {identity: prefix for prefix, identity in own.items() if readers[identity] == rank_of()}
    found = on_all_ranks(
        "verifying the token files",
        lambda: {
            identity: open_tokens(prefix, vocab_size=vocab_size).facts
            for identity, prefix in mine.items()
        },
    )
    shared = {identity: facts for each in gather(found) for identity, facts in each.items()}
    return {prefix: shared[identity] for prefix, identity in own.items()}


def identify(prefix: str) -> FileIdentity | None:
    """Return which files PREFIX.idx and PREFIX.bin are here; None where one cannot be seen."""
    try:
        index, tokens = (_stat(Path(f"{prefix}{suffix}")) for suffix in (".idx", ".bin"))
    except OSError:
        return None
    return FileIdentity(f"{socket.gethostname()} {_boot_id()}", index, tokens)


def _stat(path: Path) -> _Stat:
    found = path.stat()
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def _boot_id() -> str:
    """Return what tells two machines of one host name apart, where the system has it."""
    try:
        return _BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:
        return ""
