"""The default policy of a server: what its operator set, what its certificate allows, or the cautious one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from test_certificate import CERTIFICATE, candidate, made
from tiny_model import make_tiny_llama

from sglang_relay.breaker import UNCERTIFIED
from sglang_relay.budget import Budget
from sglang_relay.certificate import Candidate
from sglang_relay.config import ConfigError, RelayConfig, load_config
from sglang_relay.engine.certified import CONSERVATIVE, bands, choose, find_certificate, require_certificate
from sglang_relay.engine.served import require_profile
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
    assert "NO CERTIFICATE" in chosen.why and not chosen.assured


@pytest.mark.parametrize(
    ("bound", "policy", "budget"),
    [("0.05", "rotate", None), ("0.02", "legolink", Budget("tokens", 16)), ("0.005", "probe", Budget("share", 0.1))],
)
def test_the_cheapest_that_is_certified(bound: str, policy: str, budget: Budget | None) -> None:
    chosen = choose(RelayConfig(bound=bound), CERTIFICATE)
    assert chosen[:2] == (policy, budget) and chosen.assured


def test_a_budget_of_the_operator_s_must_have_been_measured() -> None:
    some = made(candidate("probe", "0.1", 4e-3, 0.1), candidate("probe", "0.3", 2e-3, 0.3))
    assert choose(RelayConfig(budget=Budget("share", 0.3)), some)[:2] == ("probe", Budget("share", 0.3))
    unmeasured = choose(RelayConfig(budget=Budget("share", 0.05)), some)
    assert unmeasured[:2] == CONSERVATIVE and "NOT MEASURED" in unmeasured.why and not unmeasured.assured


def test_what_was_measured_with_further_parameters_is_no_default() -> None:
    odd = msgspec.structs.replace(candidate("rotate", None, 1e-3, 0.0), params={"relay_correction": True})
    assert choose(RelayConfig(), made(odd, candidate("probe", "0.3", 2e-3, 0.3)))[:2] == ("probe", Budget("share", 0.3))


def test_the_paper_s_policy_is_no_default_without_its_influence() -> None:
    some = made(candidate("relay", None, 1e-3, 0.1), candidate("probe", "0.3", 2e-3, 0.3))
    assert choose(RelayConfig(), some)[:2] == ("probe", Budget("share", 0.3))
    assert choose(RelayConfig(), some, influence=True)[:2] == ("relay", None)


@pytest.mark.parametrize("bound", ["0.001", "floor"])
def test_nothing_within_the_bound_is_the_most_careful_that_was_measured(bound: str) -> None:
    """To have measured must not switch off what relays without a certificate. The upper end of the interval counts."""
    doubtful = candidate("probe", "0.3", 1.5e-3, 0.3, tail=4.0)
    some = made(candidate("rotate", None, 3e-2, 0.0), doubtful, candidate("probe", "0.2", 1.8e-3, 0.2))
    assert doubtful.figures.kl.mean.value < 1.5 * 1.8e-3 < doubtful.figures.kl.mean.high
    chosen = choose(RelayConfig(bound=bound), some)
    assert chosen[:2] == ("probe", Budget("share", 0.2)) and not chosen.assured
    assert f"NO POLICY IS WITHIN {bound}" in chosen.why and "mean KL up to 0.0018" in chosen.why


def test_where_nothing_measured_may_serve_the_cautious_one_does() -> None:
    chosen = choose(RelayConfig(bound="1"), made(candidate("relay", None, 1e-3, 0.1)))
    assert chosen[:2] == CONSERVATIVE and "NOT MEASURED" in chosen.why and not chosen.assured


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


def test_one_that_cannot_be_read_hides_no_other(tmp_path: Path, cache: Path) -> None:
    model = make_tiny_llama(tmp_path / "model")
    mine = msgspec.structs.replace(CERTIFICATE, identity=identify(model, dtype="float32"))
    file = mine.save(cache)
    file.with_name(f"{file.name.partition('-')[0]}-another.json").write_text("{")
    assert find_certificate(RelayConfig(), args(model)) == mine


WRONG: dict[str, Callable[[Candidate], Candidate]] = {
    "policy": lambda c: msgspec.structs.replace(c, policy="of a later version"),
    "budget": lambda c: msgspec.structs.replace(c, budget="lots"),
    "edge": lambda c: with_figures(c, next_kl_edge=1e300),
    "negative": lambda c: with_figures(c, next_kl_edge=-1.0),
    "share": lambda c: with_figures(c, top1=msgspec.structs.replace(c.figures.top1, high=1.5)),
    "cases": lambda c: with_figures(c, n=0),
}


def with_figures(candidate: Candidate, **changed: Any) -> Candidate:
    return msgspec.structs.replace(candidate, figures=msgspec.structs.replace(candidate.figures, **changed))


@pytest.mark.parametrize("wrong", WRONG)
def test_one_that_says_what_cannot_be_hides_no_other_and_ends_no_start(
    tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture, wrong: str
) -> None:
    model = make_tiny_llama(tmp_path / "model")
    mine = msgspec.structs.replace(CERTIFICATE, identity=identify(model, dtype="float32"))
    odd = msgspec.structs.replace(mine, candidates=(*mine.candidates, WRONG[wrong](mine.candidates[0])))
    file = mine.save(cache)
    data = msgspec.json.encode(odd)
    before = file.with_name(f"{file.name.partition('-')[0]}-!.json")
    before.write_bytes(data)
    assert before.name < file.name and find_certificate(RelayConfig(), args(model)) == mine
    file.write_bytes(data)
    before.unlink()
    assert find_certificate(RelayConfig(), args(model)) is None and "a certificate is not used" in caplog.text
    with pytest.raises(ConfigError, match="certificate="):
        require_certificate(RelayConfig(certificate=str(file)))


def test_no_band_is_so_wide_that_it_sees_nothing() -> None:
    wide = with_figures(candidate("rotate", None, 3e-2, 0.0), next_kl_edge=50.0)
    assert made(wide).band("rotate", None).edge == 1.0


@pytest.mark.parametrize("content", [None, "", "{}"])
def test_a_file_that_is_named_must_be_one_before_anything_starts(tmp_path: Path, content: str | None) -> None:
    for name, require in (("certificate", require_certificate), ("profile", require_profile)):
        require(RelayConfig())
        file = tmp_path / f"{name}.json"
        if content is not None:
            file.write_text(content)
        with pytest.raises(ConfigError, match=rf"{name}=.*{name}\.json: no readable {name}") as refused:
            require(load_config({f"SGLANG_RELAY_{name.upper()}": str(file)}))
        assert refused.value.settings == (name,)


def test_settings_of_the_checkpoint_are_read(tmp_path: Path, cache: Path) -> None:
    """``--dtype auto`` is the checkpoint's own."""
    model = make_tiny_llama(tmp_path / "model", dtype="bfloat16")
    assert json.loads((model / "config.json").read_text())["torch_dtype"] == "bfloat16"
    mine = msgspec.structs.replace(CERTIFICATE, identity=identify(model, dtype="bfloat16"))
    mine.save(cache)
    assert find_certificate(RelayConfig(), args(model, "auto")) == mine
