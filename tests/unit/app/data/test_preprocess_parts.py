"""Cut, kill, restart and merge preprocessing: the bytes are those of one plain run, or an error."""

import json
import re
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from megatron.trainer.data.indexed import open_tokens
from megatron.trainer.data.token_draft import TokenDraft
from megatron.trainer.data.tokenizer import Tokenizer
from megatron.trainer.data.writer import write_index
from moe_app.data import preprocess_data, progress
from tests.distributed.launcher import program
from tests.paths import REPO
from tests.unit.app.data import preprocess_kill_worker
from tests.unit.app.data.token_files import GOOD, TEXTS, WORDS, files


def wait_until(is_so: Callable[[], bool]) -> None:
    for _ in range(6000):
        if is_so():
            return
        time.sleep(0.05)
    raise AssertionError("it never came")


def is_running(process: str) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_workers_and_shards_make_the_bytes_of_one_loop(
    tmp_path: Path, run: Callable[..., int], corpus: list[str], tokenizer: Tokenizer
) -> None:
    flags = ("--input", *corpus, "--append-eod")
    assert run(tmp_path / "1", *flags) == 0
    expected = [[*tokenizer.encode_document(text), tokenizer.eod] for text in TEXTS if text.strip()]
    found = open_tokens(str(tmp_path / "1_text_document"))
    assert found.tokens.tolist() == list(chain.from_iterable(expected))
    assert np.diff(found.document_starts[:]).tolist() == [len(ids) for ids in expected[:-1]]
    for workers in (2, 4):
        assert run(tmp_path / str(workers), *flags, "--workers", str(workers)) == 0
        assert files(tmp_path / str(workers)) == files(tmp_path / "1")
    for index in range(3):
        assert run(tmp_path / "3", *flags, "--num-shards", "3", "--shard-index", str(index)) == 0
    sizes = [path.stat().st_size for path in tmp_path.glob("3_*.bin")]
    assert len(sizes) == 3 and min(sizes) > sum(sizes) / 9
    assert run(tmp_path / "3", "--merge", "--num-shards", "3") == 0
    assert files(tmp_path / "3") == files(tmp_path / "1")


def test_kill_at_any_write_and_a_restart_make_the_same_bytes(
    tmp_path: Path, tokenizer_file: str
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:40]))
    command = [sys.executable, *program(preprocess_kill_worker.__file__)]
    command += [str(tmp_path / "out"), str(source), tokenizer_file]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    kills = [int(each) for each in re.findall(r"^(\d+) kills$", done.stdout, re.MULTILINE)]
    assert len(kills) == 2 and min(kills) > 25


def test_killed_run_takes_its_workers_along_and_goes_on(
    tmp_path: Path, run: Callable[..., int], tokenizer_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in.jsonl"
    lines = (json.dumps({"text": f"{WORDS[n % 7]} {n**5} quick " * 99}) for n in range(1500))
    source.write_text("\n".join(lines))
    flags = ["--input", str(source)]
    command = ["--output-prefix", str(tmp_path / "a"), *flags, "--workers", "2"]
    command += ["--tokenizer-type", "HFTokenizer", "--tokenizer-model", tokenizer_file]
    started = subprocess.Popen(
        [sys.executable, *program(preprocess_kill_worker.__file__), "run", *command],
        cwd=REPO,
        stdout=subprocess.DEVNULL,
    )
    state = tmp_path / "a_text_document.part/state.json"
    wait_until(state.exists)
    children = Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split()
    started.send_signal(signal.SIGKILL)
    started.wait()
    assert len(children) >= 2
    wait_until(lambda: not any(is_running(child) for child in children))
    assert not (tmp_path / "a_text_document.idx").exists()
    kept = json.loads(state.read_bytes())["num_documents"]
    assert run(tmp_path / "a", *flags) == 0
    assert f"going on after {kept:,} documents" in capsys.readouterr().out
    assert 0 < kept < 1500
    assert run(tmp_path / "b", *flags) == 0
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_shards_that_do_not_belong_together_are_refused(
    tmp_path: Path,
    run: Callable[..., int],
    corpus: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    merge = ("--merge", "--num-shards", "2")
    cut = ("--num-shards", "2", "--shard-index")
    shards = [f"{out}_text_document.shard-0000{index}-of-00002" for index in (0, 1)]
    assert run(out, "--input", *corpus, *cut, "0") == 0
    assert run(out, *merge) == 2
    message = capsys.readouterr().err
    assert f"error: 1 of 2 shards are not finished: {shards[1]}; all must be; start" in message
    assert run(out, "--input", *corpus, *cut, "1", "--append-eod") == 0
    assert run(out, *merge) == 2
    assert f"error: {shards[1]}.json is of shard 1 of 2 of the work" in capsys.readouterr().err
    assert run(out, "--input", *corpus, *cut, "1") == 0
    tokens = bytearray(Path(f"{shards[1]}.bin").read_bytes())
    tokens[0] ^= 1
    Path(f"{shards[1]}.bin").write_bytes(tokens)
    assert run(out, *merge) == 2
    assert f"{shards[1]}.json is not the manifest of" in capsys.readouterr().err
    assert not list(tmp_path.glob("out_text_document.[!s]*"))


def test_more_shards_than_lines_leave_some_empty(
    tmp_path: Path, run: Callable[..., int], tokenizer: Tokenizer
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(GOOD + b"\n" + GOOD)
    for index in range(5):
        assert (
            run(
                tmp_path / "out",
                *f"--input {source} --num-shards 5".split(),
                "--shard-index",
                str(index),
            )
            == 0
        )
    assert run(tmp_path / "out", "--merge", "--num-shards", "5") == 0
    found = open_tokens(str(tmp_path / "out_text_document"))
    assert found.tokens.tolist() == tokenizer.encode_document("the fox") * 2


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--num-shards 2", "--num-shards is 2, but --shard-index is not given"),
        ("--num-shards 2 --shard-index 2", "--shard-index is 2; it must be from 0 to 1"),
        ("--shard-index 1", "--shard-index is 1; it must be from 0 to 0"),
        ("--num-shards 0", "--num-shards is 0; it must be at least 1"),
        ("--merge --num-shards 2", "--merge takes --output-prefix, --json-keys and --num-shards"),
        ("--max-bad-lines -1", "--max-bad-lines is -1; it must be at least 0"),
        ("--output-key a --json-keys b c", "--output-key a is a name for the token files of one"),
        ("--merge --check --num-shards 2", "leave --input, --shard-index and --check out"),
    ],
)
def test_flags_that_do_not_fit_together_are_refused(
    flags: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--input", "a", "--output-prefix", "p", "--tokenizer-model", "m"]
    with pytest.raises(SystemExit):
        preprocess_data.main([*common, *flags.split()])
    assert said in capsys.readouterr().err


def test_finished_work_is_done_again_only_where_something_changed(
    tmp_path: Path, run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out"
    source.write_bytes(GOOD + b"\n" + GOOD)

    def report(*args: str) -> str:
        assert run(out, "--input", str(source), *args) == 0
        return capsys.readouterr().out.splitlines()[-1]

    assert "2 documents" in report()
    assert "complete already, 2 documents" in report()
    assert "complete already" not in report("--append-eod")
    assert "complete already" in report("--append-eod")
    source.write_bytes(GOOD.replace(b"the", b"her") + b"\n" + GOOD)
    before = files(out)
    assert "complete already" not in report("--append-eod")
    assert files(out) != before
    Path(f"{out}_text_document.bin").write_bytes(files(out)[0][:-2])
    assert "complete already" not in report("--append-eod")
    assert files(out) != before


def test_check_tells_finished_work_from_other_work_and_writes_nothing(
    tmp_path: Path, run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out"
    source.write_bytes(GOOD.replace(b'"text"', b'"content"'))
    work = ["--input", str(source), "--json-keys", "content", "--output-key", "text"]
    assert run(out, *work, "--check") == 1
    assert "there is no finished one" in capsys.readouterr().out
    assert [each.name for each in tmp_path.iterdir()] == ["in.jsonl"]
    assert run(out, *work) == 0
    before = files(out)
    assert run(out, *work, "--check") == 0
    assert run(out, *work, "--append-eod", "--check") == 1
    assert "its manifest differs in eod_token_id, work_sha256" in capsys.readouterr().out
    Path(f"{out}_text_document.bin").write_bytes(before[0][:-2])
    assert run(out, *work, "--check") == 1
    assert run(out, *work) == 0 and files(out) == before


def test_draft_of_other_work_and_of_another_process_is_refused(
    tmp_path: Path,
    run: Callable[..., int],
    corpus: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    with TokenDraft(f"{tmp_path}/out_text_document", {"key": "other"}, vocab_size=9) as draft:
        assert run(tmp_path / "out", "--input", *corpus) == 2
        assert "out_text_document.part is being written by another pr" in capsys.readouterr().err
        draft.append(np.array([1, 2], np.uint16), np.array([2], np.int32))
        draft.commit({"position": [0, 0]})
    assert run(tmp_path / "out", "--input", *corpus) == 2
    message = capsys.readouterr().err
    assert "holds what an unfinished start wrote with other key, tokenizer" in message
    assert "start as then, or remove the folder to start over" in message


def test_progress_tells_share_rate_and_time_left(
    tmp_path: Path,
    run: Callable[..., int],
    corpus: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN", 0.0)
    assert run(tmp_path / "out", "--input", *corpus) == 0
    lines = capsys.readouterr().err.splitlines()
    number = r"[\d,]+"
    share = r"(\d+\.\d)% of 0\.00 GB"
    form = (
        rf".*out_text_document: {share}, {number} documents, {number} tokens,"
        rf" {number}\.\d\d MB/s, {number} tokens/s(, \d+ s left)?"
    )
    found = [re.fullmatch(form, line) for line in lines]
    shares = [float(each[1]) for each in found if each]
    assert len(shares) == len(lines) > 10
    assert shares == sorted(shares) and shares[0] < 10 and shares[-1] == 100


def test_index_is_written_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = np.random.default_rng(1).integers(1, 9, 3_000_000).astype("<i4")
    (tmp_path / "lengths").write_bytes(lengths.tobytes())
    tracemalloc.start()
    with (tmp_path / "lengths").open("rb") as file:
        write_index(tmp_path / "a.idx", file, dtype=np.dtype(np.uint16))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20
    offsets = (np.cumsum(lengths, dtype="<i8") - lengths) * 2
    bounds = np.arange(3_000_001, dtype="<i8")
    found = (tmp_path / "a.idx").read_bytes()[34:]
    assert found == lengths.tobytes() + offsets.tobytes() + bounds.tobytes()
