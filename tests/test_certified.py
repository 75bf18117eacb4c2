"""The default policy of a server: what its operator set, what its certificate allows, or the cautious one."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from test_certificate import CERTIFICATE, candidate, made
from tiny_model import make_tiny_llama

from sglang_relay.breaker import UNCERTIFIED
from sglang_relay.budget import Budget
from sglang_relay.config import ConfigError, RelayConfig
from sglang_relay.engine.certified import CONSERVATIVE, bands, choose, find_certificate
from sglang_relay.identity import identify


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "sglang-relay" / "certificates"


def args(model: Path, dtype: str = "float32") -> Any:
    """What is read of SGLang's ServerArgs."""
    return SimpleNamespace(model_path=str(model), revision=None, dtype=dtype, quantization=None, kv_cache_dtype="auto")


def test_the_operator_s_policy_wins() -> None:
    assert choose(RelayConfig(policy="rotate"), CERTIFICATE)[:2] == ("rotate", None)


def test_without_a_certificate_the_cautious_one_and_it_says_so() -> None:
    chosen = choose(RelayConfig(), None)
    assert chosen[:2] == CONSERVATIVE == ("probe", Budget("share", 0.3))
    assert "NO CERTIFICATE" in chosen.why


@pytest.mark.parametrize(
    ("bound", "policy", "budget"),
    [("0.05", "rotate", None), ("0.02", "legolink", Budget("tokens", 16)), ("0.005", "probe", Budget("share", 0.1))],
)
def test_the_cheapest_that_is_certified(bound: str, policy: str, budget: Budget | None) -> None:
    assert choose(RelayConfig(bound=bound), CERTIFICATE)[:2] == (policy, budget)


def test_a_budget_of_the_operator_s_must_have_been_measured() -> None:
    some = made(candidate("probe", "0.1", 4e-3, 0.1), candidate("probe", "0.3", 2e-3, 0.3))
    assert choose(RelayConfig(budget=Budget("share", 0.3)), some)[:2] == ("probe", Budget("share", 0.3))
    assert choose(RelayConfig(budget=Budget("share", 0.05)), some)[:2] == (None, None)


def test_what_was_measured_with_further_parameters_is_no_default() -> None:
    odd = msgspec.structs.replace(candidate("rotate", None, 1e-3, 0.0), params={"relay_correction": True})
    assert choose(RelayConfig(), made(odd, candidate("probe", "0.3", 2e-3, 0.3)))[:2] == ("probe", Budget("share", 0.3))


def test_the_paper_s_policy_is_no_default_without_its_influence() -> None:
    some = made(candidate("relay", None, 1e-3, 0.1), candidate("probe", "0.3", 2e-3, 0.3))
    assert choose(RelayConfig(), some)[:2] == ("probe", Budget("share", 0.3))
    assert choose(RelayConfig(), some, influence=True)[:2] == ("relay", None)


def test_nothing_within_the_bound_is_no_policy() -> None:
    chosen = choose(RelayConfig(bound="0.001"), made(candidate("rotate", None, 3e-2, 0.0)))
    assert chosen[:2] == (None, None) and "allows no policy within 0.001" in chosen.why


def test_bands_are_the_certificate_s() -> None:
    band_of = bands(CERTIFICATE)
    assert band_of("probe@0.3") == CERTIFICATE.band("probe", "0.3") != UNCERTIFIED
    assert band_of("rotate") == CERTIFICATE.band("rotate", None)
    assert band_of("relay") == bands(None)("probe@0.3") == UNCERTIFIED


def test_a_certificate_is_found_by_the_weights(tmp_path: Path, cache: Path) -> None:
    model = make_tiny_llama(tmp_path / "model")
    assert find_certificate(RelayConfig(), args(model)) is None
    mine = msgspec.structs.replace(CERTIFICATE, identity=identify(model, dtype="float32"))
    mine.save(cache)
    assert find_certificate(RelayConfig(), args(model)) == mine
    assert find_certificate(RelayConfig(certificate=str(cache)), args(model)) == mine
    other = make_tiny_llama(tmp_path / "other", seed=1)
    assert find_certificate(RelayConfig(), args(other)) is None


def test_one_that_does_not_fit_is_left_out_if_found_and_refused_if_named(
    tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_tiny_llama(tmp_path / "model")
    msgspec.structs.replace(CERTIFICATE, identity=identify(model, dtype="float32")).save(cache)
    assert find_certificate(RelayConfig(), args(model, "bfloat16")) is None
    assert "dtype: 'float32', not 'bfloat16'" in caplog.text
    with pytest.raises(ConfigError, match=r"certificate=.*dtype: 'float32', not 'bfloat16'"):
        find_certificate(RelayConfig(certificate=str(cache)), args(model, "bfloat16"))
    with pytest.raises(ConfigError, match="certificate="):
        find_certificate(RelayConfig(certificate=str(tmp_path / "nowhere.json")), args(model))


def test_settings_of_the_checkpoint_are_read(tmp_path: Path, cache: Path) -> None:
    """``--dtype auto`` is the checkpoint's own."""
    model = make_tiny_llama(tmp_path / "model", dtype="bfloat16")
    assert json.loads((model / "config.json").read_text())["torch_dtype"] == "bfloat16"
    mine = msgspec.structs.replace(CERTIFICATE, identity=identify(model, dtype="bfloat16"))
    mine.save(cache)
    assert find_certificate(RelayConfig(), args(model, "auto")) == mine
