"""Errors whose message is all that the user needs to see."""

import re

_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """Text with control characters spelled out, except ends of lines and tabs.

    Names out of files stand in messages; a terminal would act on the characters in them.
    """
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


class UserError(Exception):
    """Something the user gave us is wrong; the message says what, both values, rule and remedy.

    `launch.run_main` prints such an error once, on rank 0, without a traceback, and ends every
    rank with exit status 2.
    """

    is_local = False
    """Set on an error that this rank alone may have met: then this rank prints it too."""


class ConfigError(UserError):
    """A flag, a recipe key or a combination of them is wrong."""


class DataError(UserError):
    """A dataset or tokenizer on disk is missing, damaged or does not fit the model."""


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, unsafe or does not fit the model."""


class TrainingError(UserError):
    """Training cannot go on: a loss that is not a number, for example."""


class StepRefusedError(TrainingError):
    """One more step than may be skipped was too bad to take."""
