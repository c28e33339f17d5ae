"""Asks a judge many questions side by side, and keeps every judgement."""

import logging
import re
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from megatron.trainer.errors import DataError
from moe_app.evaluate.answers import AnswerFile, request_key
from moe_app.evaluate.judging.endpoint import (
    ChatEndpoint,
    JudgeSettings,
    JudgeStoppedError,
    Messages,
)

logger = logging.getLogger("evaluate")

JUDGEMENTS_NAME = "judgements.jsonl"
"""File of --output that keeps judgements."""

_MAX_TOKENS = 2048
_PROGRESS = 20


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """Holds what a judge said."""

    text: str
    verdict: str | None
    """What the text is read as; None where it cannot be."""


class Judge:
    """Asks what was not asked before.

    Args:
        output: directory that keeps judgements.
        settings: where the judge is.
        connect: makes what asks it.
    """

    def __init__(
        self,
        output: Path,
        settings: JudgeSettings,
        *,
        connect: Callable[[JudgeSettings], ChatEndpoint] = ChatEndpoint,
    ) -> None:
        self._path = output / JUDGEMENTS_NAME
        self._settings = settings
        self._connect = connect

    def ask_all(self, asked: Sequence[Messages], verdict: "re.Pattern[str]") -> list[Judgement]:
        """Return a judgement of each conversation; the same one is asked once.

        Args:
            asked: what the judge reads.
            verdict: its first group is the verdict; the first of its patterns to be found counts.

        Raises:
            DataError: the judge cannot be asked, or no judgement can be read. Those that it gave
                are kept.
        """
        keys = [
            request_key("judgement", [self._settings.model, _MAX_TOKENS, list(each)])
            for each in asked
        ]
        with AnswerFile(self._path, {"kind": "judgements"}) as known:
            pairs = zip(keys, asked, strict=True)
            self._ask({key: each for key, each in pairs if known.get(key) is None}, known)
            texts = [_text(known.get(key)) for key in keys]
        found = []
        for text in texts:
            match = verdict.search(text)
            said = None if match is None else next(filter(None, match.groups()), None)
            found.append(Judgement(text=text, verdict=said))
        unread = sum(each.verdict is None for each in found)
        if unread:
            logger.warning("%d of %d judgements have no verdict", unread, len(found))
        if found and unread == len(found):
            raise DataError(
                f"none of {len(found)} judgements has a verdict; the first is"
                f" {found[0].text[:200]!r}; take another --judge-model, and another --output"
            )
        return found

    def _ask(self, missing: dict[str, Messages], known: AnswerFile) -> None:
        """Ask side by side; keep each judgement as it comes."""
        failure: DataError | None = None
        endpoint = self._connect(self._settings)
        pool = ThreadPoolExecutor(self._settings.concurrency, thread_name_prefix="judge")
        try:
            futures: dict[Future[str], str] = {
                pool.submit(endpoint.ask, messages, max_tokens=_MAX_TOKENS): key
                for key, messages in missing.items()
            }
            for number, future in enumerate(as_completed(futures), start=1):
                try:
                    known.add({futures[future]: [future.result()]})
                except JudgeStoppedError:
                    continue
                except DataError as error:
                    failure = error
                if number % _PROGRESS == 0 or number == len(futures):
                    logger.info("the judge was asked %d of %d", number, len(futures))
        finally:
            endpoint.stop()
            pool.shutdown(cancel_futures=True)
        if failure is not None:
            raise failure


def _text(kept: object) -> str:
    if isinstance(kept, list) and kept and isinstance(kept[0], str):
        return kept[0]
    raise DataError(
        f"{JUDGEMENTS_NAME} has a judgement that is no text; move the file away, and start again"
    )
