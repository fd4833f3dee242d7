"""Errors a user can act on: the command line prints them as one line and exits with their code."""

from __future__ import annotations


class UserError(Exception):
    """Something outside the program is wrong: a file, a run, a machine. Exit code 1.

    The message says what was read, where, what was expected, what was found and what to do.
    """

    exit_code = 1


class ConfigError(UserError):
    """A flag, a configuration key or a value is wrong. Exit code 2."""

    exit_code = 2
