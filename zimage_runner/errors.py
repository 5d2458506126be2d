"""Errors that a user can act on."""

from __future__ import annotations


class UserError(Exception):
    """Bad configuration or input: shown as one line on stderr, exit code 2, nothing started.

    The message names the field or ``file:line``, the value, and what to write instead.
    """


class BadPictureError(RuntimeError):
    """A picture that must not be saved as good: NaN or Inf in it, or a single colour throughout."""
