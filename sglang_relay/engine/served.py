"""The model that a server serves, and what was measured of it: its identity, and the layer range of its profile."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang_relay.config import ConfigError, RelayConfig
from sglang_relay.identity import Identity, IdentityError, checkpoint_folder, dtype_name, identify

if TYPE_CHECKING:
    from sglang_relay.profile.file import Profile


def served_identity(args: Any) -> Identity:
    """args: fields of sglang's ServerArgs, resolved. Raises IdentityError, OSError, ValueError."""
    folder = checkpoint_folder(args.model_path, args.revision)
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    dtype = dtype_name(settings, args.dtype, quantization=args.quantization, kv=args.kv_cache_dtype)
    return identify(args.model_path, dtype=dtype, revision=args.revision)


def require_profile(config: RelayConfig) -> None:
    """Raise ConfigError where ``config`` names a profile that cannot be read, whatever it was made for."""
    if config.profile is not None:
        _profile(config.profile, None)


def with_profile(config: RelayConfig, args: Any) -> RelayConfig:
    """``config`` with the layer range of the profile that it names, unless it names a range itself.

    Raises ConfigError, which ends the start-up, for a profile that cannot be read or was made for something else.
    """
    if config.profile is None or config.layer_range is not None:
        return config
    return replace(config, layer_range=_profile(config.profile, args).layers)


def _profile(named: str, args: Any | None) -> Profile:
    """args: as above, of the server that the profile must have been made for; None for any."""
    from sglang_relay.profile.file import ProfileError, read_profile

    try:
        return read_profile(Path(named).expanduser(), None if args is None else served_identity(args))
    except (IdentityError, ProfileError, OSError, ValueError) as error:
        raise ConfigError(f"profile={named}: {error}", "profile") from error
