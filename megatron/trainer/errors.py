"""Defines errors whose message is all that the user needs to see."""

import re

_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """Spell out the control characters of a text, except newlines and tabs.

    Messages hold names read from files; a terminal would act on control characters in them.
    """
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


class UserError(Exception):
    """Reports wrong input of the user; the message says what, the values, the rule and a remedy.

    `launch.run_main` prints such an error once, on rank 0, without a traceback, and ends every
    rank with exit status 2.
    """

    is_local = False
    """Set on an error that may have occurred on this rank alone: then this rank prints it too."""


class ConfigError(UserError):
    """Reports a wrong flag, recipe key or combination of them."""


class DataError(UserError):
    """Reports a dataset or tokenizer that is missing, damaged or does not fit the model."""


class CheckpointError(UserError):
    """Reports a checkpoint that is missing, damaged, unsafe or does not fit the model."""


class TrainingError(UserError):
    """Reports that training cannot go on: a loss that is not a number, for example."""


class StepRefusedError(TrainingError):
    """Reports a bad step after as many as may be skipped."""
