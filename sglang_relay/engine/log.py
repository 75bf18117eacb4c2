"""What the relay says in the log: everything once, and never more than a client may make it say."""

from __future__ import annotations

import logging

MOST_TEXTS = 32
"""Texts per reason that are logged and remembered; requests can make up any number of them."""
LONGEST = 300
"""Characters of a text, in the log and in a report."""


def plain(text: str) -> str:
    """``text``, of which a client's values may be part, as one short line of printable characters."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[: LONGEST + 1])
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 3]}..."


class Log:
    """What one scheduler process has said so far."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._said: dict[str, set[str]] = {}

    def once(self, reason: str, text: str) -> str:
        """Log ``text`` unless this ``reason`` was logged with it, or with too many others. Returns it, made `plain`."""
        text, said = plain(text), self._said.setdefault(reason, set())
        if text not in said and len(said) < MOST_TEXTS:
            said.add(text)
            self._logger.warning("relay: %s: %s", reason, text)
            if len(said) == MOST_TEXTS:
                self._logger.warning("relay: %s: no more texts of this reason are logged", reason)
        return text

    def failure(self, where: str, error: BaseException) -> None:
        """A host failure, with its traceback; once per step and kind of error."""
        said = self._said.setdefault(f"failure:{where}", set())
        if (kind := type(error).__name__) not in said:
            said.add(kind)
            self._logger.error("relay: %s failed; served by the stock path", where, exc_info=error)
