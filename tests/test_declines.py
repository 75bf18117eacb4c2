"""The table of declines names what the sources decline, and the page in docs/ is the table."""

from __future__ import annotations

from pathlib import Path

import pytest
from reasons import Unreadable, found_in

from sglang_relay.declines import SECTIONS, page

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "sglang_relay"
NO_SOURCES = ("declines.py", "engine/report.py", "engine/doctor.py", "profile/file.py")
"""The table itself, what counts and shows reasons and gives none, and what means other reasons."""


def _sources() -> list[Path]:
    apart = [PACKAGE / name for name in NO_SOURCES]
    assert all(file.exists() for file in apart)
    return sorted(set(PACKAGE.rglob("*.py")) - set(apart))


def test_the_table_has_every_reason_and_no_other() -> None:
    listed = [name for _, _, reasons in SECTIONS for name in reasons]
    assert len(listed) == len(set(listed)), "each reason stands in one section"
    assert set(listed) == found_in(_sources())


def test_each_reason_has_a_cause_and_a_remedy_in_sentences() -> None:
    for _, _, reasons in SECTIONS:
        for name, reason in reasons.items():
            for text in reason:
                assert text.endswith(".") and "|" not in text and len(text) < 260, name


def test_the_page_is_the_table() -> None:
    """Else: python -m sglang_relay.declines > docs/declines.md"""
    assert (ROOT / "docs" / "declines.md").read_text(encoding="utf-8") == page()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('return "host_cache_load"', 'return "new_reason"'),
        ('("lora", req.lora_id is not None)', '("new_reason", req.lora_id is not None)'),
        ('reasons.append("padded_batches")', 'reasons.append("new_reason")'),
        ('state.shortfall = "predicted_slower"', 'state.shortfall = "new_reason"'),
        ('raise Decline("pool_pressure",', 'text = "new_reason"\n            raise Decline(text,'),
        ('raise Decline("pool_pressure",', 'raise Decline(reason="new_reason", detail='),
        ('return report | {"exact": cached,', 'return report | {"declined": "new_reason", "exact": cached,'),
        ('decline(state, "other_policy_in_batch")', 'decline(state, "new_reason")'),
        ('reason or "ranks_disagree"', 'reason or "new_reason"'),
        ('relay.failure(step, error)', 'relay.failure("new_reason", error)'),
        ('AUDITED = "audited"', 'AUDITED = "new_reason"'),
        ('DIFFERS = "layer_split_differs"', 'DIFFERS = "new_reason"'),
        ('"lora_ids": "lora_in_batch"', '"lora_ids": "new_reason"'),
        ('["hook_missing"]', '["new_reason"]'),
        ('"embeddings:not_held"', '"embeddings:new_reason"'),
    ],
)  # fmt: skip
@pytest.mark.slow
def test_a_new_reason_is_found_wherever_it_stands(tmp_path: Path, old: str, new: str) -> None:
    copies, changed = [], 0
    for number, file in enumerate(_sources()):
        text = file.read_text(encoding="utf-8")
        changed += old in text
        copies.append(tmp_path / f"{number}.py")
        copies[-1].write_text(text.replace(old, new), encoding="utf-8")
    assert changed, f"nothing here reads {old}"
    assert {name.removeprefix("internal_error:") for name in found_in(copies)} >= {"new_reason"}


def test_a_reason_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "hidden.py"
    file.write_text('def stop(where):\n    raise Decline("_".join(("new", where)))\n', encoding="utf-8")
    with pytest.raises(Unreadable, match=r"hidden\.py:2: join\(\)"):
        found_in([file])
