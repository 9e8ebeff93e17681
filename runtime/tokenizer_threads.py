"""Threads of the tokenizers library.

The library reads TOKENIZERS_PARALLELISM at each call: whether it encodes a batch on all cores. It
must not do so in worker processes, and warns after each fork if it has done so. Therefore its own
threads are turned off, and tokenization/tokenizer.py divides a batch among threads where that is
wanted and the user has not forbidden it by the same variable.
"""

import os

VARIABLE = "TOKENIZERS_PARALLELISM"


def forbids_threads(value: str) -> bool:
    """Whether a value of the variable forbids threads."""
    return value.lower() in ("false", "0", "no", "off")


FORBIDDEN_BY_USER = forbids_threads(os.environ.get(VARIABLE, ""))  # before it is set below


def set_library_threads(enabled: bool) -> None:
    """Turn the library's own threads on or off, in this process and in those that it starts."""
    os.environ[VARIABLE] = str(enabled).lower()


def disable_library_threads() -> None:
    """Turn the library's own threads off, in this process and in those that it starts."""
    set_library_threads(False)
