"""Presents a checkpoint to lm-evaluation-harness."""

import dataclasses
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from megatron.trainer.data.tokenizer import Tokenizer
from megatron.trainer.errors import ConfigError
from megatron.trainer.inference.scoring import Continuation
from moe_app.chat.dialogue import Turn
from moe_app.evaluate.answers import AnswerFile, request_key
from moe_app.evaluate.workers import Sampling, Workers
from moe_app.infer.conversations import Conversations

logger = logging.getLogger("evaluate")

T = TypeVar("T")

_ROUND_BATCHES = 16
"""Forward passes of a round, after which answers are kept and progress is told."""


class HarnessModel(TemplateLM):
    """Answers the requests of the harness by the ranks' model, each request once.

    Args:
        workers: the ranks.
        tokenizer: of the model.
        answers: known already, and where new ones go.
        max_length: positions of a forward pass.
        max_gen_toks: new tokens of a continuation whose task does not say.
        prefix_token_id: stands before a text without a context.
        seed: of the first sampled continuation.
        conversations: writes those that the harness asks for; None for a model without.
    """

    def __init__(
        self,
        workers: Workers,
        tokenizer: Tokenizer,
        answers: AnswerFile,
        *,
        max_length: int,
        max_gen_toks: int,
        prefix_token_id: int,
        seed: int,
        conversations: Conversations | None = None,
    ) -> None:
        super().__init__()
        self._workers = workers
        self._own_tokenizer = tokenizer
        self._answers = answers
        self._prefix_token_id = prefix_token_id
        self._seed = seed
        self._conversations = conversations
        self._conversation_ids: dict[str, list[int]] = {}
        self.max_length = max_length
        self.max_gen_toks = max_gen_toks

    @property
    def eot_token_id(self) -> int:
        """Return the id that ends a text."""
        return self._own_tokenizer.eod

    @property
    def prefix_token_id(self) -> int:
        """Return the id that stands before a text without a context."""
        return self._prefix_token_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Return the ids of a text, which begins with the tokenizer's BOS unless told otherwise."""
        if add_special_tokens is False:
            return self._own_tokenizer.encode(string)
        return self._own_tokenizer.encode_document(string)

    @property
    def tokenizer_name(self) -> str:
        """Return nothing: the harness keeps no prompts of conversations by this name."""
        return ""

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return the text of a conversation; its tokens, which a text does not tell, are kept.

        Without `add_generation_prompt` the last turn is how the model's answer begins.
        """
        if self._conversations is None:
            raise ConfigError("conversations are asked for, but nothing says how; give --template")
        turns = tuple(Turn(each["role"], each["content"]) for each in chat_history)
        begun = "" if add_generation_prompt else turns[-1].content
        asked = turns if add_generation_prompt else turns[:-1]
        text = self._conversations.write_turns(asked) + begun
        ids = [*self._conversations.encode_turns(asked), *self._own_tokenizer.encode(begun)]
        self._conversation_ids[text] = ids
        return text

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Return the ids of a context and of what follows, to which space at its end belongs."""
        ids = self._conversation_ids.get(context)
        if ids is None:
            found: tuple[list[int], list[int]] = super()._encode_pair(context, continuation)
            return found
        border = len(ids)
        spaces = len(context) - len(context.rstrip())
        while border > 1 and spaces > 0:
            text = self._own_tokenizer.decode([ids[border - 1]])
            if text.strip() or not text or len(text) > spaces:
                break
            spaces -= len(text)
            border -= 1
        return ids[:border], ids[border:] + self._own_tokenizer.encode(continuation)

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """Return the log-probability of each continuation, and whether it is greedy."""
        wanted = [self._continuation(context, ids) for _, context, ids in requests]
        found = self._log_probs("continuation", wanted, self._workers.continuations)
        return [(float(pair[0]), bool(pair[1])) for pair in found]

    def _continuation(self, context: list[int], continuation: list[int]) -> Continuation:
        """Cut a request to the model's length, from the left as the harness does."""
        if not continuation:
            raise ConfigError(
                "a task asks for the probability of a continuation without tokens; each must have"
                " one; repair the task's doc_to_choice or doc_to_target"
            )
        # The harness moves white space to the continuation, so a blank context has no token left.
        context = context or [self.prefix_token_id]
        ids = (context + continuation)[-(self.max_length + 1) :]
        if len(context) + len(continuation) > len(ids):
            logger.warning(
                "a request of %d tokens is cut from the left to %d",
                len(context) + len(continuation),
                len(ids),
            )
        return Continuation(ids=tuple(ids), count=min(len(continuation), len(ids) - 1))

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-probability of each text, in windows of the model's length."""
        windows, owners = [], []
        for owner, request in enumerate(requests):
            (text,) = request.args
            for pair in get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ):
                context, continuation = make_disjoint_window(pair)
                windows.append(self._continuation(context, continuation))
                owners.append(owner)
        scored = self._log_probs("text", windows, self._workers.texts)
        totals = [0.0] * len(requests)
        for owner, log_prob in zip(owners, scored, strict=True):
            totals[owner] += log_prob
        return totals

    def _log_probs(
        self,
        kind: str,
        wanted: Sequence[Continuation],
        compute: Callable[[Mapping[int, Continuation]], Mapping[int, Any]],
    ) -> list[Any]:
        """Answer requests for log-probabilities of continuations."""
        return self._answer(
            kind,
            wanted,
            describe=lambda each: [each.ids, each.count],
            cost=lambda each: len(each.ids),
            per_round=self._workers.tokens_per_round * _ROUND_BATCHES,
            compute=compute,
        )

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the continuation of each prompt, up to the text that it stops at."""
        prompts = []
        for request in requests:
            context, settings = request.args
            ids = self._conversation_ids.get(context)
            ids = self.tok_encode(context) if ids is None else ids
            prompts.append(self.cut_prompt(ids, dict(settings)))
        return self.continue_prompts(prompts)

    def continue_prompts(self, prompts: Sequence[tuple[Sequence[int], Sampling]]) -> list[str]:
        """Return the continuation of each prompt; of equal ones each draw is another."""
        wanted = []
        times: dict[str, int] = {}
        for ids, sampling in prompts:
            # Several draws for one prompt are several requests of the same arguments.
            name = request_key("prompt", [list(ids), dataclasses.asdict(sampling)])
            times[name] = times.get(name, -1) + 1
            wanted.append((tuple(ids), sampling, self._seed + times[name]))
        ends = sorted(self._workers.stop_ids)
        found = self._answer(
            "generation",
            wanted,
            describe=lambda each: [each[0], dataclasses.asdict(each[1]), each[2], ends],
            cost=lambda each: 1,
            per_round=self._workers.prompts_per_round,
            compute=self._workers.generations,
        )
        return [self._text(each[1], list(ids)) for each, ids in zip(wanted, found, strict=True)]

    def cut_prompt(
        self, context: Sequence[int], settings: Mapping[str, Any]
    ) -> tuple[list[int], Sampling]:
        """Read the settings of a generation, and cut its prompt from the left to fit.

        Raises:
            ConfigError: a setting is not known, or no room is left for a prompt.
        """
        given = dict(normalize_gen_kwargs(dict(settings), self.max_gen_toks))
        until = handle_stop_sequences(given.pop("until", None), eos=None)
        limit = int(given.pop("max_gen_toks"))
        temperature = float(given.pop("temperature", 0.0) or 0.0)
        if given.pop("do_sample", None) is False:
            temperature = 0.0
        top_p, top_k = float(given.pop("top_p", 1.0)), given.pop("top_k", None) or None
        if given:
            raise ConfigError(
                f"a task sets generation_kwargs {', '.join(sorted(given))}, which are not known"
                " here; known are until, max_gen_toks, do_sample, temperature, top_p and top_k;"
                " take them out of the task"
            )
        room = self.max_length - limit
        if room < 1:
            raise ConfigError(
                f"a task asks for {limit} new tokens, but the model has {self.max_length}"
                " positions, one at least for the prompt; lower max_gen_toks (--gen-kwargs"
                " max_gen_toks=N) or raise --max-length"
            )
        ids = list(context)[-room:] or [self.prefix_token_id]
        return ids, Sampling(
            max_new_tokens=limit,
            stops=tuple(text for text in until if text),
            temperature=temperature,
            top_p=top_p,
            top_k=None if top_k is None else int(top_k),
        )

    def _text(self, sampling: Sampling, new: list[int]) -> str:
        """Return the text of new tokens, up to what it stopped at."""
        stop_ids = self._workers.stop_ids
        ends = [index for index, token in enumerate(new) if token in stop_ids]
        text = self._own_tokenizer.decode(new[: ends[0]] if ends else new)
        cut: str = postprocess_generated_text(text, list(sampling.stops), None)
        return cut

    def _answer(
        self,
        kind: str,
        wanted: Sequence[T],
        *,
        describe: Callable[[T], Any],
        cost: Callable[[T], int],
        per_round: int,
        compute: Callable[[Mapping[int, T]], Mapping[int, Any]],
    ) -> list[Any]:
        """Answer requests in rounds, longest first; each different one once.

        Args:
            kind: of the requests.
            wanted: the requests.
            describe: a request as JSON.
            cost: of a request, in the unit of `per_round`.
            per_round: what a round computes at most.
            compute: answers the requests of a round by number.
        """
        keys = [request_key(kind, describe(each)) for each in wanted]
        missing = dict(zip(keys, wanted, strict=True))
        open_keys = [key for key in missing if self._answers.get(key) is None]
        lengths = {key: len(describe(missing[key])[0]) for key in open_keys}
        open_keys.sort(key=lambda key: -lengths[key])
        progress = _Progress(kind, len(open_keys))
        for some in _rounds(open_keys, lambda key: cost(missing[key]), per_round):
            found = compute({number: missing[key] for number, key in enumerate(some)})
            self._answers.add({key: found[number] for number, key in enumerate(some)})
            progress.add(len(some))
        return [self._answers.get(key) for key in keys]


class _Progress:
    """Tells how many of some requests are answered, and how long the others will take."""

    def __init__(self, kind: str, total: int) -> None:
        self._kind, self._total, self._done = kind, total, 0
        self._started = self._told = time.monotonic()

    def add(self, count: int) -> None:
        """Count answers; log at most every few seconds, and at the end."""
        self._done += count
        now = time.monotonic()
        if self._done < self._total and now - self._told < 5.0:
            return
        self._told = now
        seconds = now - self._started
        left = seconds / self._done * (self._total - self._done)
        logger.info(
            "answered %d of %d %s requests in %.0f s, about %.0f s left",
            *(self._done, self._total, self._kind, seconds, left),
        )


def _rounds(keys: Iterable[str], cost: Callable[[str], int], per_round: int) -> Iterable[list[str]]:
    """Yield keys in groups that cost about `per_round` each."""
    group: list[str] = []
    total = 0
    for key in keys:
        group.append(key)
        total += cost(key)
        if total >= per_round:
            yield group
            group, total = [], 0
    if group:
        yield group
