"""The model that a server serves, and what was measured of it: its identity, and the layer range of its profile."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from sglang_relay.config import ConfigError, RelayConfig
from sglang_relay.identity import Identity, IdentityError, checkpoint_folder, dtype_name, identify


def served_identity(args: Any) -> Identity:
    """args: fields of sglang's ServerArgs, resolved. Raises IdentityError, OSError, ValueError."""
    folder = checkpoint_folder(args.model_path, args.revision)
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    dtype = dtype_name(settings, args.dtype, quantization=args.quantization, kv=args.kv_cache_dtype)
    return identify(args.model_path, dtype=dtype, revision=args.revision)


def with_profile(config: RelayConfig, args: Any) -> RelayConfig:
    """``config`` with the layer range of the profile that it names, unless it names a range itself.

    Raises ConfigError, which ends the start-up, for a profile that cannot be read or was made for something else.
    """
    if config.profile is None or config.layer_range is not None:
        return config
    from sglang_relay.profile.file import ProfileError, read_profile

    try:
        profile = read_profile(Path(config.profile).expanduser(), served_identity(args))
    except (IdentityError, ProfileError, OSError, ValueError) as error:
        raise ConfigError(f"profile={config.profile}: {error}") from error
    return replace(config, layer_range=profile.layers)
