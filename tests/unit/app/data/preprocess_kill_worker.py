"""Kills preprocessing at one write after another, and compares what restarts make.

Started as a process of its own, which forks: the kills end real processes.
"""

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron.trainer.data import token_draft, writer
from moe_app.data import preprocess_data, text_chunks, token_work


def tree(folder: Path) -> dict[str, bytes]:
    """Return all that is in a folder, in subfolders too."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in folder.rglob("*")
    }


def kill_at(write: int) -> None:
    """Make this process end without notice at one of its writes, before or after it."""
    count = 0

    def killing(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **settings: Any) -> Any:
            nonlocal count
            count += 1
            is_last = count == write
            if is_last and write % 2:
                os._exit(9)
            try:
                return call(*arguments, **settings)
            finally:
                if is_last:
                    os._exit(9)

        return wrapped

    for owner, name in (
        (os, "replace"),
        (os, "unlink"),
        (token_draft, "sync_file"),
        (token_draft.TokenDraft, "append"),
        (writer, "sync_file"),
        (shutil, "rmtree"),
    ):
        setattr(owner, name, killing(getattr(owner, name)))


def run(command: list[str], kill: int | None = None) -> int:
    """Run the command in a child; return its exit status."""
    child = os.fork()
    if child == 0:
        sys.stdout = open(os.devnull, "w")
        if kill is not None:
            kill_at(kill)
        os._exit(preprocess_data.main(command))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


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
