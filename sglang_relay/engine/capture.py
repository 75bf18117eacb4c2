"""Writes the values of finished requests to files, on a private server that measures (``sglang-relay profile``).

Only where ``RELAY_CAPTURE_DIR`` names a folder. A request says ``custom_params: {"relay_capture": NAME}``; without the
variable that changes nothing.
"""

from __future__ import annotations

import logging
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch.distributed as dist

from sglang_relay.config import ConfigError
from sglang_relay.plan import Decline

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams

logger = logging.getLogger(__name__)

CAPTURE_ENV = "RELAY_CAPTURE_DIR"
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


def capture_name(params: Any) -> str | None:
    """The name under which a request wants its values written. Raises Decline("bad_custom_params")."""
    name = params.get("relay_capture") if isinstance(params, Mapping) else None
    if name is not None and not (isinstance(name, str) and _NAME.fullmatch(name)):
        raise Decline("bad_custom_params", f"relay_capture={name!r}: allowed is a text that matches {_NAME.pattern}")
    return name


class Capture:
    """Reads slots while the request still owns them; changes nothing."""

    def __init__(self, folder: Path, params: CacheInitParams) -> None:
        self._folder = folder
        self._rows = params.req_to_token_pool
        self._pool: Any = params.token_to_kv_pool_allocator.get_kvcache()
        logger.warning("relay: values of requests that ask for it are written to %s (%s)", folder, CAPTURE_ENV)

    @classmethod
    def from_env(cls, env: Mapping[str, str], params: CacheInitParams) -> Capture | None:
        """None without ``RELAY_CAPTURE_DIR``. Raises ConfigError, which ends the start-up, where it cannot work."""
        if not (folder := env.get(CAPTURE_ENV)):
            return None
        group = params.tp_cache_group
        if group is not None and dist.get_world_size(group) > 1:
            raise ConfigError(
                f"{CAPTURE_ENV}={folder}: each rank holds some heads only; start the server with --tp-size 1"
            )
        if not hasattr(params.token_to_kv_pool_allocator.get_kvcache(), "v_buffer"):
            raise ConfigError(f"{CAPTURE_ENV}={folder}: this model keeps no values per layer and head")
        if not Path(folder).is_dir():
            raise ConfigError(f"{CAPTURE_ENV}={folder}: no such folder")
        return cls(Path(folder), params)

    def take(self, req: Req, length: int) -> None:
        """Write the values of the first ``length`` tokens of ``req``, if it asks for them, to ``NAME.npz`` in one step.

        ``v``: float32 [layers, length, heads, head_dim]; ``tokens``: int64 [length]. A failure is logged: a request
        never fails by it, and the client misses the file.
        """
        try:
            name = capture_name(req.sampling_params.custom_params)
            if name is not None:
                slots = self._rows.req_to_token[req.kv.req_pool_idx, :length].long()
                values = np.stack([buffer[slots].float().cpu().numpy() for buffer in self._pool.v_buffer])
                self._write(name, v=values, tokens=np.array(req.full_untruncated_fill_ids[:length], dtype=np.int64))
        except Exception as error:
            logger.error("relay: the capture failed", exc_info=error)

    def _write(self, name: str, **arrays: np.ndarray) -> None:
        handle, partial = tempfile.mkstemp(prefix=f".{name}.", dir=self._folder)
        with os.fdopen(handle, "wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
        Path(partial).replace(self._folder / f"{name}.npz")
