"""Ask a judge that hangs, errs, answers nonsense or too much, and see what is made of it."""

import argparse
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from megatron.trainer.errors import ConfigError, DataError
from moe_app.evaluate.judging.endpoint import ChatEndpoint, JudgeSettings
from moe_app.evaluate.judging.judge import JUDGEMENTS_NAME, Judge
from moe_app.evaluate.judging.mt_bench import RATING
from moe_app.evaluate.own_flags import judge_settings
from tests.unit.app.evaluate.judge_stub import JudgeStub, closes, says, sends

KEY = "sk-a-key-that-nobody-must-see"
QUESTION = [{"role": "user", "content": "How good?"}]


def ask(stub: JudgeStub, *, retries: int = 3, seconds: float = 600) -> tuple[str, list[float]]:
    """Return the answer, and the pauses between tries."""
    pauses: list[float] = []
    with stub.served() as url:
        settings = JudgeSettings(
            url=url, model="judge", key=KEY, seconds=seconds, retries=retries, concurrency=1
        )
        endpoint = ChatEndpoint(settings, pause=pauses.append)
        return endpoint.ask(QUESTION, max_tokens=9), pauses


def test_question_and_answer_are_in_the_form_of_the_interface() -> None:
    stub = JudgeStub(says("Rating: [[5]] é"))
    assert ask(stub) == ("Rating: [[5]] é", [])
    assert stub.asked == [
        {
            "path": "/v1/chat/completions",
            "model": "judge",
            "messages": QUESTION,
            "temperature": 0,
            "max_tokens": 9,
        }
    ]
    assert stub.keys == [f"Bearer {KEY}"]


@pytest.mark.parametrize(
    ("failures", "pauses"),
    [
        ([sends(b"busy", status=500), sends(b"", status=503)], [1.0, 2.0]),
        ([sends(b"slow down", status=429, Retry_After="7")], [7.0]),
        ([sends(b"slow down", status=429, Retry_After="9999")], [60.0]),
        ([closes], [1.0]),
        ([sends(b"<html>", status=200)], [1.0]),
        ([sends(b'{"choices": []}'), sends(b"[]"), sends(b"[" * 100_000)], [1.0, 2.0, 4.0]),
        ([sends(b'{"choices": [{"message": {"content": null}}]}')], [1.0]),
        ([sends(b"a" * (5 << 20))], [1.0]),
    ],
    ids=["5xx", "429", "429-long", "closed", "html", "json", "null", "long"],
)
def test_failure_that_may_pass_is_tried_again(failures: Any, pauses: list[float]) -> None:
    stub = JudgeStub(*failures, says("well"))
    assert ask(stub) == ("well", pauses)
    assert len(stub.asked) == len(failures) + 1


@pytest.mark.parametrize("how", ["hangs", "stalls"])
def test_judge_that_hangs_is_given_up(how: str) -> None:
    stub = JudgeStub()
    stub.script = [getattr(stub, how)] * 2
    with pytest.raises(DataError, match=r"failed 2 times, at last: .*timed out; judgements so far"):
        ask(stub, retries=1, seconds=0.2)


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (sends(b"wrong key " + KEY.encode(), status=401), r"refuses: status 401: wrong key \*\*\*"),
        (sends(b"no such model", status=404), "refuses: status 404: no such model; check"),
        (sends(b"", status=302, Location="http://192.0.2.1/"), "refuses: status 302"),
    ],
)
def test_refusal_is_told_at_once_and_without_the_key(reply: Any, message: str) -> None:
    stub = JudgeStub(reply)
    with pytest.raises(DataError, match=message) as caught:
        ask(stub)
    assert KEY not in str(caught.value)
    assert len(stub.asked) == 1


def test_server_error_that_tells_the_key_is_told_without_it() -> None:
    stub = JudgeStub(sends(KEY.encode(), status=500))
    with pytest.raises(DataError, match=r"failed 1 times, at last: status 500: \*\*\*;"):
        ask(stub, retries=0)


def conversations(count: int) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": f"question {number}"}] for number in range(count)]


@pytest.fixture
def stub() -> JudgeStub:
    return JudgeStub(rule=lambda text: f"{text}: [[{text[-1]}]]")


@pytest.fixture
def url(stub: JudgeStub) -> Iterator[str]:
    with stub.served() as url:
        yield url


def judge_of(url: str, output: Path, *, concurrency: int = 1) -> Judge:
    settings = JudgeSettings(
        url=url, model="judge", key=KEY, seconds=600, retries=0, concurrency=concurrency
    )
    return Judge(output, settings)


def test_judgements_are_kept_and_not_asked_again(
    stub: JudgeStub, url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked = conversations(3)
    first = judge_of(url, tmp_path).ask_all([*asked, asked[0]], RATING)
    assert [each.verdict for each in first] == ["0", "1", "2", "0"]
    assert first[1].text == "question 1: [[1]]"
    assert len(stub.asked) == 3
    assert judge_of(url, tmp_path).ask_all([*asked, asked[0]], RATING) == first
    assert len(stub.asked) == 3
    assert all(KEY.encode() not in path.read_bytes() for path in tmp_path.iterdir())
    assert KEY not in caplog.text


def test_judgements_before_a_failure_are_kept(stub: JudgeStub, url: str, tmp_path: Path) -> None:
    stub.script = [says("[[8]]"), says("[[9]]"), sends(b"down", status=500)]
    with pytest.raises(DataError, match="failed 1 times, at last: status 500: down"):
        judge_of(url, tmp_path).ask_all(conversations(5), RATING)
    # One after the other: the first two are kept, and after the third nothing is asked.
    assert len(stub.asked) == 3
    assert len((tmp_path / JUDGEMENTS_NAME).read_text().splitlines()) == 1 + 2
    found = judge_of(url, tmp_path).ask_all(conversations(5), RATING)
    assert [each.verdict for each in found] == ["8", "9", "2", "3", "4"]
    assert len(stub.asked) == 6


def test_no_more_are_asked_side_by_side_than_allowed(
    stub: JudgeStub, url: str, tmp_path: Path
) -> None:
    """Each request waits for another one, so that two must be there, and never three."""
    meeting = threading.Barrier(2)
    lock, active, most = threading.Lock(), [0], [0]

    def met(handler: BaseHTTPRequestHandler) -> None:
        with lock:
            active[0] += 1
            most[0] = max(most[0], active[0])
        meeting.wait(300)
        with lock:
            active[0] -= 1
        says("[[5]]")(handler)

    stub.script = [met] * 6
    judge_of(url, tmp_path, concurrency=2).ask_all(conversations(6), RATING)
    assert most == [2]


def test_nonsense_is_counted_and_nothing_but_nonsense_refused(
    stub: JudgeStub, url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stub.script = [says("I would rather not"), says("Rating: [7]"), says("[[3.5]] of 10")]
    found = judge_of(url, tmp_path).ask_all(conversations(3), RATING)
    assert [each.verdict for each in found] == [None, "7", "3.5"]
    assert "1 of 3 judgements have no verdict" in caplog.text
    with pytest.raises(
        DataError, match="none of 1 judgements has a verdict; the first is 'I would"
    ):
        judge_of(url, tmp_path).ask_all(conversations(1), RATING)


def flags(tmp_path: Path, **changes: Any) -> argparse.Namespace:
    values: dict[str, Any] = {
        "judge_url": "http://localhost:1/v1",
        "judge_model": "m",
        "judge_key_file": None,
        "judge_key_env": None,
        "judge_timeout": 1,
        "judge_retries": 0,
        "judge_concurrency": 1,
    }
    return argparse.Namespace(**{**values, **changes})


def test_key_is_read_from_where_the_user_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "key").write_text(f"{KEY}\n")
    monkeypatch.setenv("MY_JUDGE_KEY", KEY)
    for changes in ({"judge_key_file": str(tmp_path / "key")}, {"judge_key_env": "MY_JUDGE_KEY"}):
        settings = judge_settings(flags(tmp_path, **changes), "mt_bench")
        assert settings.key == KEY
        assert KEY not in repr(settings)
    assert judge_settings(flags(tmp_path), "mt_bench").key is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"judge_url": None}, "mt_bench need a judge; name one with --judge-url"),
        ({"judge_url": "file:///etc/passwd"}, "--judge-url must be http"),
        ({"judge_url": "http://[bad/v1"}, "--judge-url must be http"),
        ({"judge_url": "https://user:pw@host/v1"}, "without a name and password"),
        ({"judge_key_file": "nowhere"}, "--judge-key-file nowhere cannot be read as a key"),
        ({"judge_key_env": "NO_SUCH_VARIABLE_HERE"}, "NO_SUCH_VARIABLE_HERE holds no key"),
        (
            {"judge_url": "http://example.org/v1", "judge_key_env": "MY_JUDGE_KEY"},
            "would travel unencrypted",
        ),
        ({"judge_key_env": "A_BAD_KEY"}, "characters that no header may have"),
    ],
)
def test_wrong_flags_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    monkeypatch.setenv("MY_JUDGE_KEY", KEY)
    monkeypatch.setenv("A_BAD_KEY", f"{KEY}\nX-Header: a")
    with pytest.raises(ConfigError, match=message) as caught:
        judge_settings(flags(tmp_path, **changes), "mt_bench")
    assert KEY not in str(caught.value)
    assert ":pw@" not in str(caught.value)
