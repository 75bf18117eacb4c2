"""What a server knows of the model that it serves."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from tiny_model import make_tiny_llama

from sglang_relay.config import ConfigError, LayerRange, RelayConfig
from sglang_relay.engine.served import served_identity, with_profile
from sglang_relay.identity import identify
from sglang_relay.profile.file import make_profile


@pytest.fixture
def args(tmp_path: Path) -> Any:
    """What is read of SGLang's ServerArgs."""
    model = str(make_tiny_llama(tmp_path / "model"))
    return SimpleNamespace(model_path=model, revision=None, dtype="float32", quantization=None, kv_cache_dtype="auto")


@pytest.fixture
def profile(tmp_path: Path, args: Any) -> str:
    """Of the served model, with range 1,2,4."""
    made = make_profile(served_identity(args), [np.zeros((3, 6), np.float32)], data="a test", made="")
    file = tmp_path / "profile.json"
    msgspec.structs.replace(made, start=1, detect=2, end=4).save(file)
    return str(file)


def test_the_identity_is_that_of_the_checkpoint(args: Any) -> None:
    assert served_identity(args) == identify(args.model_path, dtype="float32")


def test_the_profile_s_range_is_used(args: Any, profile: str) -> None:
    config = with_profile(RelayConfig(profile=profile), args)
    assert config == RelayConfig(profile=profile, layer_range=LayerRange(1, 2, 4))


def test_a_range_that_the_operator_names_is_stronger(args: Any, profile: str) -> None:
    named = RelayConfig(profile=profile, layer_range=LayerRange(0, 1, 5))
    assert with_profile(named, args) == named
    assert with_profile(RelayConfig(), args) == RelayConfig()


def test_a_profile_of_another_model_ends_the_start(tmp_path: Path, args: Any, profile: str) -> None:
    args.dtype = "bfloat16"
    with pytest.raises(ConfigError, match=r"profile=.*profile\.json.*another dtype: .*float32.*bfloat16"):
        with_profile(RelayConfig(profile=profile), args)
    args.dtype, args.model_path = "float32", str(make_tiny_llama(tmp_path / "other", seed=9))
    with pytest.raises(ConfigError, match=r"for another model: .* weights: "):
        with_profile(RelayConfig(profile=profile), args)


@pytest.mark.parametrize("text", [None, "{}"])
def test_a_file_that_is_no_profile_ends_the_start(tmp_path: Path, args: Any, text: str | None) -> None:
    file = tmp_path / "odd.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=r"profile=.*odd\.json"):
        with_profile(RelayConfig(profile=str(file)), args)
