"""Profile files: what they say survives, what they were not made for is refused, and they can be read and seen."""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest

from sglang_relay.config import LayerRange
from sglang_relay.identity import Identity, IdentityError
from sglang_relay.profile.file import Profile, ProfileError, make_profile, read_profile
from sglang_relay.profile.picture import draw, table

IDENTITY = Identity("org/name", "abc", "sha256:00", "bfloat16", "0.5.23", "0.1.0")


def made(texts: int = 3, tokens: int = 300) -> Profile:
    """Twelve layers, shallow up to layer 2, no recovery; the first four tokens deviate ten times as much."""
    rng = np.random.default_rng(0)
    layer = np.array([0.0, 0.001, 0.002, *np.linspace(0.02, 0.06, 9)])
    fields = []
    for _ in range(texts):
        field = layer * rng.uniform(0.5, 1.5, (tokens, 1)) * rng.uniform(0.9, 1.1, (tokens, 12))
        field[:4] *= 10
        fields.append(field.astype(np.float32))
    return make_profile(IDENTITY, fields, data="a test", made="2026-11-24")


PROFILE = made()


def test_a_file_holds_everything(tmp_path: Path) -> None:
    PROFILE.save(tmp_path / "new" / "profile.json")
    assert read_profile(tmp_path / "new" / "profile.json", IDENTITY) == PROFILE


@pytest.mark.parametrize("name", Identity.__struct_fields__)
def test_any_other_identity_is_refused_by_the_field_s_name(tmp_path: Path, name: str) -> None:
    PROFILE.save(tmp_path / "profile.json")
    with pytest.raises(IdentityError, match=rf"the profile .*profile.json was made for another {name}: "):
        read_profile(tmp_path / "profile.json", msgspec.structs.replace(IDENTITY, **{name: "other"}))


@pytest.mark.parametrize(
    ("old", "new"), [("profile 1", "profile 2"), ('"end"', '"fin"'), ("{", ""), ("similarity", "s")]
)
def test_a_file_that_is_no_profile_is_refused_by_name(tmp_path: Path, old: str, new: str) -> None:
    file = tmp_path / "profile.json"
    PROFILE.save(file)
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))
    with pytest.raises(ProfileError, match=r"profile\.json"):
        read_profile(file)
    with pytest.raises(ProfileError, match=r"gone\.json"):
        read_profile(tmp_path / "gone.json")


def test_a_profile_holds_range_curves_and_heat() -> None:
    assert PROFILE.layers == LayerRange(2, PROFILE.detect, 11)
    assert "no recovery" in PROFILE.reasons.end
    assert (PROFILE.texts, PROFILE.tokens) == (3, 900)
    assert PROFILE.rank_correlation[0] is None and PROFILE.curvature[3] is not None
    assert PROFILE.edges == (0, 4, 16, 32, 64, 128, 256)
    heat = np.array(PROFILE.heat)
    assert heat.shape == (7, 12)
    assert heat[0, 3:].mean() / heat[1:, 3:].mean() == pytest.approx(10, rel=0.2)


def test_texts_of_different_lengths_are_binned_from_their_own_start() -> None:
    short, long = np.full((10, 4), 0.5, np.float32), np.full((40, 4), 0.1, np.float32)
    profile = make_profile(IDENTITY, [short, long], data="", made="")
    assert profile.edges == (0, 4, 16, 32)
    by_hand = [0.3, (6 * 0.5 + 12 * 0.1) / 18, 0.1, 0.1]
    assert [row[0] for row in profile.heat] == pytest.approx(by_hand)


@pytest.mark.parametrize("fields", [[], [np.full((5, 3), np.nan, np.float32)], [np.zeros((2, 3), np.float32)]])
def test_nothing_to_profile(fields: list[np.ndarray]) -> None:
    with pytest.raises(ProfileError, match="nothing to profile"):
        make_profile(IDENTITY, fields, data="", made="")


def test_the_table_says_range_reasons_and_every_layer() -> None:
    lines = table(PROFILE).splitlines()
    assert lines[1] == f"layer range 2,{PROFILE.detect},11 (start,detect,end; layers count from 0)"
    assert PROFILE.reasons.start in lines[2] and PROFILE.reasons.end in lines[4]
    rows = [line.split() for line in lines[-12:]]
    assert [row[0] for row in rows] == [str(layer) for layer in range(12)]
    assert rows[11][-1] == "end" and "start" in rows[2] and "detect" in rows[PROFILE.detect]
    assert rows[5][1] == f"{PROFILE.similarity[5]:.4f}" and rows[5][4] == f"{PROFILE.heat[0][5]:.4f}"
    assert "256+" in lines[-13] and "4-15" in lines[-13]


def test_the_picture_is_a_png_that_shows_the_profile(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    flat = make_profile(IDENTITY, [np.zeros((5, 3), np.float32)], data="", made="")
    draw(flat, tmp_path / "flat.png")
    draw(PROFILE, tmp_path / "new" / "picture.png")
    data = (tmp_path / "new" / "picture.png").read_bytes()
    assert data.startswith(b"\x89PNG") and len(data) > 20_000


def test_without_matplotlib_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib", "matplotlib.colors"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ProfileError, match=r"pip install 'sglang-relay\[plot\]'"):
        draw(PROFILE, tmp_path / "picture.png")
