"""What the harness is told of a model, with ranks that answer what a test says."""

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from lm_eval.api.instance import Instance

from megatron.trainer.data.tokenizer import Tokenizer, load_tokenizer
from megatron.trainer.data.writer import TokenFileWriter
from megatron.trainer.errors import CheckpointError, ConfigError
from megatron.trainer.inference.scoring import Continuation
from megatron.trainer.state import TrainState
from moe_app.evaluate import answers
from moe_app.evaluate.answers import AnswerFile
from moe_app.evaluate.harness.model import HarnessModel
from moe_app.evaluate.workers import Workers
from tests.unit.trainer.data.make_tokenizers import make_hf_tokenizer

# From the packages of the harness.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

END, TURN_END, BOS = "<|endoftext|>", "<|im_end|>", "<s>"


class Ranks:
    """Stand for the ranks: each continuation gets -1 a token, each prompt the same tokens."""

    tokens_per_round, prompts_per_round = 100, 4

    def __init__(self, stop_ids: Collection[int], new: list[int]) -> None:
        self.stop_ids = stop_ids
        self.new = new
        self.asked: list[Continuation] = []

    def continuations(self, requests: Mapping[int, Continuation]) -> dict[int, tuple[float, bool]]:
        self.asked += requests.values()
        return {number: (-float(each.count), True) for number, each in requests.items()}

    def texts(self, requests: Mapping[int, Continuation]) -> dict[int, float]:
        return {number: value for number, (value, _) in self.continuations(requests).items()}

    def generations(self, prompts: Mapping[int, Any]) -> dict[int, list[int]]:
        return dict.fromkeys(prompts, self.new)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    settings = {"eos_token": END, "bos_token": END}
    path = make_hf_tokenizer(tmp_path, [END, TURN_END], tokenizer_config=settings)
    return load_tokenizer("HFTokenizer", path)


@contextlib.contextmanager
def model(tokenizer: Tokenizer, ranks: Ranks, path: Path) -> Iterator[HarnessModel]:
    with AnswerFile(path, {}) as answers:
        yield HarnessModel(
            cast(Workers, ranks),
            tokenizer,
            answers,
            max_length=40,
            max_gen_toks=8,
            prefix_token_id=tokenizer.eod,
            seed=1,
        )


def test_an_answer_ends_before_whichever_token_ends_a_text(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    turn_end = tokenizer.token_id(TURN_END)
    assert turn_end is not None
    ranks = Ranks({tokenizer.eod, turn_end}, [*tokenizer.encode("the dog"), turn_end])
    prompt = Instance("generate_until", {}, ("fox", {"until": []}), 0)
    with model(tokenizer, ranks, tmp_path / "kept") as asked:
        assert asked.generate_until([prompt], disable_tqdm=True) == ["the dog"]
    # Answers that may end at other tokens are others.
    ranks.stop_ids, ranks.new = {tokenizer.eod}, tokenizer.encode("fox")
    with model(tokenizer, ranks, tmp_path / "kept") as asked:
        assert asked.generate_until([prompt], disable_tqdm=True) == ["fox"]


@pytest.mark.parametrize("context", [" ", "\n"])
def test_all_of_a_continuation_counts_after_a_blank_context(
    context: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    ranks = Ranks((), [])
    request = Instance("loglikelihood", {}, (context, "the dog"), 0)
    with model(tokenizer, ranks, tmp_path / "kept") as asked:
        found = asked.loglikelihood([request], disable_tqdm=True)
    ids = tokenizer.encode(context + "the dog")
    assert found == [(-float(len(ids)), True)]
    (scored,) = ranks.asked
    assert scored.ids == (tokenizer.eod, *ids)


@pytest.mark.parametrize("bos", [None, BOS])
def test_a_run_scores_the_windows_of_the_harness_but_for_a_bos_after_a_bos(
    bos: str | None, tmp_path: Path, make_state: Callable[..., TrainState]
) -> None:
    path = make_hf_tokenizer(tmp_path, [END, BOS], bos=bos, tokenizer_config={"eos_token": END})
    tokenizer = load_tokenizer("HFTokenizer", path)
    text = "the quick brown fox jumps over the lazy dog"
    with TokenFileWriter(str(tmp_path / "web_text_document"), vocab_size=320) as writer:
        for _ in range(4):
            writer.add_document([*tokenizer.encode_document(text), tokenizer.eod])
        writer.finish()
    data = {"data_path": tmp_path / "web_text_document", "split": "50,50", "seq_length": 4}
    data |= {"num_layers": 1, "vocab_size": 320, "global_batch_size": 2, "train_iters": 1}
    given = {"tokenizer_type": "HFTokenizer", "tokenizer_model": path, "eval_documents": 1}
    tasks: Any = make_state(**data, **given).tasks
    ranks = Ranks((), [])
    with model(tokenizer, ranks, tmp_path / "kept") as asked:
        asked.max_length = 4
        asked._prefix_token_id = tokenizer.prefix[0] if bos else tokenizer.eod
        request = Instance("loglikelihood_rolling", {}, (text,), 0)
        (found,) = asked.loglikelihood_rolling([request], disable_tqdm=True)
    ids, more = tokenizer.encode(text), list(tokenizer.prefix)
    assert scored(tasks.passes._rows) == ids
    assert scored(ranks.asked) == [*more, *ids]
    assert -found == len(ids) + len(more) > 4
    # A window has what is before it from the harness, too.
    assert (list(tasks.passes._rows) == ranks.asked) is (bos is None)


def scored(rows: Sequence[Continuation]) -> list[int]:
    return [token for row in rows for token in row.ids[-row.count :]]


def test_one_evaluation_at_a_time_keeps_answers_in_a_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second would take the file away from the first, whose answers would be lost."""
    monkeypatch.setattr(answers, "PATIENCE_S", 0.0)
    with AnswerFile(tmp_path / "kept", {}) as first:
        with pytest.raises(ConfigError, match="another evaluation keeps its answers in"):
            AnswerFile(tmp_path / "kept", {})
        first.add({"a": -1.0})
    with AnswerFile(tmp_path / "kept", {}) as second:
        assert second.get("a") == -1.0


@pytest.mark.parametrize("line", ['{"key": "b", "answer": [NaN, false]}', '{"key": "b"}'])
def test_kept_answers_that_are_none_are_asked_for_again(line: str, tmp_path: Path) -> None:
    with AnswerFile(tmp_path / "kept", {}) as first:
        first.add({"a": -1.0})
    with (tmp_path / "kept").open("a") as file:
        file.write(f"{line}\n")
    with AnswerFile(tmp_path / "kept", {}) as second:
        assert (second.get("a"), second.get("b")) == (-1.0, None)


@pytest.mark.parametrize("kind", ["continuations", "texts"])
def test_scores_that_are_not_finite_are_refused(kind: str) -> None:
    value: Any = (float("nan"), False) if kind == "continuations" else float("-inf")
    with pytest.raises(CheckpointError, match="gives a log-probability of"):
        getattr(Workers, kind)(SimpleNamespace(_run=lambda work: {0: value}), {})
