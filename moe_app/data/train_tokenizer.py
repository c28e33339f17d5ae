"""Train a byte-level tokenizer that decodes every text back unchanged.

    python tools/train_tokenizer.py --input data/code.jsonl data/docs.jsonl --output-dir data

Writes tokenizer.model (SentencePiece BPE with byte fallback) or tokenizer.json (byte-level BPE of
the `tokenizers` library). Neither normalises, so spaces, tabs, newlines and any Unicode survive,
except that SentencePiece stores a space as U+2581, so that character itself decodes to a space.
"""

import argparse
import io
import sys
from collections.abc import Iterator, Sequence
from itertools import cycle
from pathlib import Path

import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron.trainer.data.jsonl import TextLines, read_texts
from megatron.trainer.data.text_input import check_inputs
from megatron.trainer.data.tokenizer import END_OF_DOCUMENT, TOKENIZER_CHOICES, load_tokenizer
from megatron.trainer.errors import DataError, UserError
from megatron.trainer.io.atomic_write import write_bytes
from moe_app.command_line import argument_text, program

_PIECE_BYTES = 4096
_SENTENCEPIECE_RESERVED = "\u2581\u2585\0"
"""Characters its trainer reserves; lines that contain them are left out of the sample."""


def sample_texts(inputs: Sequence[TextLines], *, key: str, limit_bytes: int) -> Iterator[str]:
    """Yield texts from the start of each input in turn, until the limit or their end.

    Raises:
        DataError: An input cannot be read or a line holds no text under the key.
    """
    sources = dict(enumerate(read_texts(lines, key=key) for lines in inputs))
    size = 0
    for number in cycle(range(len(inputs))):
        if not sources or size >= limit_bytes:
            return
        if number not in sources:
            continue
        text = next(sources[number], None)
        if text is None:
            del sources[number]
            continue
        size += len(text.encode("utf-8"))
        yield text


def train_sentencepiece(texts: Iterator[str], vocab_size: int) -> bytes:
    """Return a SentencePiece model: BPE, byte fallback, identity normalisation.

    Runs of spaces may become pieces, so indentation is cheap; newline and tab are their bytes.

    Raises:
        DataError: The sample does not hold that many pieces, or none at all.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_short_lines(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=0.9995,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=_PIECE_BYTES,
            control_symbols=[END_OF_DOCUMENT],
            unk_id=0,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            num_threads=2,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _too_little_text(vocab_size, str(error)) from error
    return model.getvalue()


def train_hf(texts: Iterator[str], vocab_size: int) -> bytes:
    """Return a tokenizers JSON: byte-level BPE without a space put before the text.

    Raises:
        DataError: The sample does not hold that many pieces.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise _too_little_text(vocab_size, f"{tokenizer.get_vocab_size()} pieces came out")
    data: str = tokenizer.to_str(pretty=True)
    return data.encode("utf-8")


def _short_lines(texts: Iterator[str]) -> Iterator[str]:
    """Yield the lines of texts that SentencePiece's trainer takes."""
    for text in texts:
        for line in text.splitlines():
            reserved = any(char in line for char in _SENTENCEPIECE_RESERVED)
            if line and not reserved and len(line.encode("utf-8")) <= _PIECE_BYTES:
                yield line


def _too_little_text(vocab_size: int, reason: str) -> DataError:
    """Return the error for a vocabulary that the sample cannot fill."""
    return DataError(
        f"--vocab-size {vocab_size} does not fit the input ({reason}); it must be above 256 bytes"
        " and the special pieces, and the text must hold that many pieces; change it or give more"
        " text"
    )


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog=program("train_tokenizer", command="train-tokenizer"),
        description="Train a tokenizer on JSON Lines; it gives every text back unchanged.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="FILE",
        help="JSON Lines; plain, gzip or zstd; - is standard input; the sample takes a text of each"
        " in turn",
    )
    parser.add_argument(
        "--json-key", type=argument_text, default="text", metavar="KEY", help="where the text is"
    )
    parser.add_argument(
        "--output-dir",
        required=True,
        metavar="DIR",
        help="gets tokenizer.model or tokenizer.json",
    )
    parser.add_argument("--vocab-size", type=int, default=4096, metavar="N", help="token ids")
    parser.add_argument(
        "--tokenizer-type",
        choices=TOKENIZER_CHOICES,
        default="SentencePieceTokenizer",
        help="SentencePiece BPE with byte fallback, or byte-level BPE of `tokenizers`",
    )
    parser.add_argument(
        "--sample-megabytes", type=float, default=10.0, metavar="N", help="text to train on"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; return 0, or 2 after printing what is wrong."""
    args = parse_args(argv)
    is_sentencepiece = args.tokenizer_type == "SentencePieceTokenizer"
    train = train_sentencepiece if is_sentencepiece else train_hf
    path = Path(args.output_dir) / ("tokenizer.model" if is_sentencepiece else "tokenizer.json")
    try:
        limit_bytes = int(args.sample_megabytes * 1e6)
        check_inputs(args.input)
        inputs = [TextLines(path) for path in args.input]
        texts = sample_texts(inputs, key=args.json_key, limit_bytes=limit_bytes)
        data = train(texts, args.vocab_size)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, data)
        tokenizer = load_tokenizer(args.tokenizer_type, str(path), eod_token=END_OF_DOCUMENT)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    num_blank = sum(each.num_blank for each in inputs)
    skipped = f"; {num_blank:,} blank lines skipped" if num_blank else ""
    print(f"{path}: {tokenizer.vocab_size} pieces, {END_OF_DOCUMENT} is {tokenizer.eod}{skipped}")
    return 0
