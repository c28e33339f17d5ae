"""Tokenises conversation files once, whoever asks first, and finds the tokens again."""

import contextlib
import errno
import functools
import hashlib
import json
import logging
import math
import os
import shutil
import socket
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from megatron.trainer.data.token_manifest import identify_tokenizer
from megatron.trainer.data.tokenizer import Tokenizer, load_tokenizer
from megatron.trainer.errors import DataError
from megatron.trainer.io.atomic_write import sync_directory
from megatron.trainer.io.bounded_read import open_regular
from megatron.trainer.io.file_lock import NO_LOCKS, wait_for_lock
from megatron.trainer.io.hashing import add_file
from moe_app.chat.chat_config import ChatDataConfig
from moe_app.chat.chat_files import check_bad_rows, find_chat_files
from moe_app.chat.chat_tokens import write_tokens
from moe_app.chat.dialogue import ChatKind, ChatTemplate
from moe_app.chat.jinja_template import TokenizerTemplate
from moe_app.chat.parallel_encoding import encoding
from moe_app.chat.samples import DialogueEncoder
from moe_app.chat.templates import TEMPLATES, BuiltinTemplate
from moe_app.chat.token_store import MANIFEST, VERSION, TokenStore, open_store
from moe_app.data.sources import CACHE_SUFFIX, SourceFile

logger = logging.getLogger(__name__)

_LITTLE_BYTES = 8 << 20
"""Of files that one process tokenises in the time in which others would start."""
_MOST_WORKERS = 16


@dataclass(frozen=True, kw_only=True)
class TokenizerChoice:
    """Says which tokenizer is used."""

    tokenizer_type: str
    """As --tokenizer-type."""
    tokenizer_model: str | None
    """As --tokenizer-model."""
    eod_token: str | None = None
    """As --eod-token."""

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """Return it; the first time it is read."""
        return load_tokenizer(self.tokenizer_type, self.tokenizer_model, eod_token=self.eod_token)


def open_template(cfg: ChatDataConfig, choice: TokenizerChoice) -> ChatTemplate:
    """Return the template that the settings name; close it after use.

    Raises:
        DataError: It is the tokenizer's, which has none.
    """
    if cfg.template in TEMPLATES:
        return BuiltinTemplate(cfg.template, choice.tokenizer)
    identity = identify_tokenizer(choice.tokenizer_type, choice.tokenizer_model or "")
    return TokenizerTemplate(identity.path.parent, choice.tokenizer)


@dataclass(frozen=True, kw_only=True)
class EncoderRecipe:
    """Says which encoder is used."""

    cfg: ChatDataConfig
    """How rows become texts."""
    choice: TokenizerChoice
    """The tokenizer."""
    seq_length: int
    """Tokens that a text may have."""

    def build(self) -> DialogueEncoder:
        """Return it; close its template after use."""
        return DialogueEncoder(
            tokenizer=self.choice.tokenizer,
            template=open_template(self.cfg, self.choice),
            train_on=self.cfg.train_on,
            seq_length=self.seq_length,
            overlong=self.cfg.overlong,
        )

    def for_others(self) -> "EncoderRecipe":
        """Return the same without the tokenizer that this process has read."""
        return replace(self, choice=replace(self.choice))


def _num_workers(cfg: ChatDataConfig, files: Sequence[SourceFile]) -> int:
    """Return the processes that tokenise."""
    if cfg.tokenize_workers is not None:
        return cfg.tokenize_workers
    if sum(Path(each.path).stat().st_size for each in files) < _LITTLE_BYTES:
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(cores or 1, _MOST_WORKERS)


def open_tokens_of(
    inputs: Sequence[str],
    kind: ChatKind,
    cfg: ChatDataConfig,
    choice: TokenizerChoice,
    *,
    seq_length: int,
    flag: str,
) -> TokenStore:
    """Return the tokens of conversation files; tokenise them where nobody has.

    Any number of processes may call this at once, on one machine or on several with a common file
    system: one tokenises, the others wait for it.

    Args:
        inputs: What `find_chat_files` takes.
        kind: What rows hold.
        cfg: How they are read.
        choice: The tokenizer.
        seq_length: Tokens that a text may have.
        flag: What names the inputs, for messages.

    Raises:
        UserError: Rows, files, the template, the tokenizer or the cache are not as they must be.
    """
    cfg.check(kind)
    files = find_chat_files(inputs, flag=flag)
    recipe = EncoderRecipe(cfg=cfg, choice=choice, seq_length=seq_length)
    encoder = recipe.build()
    with contextlib.closing(encoder.template):
        key = _key(files, kind, cfg, choice, encoder)
        # By its name nobody takes it for data, wherever it is.
        root = Path(f"{files[0].path}{CACHE_SUFFIX}")
        if cfg.data_cache:
            root = Path(cfg.data_cache) / root.name
        path = root / key[:32]
        if not (path / MANIFEST).exists():
            with _writing(root, path) as is_missing:
                if is_missing:
                    _make(path, files, kind, recipe, encoder, key=key)
    vocab_size = choice.tokenizer.vocab_size
    store = open_store(path, key=key, vocab_size=vocab_size, seq_length=seq_length)
    facts = store.facts
    check_bad_rows(int(facts["bad"]), cfg.max_bad_rows, list(facts["shown"]))
    logger.info(
        "%s: %s rows, %s tokens, %s of which count; %s too long and dropped, %s cut, %s bad; kept"
        " in %s",
        " ".join(inputs),
        *(f"{facts['rows']:,}", f"{len(store.tokens):,}", f"{facts['counted_tokens']:,}"),
        *(f"{facts['overlong']:,}", f"{facts['truncated']:,}", f"{facts['bad']:,}"),
        path,
    )
    return store


def _key(
    files: Sequence[SourceFile],
    kind: ChatKind,
    cfg: ChatDataConfig,
    choice: TokenizerChoice,
    encoder: DialogueEncoder,
) -> str:
    """Return a digest of all that tokens follow from."""
    identity = identify_tokenizer(choice.tokenizer_type, choice.tokenizer_model or "")
    tokenizer = encoder.tokenizer
    others = {"train_data", "valid_data", "packing", "max_bad_rows", "tokenize_workers"}
    others.add("data_cache")
    settings = {name: value for name, value in asdict(cfg).items() if name not in others}
    parts = {
        "version": VERSION,
        "kind": kind,
        "files": [[each.kind, _digest_of(each.path)] for each in files],
        "settings": settings,
        "seq_length": encoder.seq_length,
        "tokenizer": [identity.kind, identity.sha256, tokenizer.control_texts(), tokenizer.eod],
        "template": encoder.template.identity,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _digest_of(path: str) -> str:
    digest = hashlib.sha256()
    try:
        with open(open_regular(Path(path)), "rb") as file:
            add_file(digest, file)
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror or error}; check its permissions"
        ) from error
    return digest.hexdigest()


def _make(
    path: Path,
    files: Sequence[SourceFile],
    kind: ChatKind,
    recipe: EncoderRecipe,
    encoder: DialogueEncoder,
    *,
    key: str,
) -> None:
    """Tokenise into a directory of another name, and give it its own when it is complete."""
    temporary = path.with_name(f"{path.name}.tmp-{socket.gethostname()}-{os.getpid()}")
    logger.info("tokenising %s", ", ".join(each.path for each in files))
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        workers = _num_workers(recipe.cfg, files)
        with encoding(encoder, recipe.for_others(), workers) as encode:
            write_tokens(temporary, files, kind, recipe.cfg, encoder, encode, key=key)
        sync_directory(temporary)
        try:
            temporary.rename(path)
        except OSError as error:
            # Where there are no locks, another process may have been faster.
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
        sync_directory(path.parent)
    except OSError as error:
        raise _unwritable(path.parent, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _writing(root: Path, path: Path) -> Iterator[bool]:
    """Let one process at a time write a directory; yield whether it is still missing.

    The system gives the lock back when a process ends, however it does.

    Raises:
        DataError: Nothing can be written there.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = path.with_name(f"{path.name}.lock").open("ab")
    except OSError as error:
        raise _unwritable(root, error) from error
    with lock:
        is_locked = True
        try:
            wait_for_lock(
                lock,
                math.inf,
                on_wait=lambda: logger.info(
                    "waiting for another process, which tokenises into %s", path
                ),
            )
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise _unwritable(root, error) from error
            is_locked = False
        if is_locked:
            for left in root.glob(f"{path.name}.tmp-*"):  # by a process that was killed
                shutil.rmtree(left, ignore_errors=True)
        yield not (path / MANIFEST).exists()


def _unwritable(root: Path, error: OSError) -> DataError:
    return DataError(
        f"tokens cannot be kept in {root}: {error.strerror or error}; they are written once beside"
        " the data; make room there or let it be written to, or name another directory with"
        " --data-cache"
    )
