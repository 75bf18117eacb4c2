"""What a client can make the relay say in the log, and in its own report."""

from __future__ import annotations

import logging

import pytest

from sglang_relay.engine.log import LONGEST, MOST_TEXTS, Log, plain

logger = logging.getLogger("test_log")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("relay='maybe'", "relay='maybe'"),
        ("Größe 大", "Größe 大"),
        ("a\nrelay: on", "a\\nrelay: on"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("half \ud83d", "half \\ud83d"),
        ("\u202eturned", "\\u202eturned"),
    ],
)
def test_a_text_is_one_line_of_printable_characters(text: str, line: str) -> None:
    assert plain(text) == line


@pytest.mark.parametrize("character", ["x", "\x00"])
def test_a_text_is_short(character: str) -> None:
    assert plain(LONGEST * "x") == LONGEST * "x"
    long = plain(10**6 * character)
    assert len(long) == LONGEST and long.endswith("...")


def test_a_reason_is_logged_with_each_of_its_texts_once(caplog: pytest.LogCaptureFixture) -> None:
    log = Log(logger)
    for text in ("one", "two", "one", "two"):
        assert log.once("bad", text) == text
    log.once("worse", "one")
    assert caplog.messages == ["relay: bad: one", "relay: bad: two", "relay: worse: one"]


def test_texts_are_bounded_per_reason(caplog: pytest.LogCaptureFixture) -> None:
    log = Log(logger)
    for i in range(3 * MOST_TEXTS):
        log.once("bad", f"value {i}")
    assert len(caplog.messages) == MOST_TEXTS + 1 and "no more texts" in caplog.messages[-1]
    assert sum(map(len, log._said.values())) == MOST_TEXTS
    log.once("worse", "another")
    assert caplog.messages[-1] == "relay: worse: another"
