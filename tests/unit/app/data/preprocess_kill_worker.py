"""Kills preprocessing at one write after another, and compares what restarts make.

Started as a process of its own, which forks: the kills end real processes.
"""

import os
import shutil
import sys
from pathlib import Path

from megatron.trainer.data import token_draft, writer
from moe_app.data import preprocess_data, text_chunks, token_work
from tests.unit.app import kill_at_write

WRITES = (
    (os, "replace"),
    (os, "unlink"),
    (token_draft, "sync_file"),
    (token_draft.TokenDraft, "append"),
    (writer, "sync_file"),
    (shutil, "rmtree"),
)


def tree(folder: Path) -> dict[str, bytes]:
    """Return all that is in a folder, in subfolders too."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in folder.rglob("*")
    }


def run(command: list[str], kill: int | None = None) -> int:
    """Run the command in a child; return its exit status."""
    return kill_at_write.run(preprocess_data.main, command, kill=kill, owners=WRITES)


def count_kills(folder: Path, command: list[str], step: int) -> int:
    """Return after how many kills, at every `step`-th write, a restart made the same bytes."""
    before = tree(folder)
    assert run(command) == 0
    wanted = tree(folder)
    kills = 0
    for write in range(1, 10_000, step):
        for name in wanted.keys() - before.keys():
            (folder / name).unlink()
        if run(command, write) == 0:
            return kills
        kills += 1
        found = tree(folder)
        if (folder / "out_text_document.idx").exists():
            assert found["out_text_document.bin"] == wanted["out_text_document.bin"]
        assert run(command) == 0
        assert tree(folder) == wanted, write
    raise AssertionError("no run came to its end")


def kill_all(place: Path, source: str, tokenizer: str) -> None:
    """Print how many kills a run and a merge of three shards went through."""
    place.mkdir()
    output = ["--output-prefix", str(place / "out")]
    whole = ["--input", source, "--tokenizer-model", tokenizer, "--tokenizer-type", "HFTokenizer"]
    print(count_kills(place, [*output, *whole], 1), "kills")
    for path in place.iterdir():
        path.unlink()
    shards = ["--num-shards", "3"]
    for index in range(3):
        assert run([*output, *whole, *shards, "--shard-index", str(index)]) == 0
    print(count_kills(place, [*output, *shards, "--merge"], 1), "kills")


if __name__ == "__main__":
    os.fsync = lambda fd: None  # a kill of the process alone loses nothing
    token_work._COMMIT_SECONDS = 0.0
    if sys.argv[1] == "run":  # to be killed from outside
        sys.exit(preprocess_data.main(sys.argv[2:]))
    text_chunks._CHUNK_BYTES = 400
    kill_all(Path(sys.argv[1]), *sys.argv[2:])
