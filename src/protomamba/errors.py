"""Errors a user can act on: the command line prints them as one line and exits with their code."""

from __future__ import annotations

import re

# What must not reach a terminal from a file or a name in it: ends of lines (but for our own lists, which are indented),
# escapes, and marks that turn the reading direction.
_UNPRINTABLE = re.compile("\n(?!  )|[\x00-\t\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")

# What code raises that walks through a document (a header, a manifest, a line) of another shape than it was written in.
MALFORMED = (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RecursionError)


class UserError(Exception):
    """Something outside the program is wrong: a file, a run, a machine. Exit code 1.

    The message says what was read, where, what was expected, what was found and what to do. It stays one line whatever
    it quotes: characters that a terminal would act on are escaped.
    """

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(_UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), message))


class ConfigError(UserError):
    """A flag, a configuration key or a value is wrong. Exit code 2."""

    exit_code = 2
