"""Ports for process groups of tests."""

import random
import socket

_RANDOM = random.SystemRandom()


def free_port() -> int:
    """A port that nobody listens on.

    It lies below those that the system hands out for connections: one of these could be taken by
    anybody's connection between now and its use.
    """
    while True:
        port = _RANDOM.randrange(20000, 32000)
        with socket.socket() as free:
            try:
                free.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
