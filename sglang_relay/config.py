"""The one validated, frozen configuration object of the relay.

Weight of the sources, later ones win: defaults, the JSON file that ``SGLANG_RELAY_CONFIG`` names,
``SGLANG_RELAY_<NAME>`` environment variables. The ``--relay-<name>`` flags become environment
variables in the launcher (``engine/plugin.py``), so that every process sees the same values.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sglang_relay.budget import ALLOWED as BUDGETS
from sglang_relay.budget import Budget, parse_budget

ENV_PREFIX = "SGLANG_RELAY_"
CONFIG_ENV = "SGLANG_RELAY_CONFIG"

MOST_QUOTE_TOKENS = 1024

POLICIES = ("probe", "probe_only", "relay", "cacheblend", "legolink", "rotate", "full")


class ConfigError(ValueError):
    """A setting has a value that is not allowed; the text names setting, value and what is allowed.

    settings: the names of those that are wrong, or do not fit together, where the text does not say who set them.
    """

    def __init__(self, text: str, *settings: str) -> None:
        super().__init__(text)
        self.settings = settings


@dataclass(frozen=True, slots=True)
class LayerRange:
    """Layers of the paper's policy (method.md, "When the consumer prefills"), 0-based, inclusive.

    ``start``: first layer whose cached K/V are no longer trusted (only the entry from hidden states reads it);
    ``detect``: layer at which the value deviation is measured; ``end``: last layer that selected tokens pass.
    """

    start: int
    detect: int
    end: int

    def __str__(self) -> str:
        return f"{self.start},{self.detect},{self.end}"


@dataclass(frozen=True, slots=True)
class RelayConfig:
    """Settings of one server.

    policy: recompute policy that a request gets when it names none; ``auto``: what the certificate allows within
    ``bound`` (``floor`` or a mean KL in nats), and without a certificate a conservative one.
    certificate: file or folder of certificates; None looks in the user's cache.
    audit_every: one relayed request in this many is also computed exactly, and served so; 0 for none.
    layer_range: ``start,detect,end`` of policy ``relay``; None takes that of ``profile``, without one
    ``1,3,last``.
    profile: file of ``sglang-relay profile``, made for the model that is served.
    tau_dev: a token is recomputed when its value deviation is at least ``tau_dev`` times its segment's mean.
    influence: layers of which decode influence is collected for policy ``relay``: ``FIRST,LAST``, ``auto`` (all, as in
    the paper), or ``off``.
    tau_inf: a token is recomputed when its influence is at least ``tau_inf`` times its segment's mean.
    entry: where a reused segment enters under policy ``relay``: ``embeddings``, or ``hidden``: at the first layer of
    ``layer_range``, with the hidden states that are then kept per KV slot.
    suffix: the last tokens of every segment are always recomputed.
    budget: how much a policy may recompute (``budget.py``) where the request does not say; None: the policy's own.
    probe_queries: most of a prompt's last fresh tokens that look at the segments under ``probe``.
    route_above: a prompt with this many fresh tokens behind its last segment per reused token, or more, is prefilled in
    full under ``probe``: most of it has to be computed anyway.
    quote_tokens: how far ahead, in tokens at most, what an answer quotes of a reused segment is recomputed while it
    decodes under ``probe`` (``quotes.py``); 0 for never.
    cost_model: whether a prompt is relayed only where that is predicted to save time (``cost.py``).
    attention: what computes attention of scattered rows: ``torch``, ``flashinfer``, ``triton``, or ``auto``:
    flashinfer and triton, chosen for each pass, or what of them works, else torch; torch without a CUDA device.
    graphs: whether whole passes replay SGLang's captured prefill graphs where they fit: ``auto`` or ``off``.
    report: what a request's answer says of it: ``full``; ``coarse``, without lengths and times; ``none``; or ``auto``:
    coarse on an isolated server, else full.
    default: what a request without ``custom_params.relay`` gets: ``on``, ``exact`` or ``off``.
    donate: what a finished request offers to others: its ``output``, ``all`` of its tokens, or ``none``.
    min_segment: shortest run of equal tokens, in tokens, that is reused.
    min_relayed: fewest reusable tokens in a prompt for which relay is worth its fixed cost.
    max_segments: most segments per prompt.
    max_depth: greatest approximation depth of a donor.
    window, stride: length and spacing, in tokens, of the hashed windows of a donor.
    index_bytes: most bytes the content index may hold.
    """

    policy: str = "auto"
    bound: str = "0.005"
    certificate: str | None = None
    audit_every: int = 200
    layer_range: LayerRange | None = None
    profile: str | None = None
    tau_dev: float = 1.5
    influence: str = "off"
    tau_inf: float = 1.45
    entry: str = "embeddings"
    suffix: int = 10
    budget: Budget | None = None
    probe_queries: int = 8
    route_above: float = 1.0
    quote_tokens: int = 8
    cost_model: bool = True
    attention: str = "auto"
    graphs: str = "off"
    report: str = "auto"
    default: str = "on"
    donate: str = "output"
    min_segment: int = 32
    min_relayed: int = 64
    max_segments: int = 64
    max_depth: int = 4
    window: int = 16
    stride: int = 8
    index_bytes: int = 256 << 20

    def __post_init__(self) -> None:
        for check in _CHECKS:
            check(self)

    def resolve_layer_range(self, num_layers: int) -> LayerRange:
        """The range for a model of ``num_layers`` layers. Raises ConfigError when it does not fit."""
        if self.layer_range is not None:
            chosen = self.layer_range
        else:
            detect = min(3, num_layers - 1)
            chosen = LayerRange(min(1, detect), detect, num_layers - 1)
        if chosen.end >= num_layers:
            raise ConfigError(
                f"layer_range={chosen}: the model has {num_layers} layers, the last one allowed is {num_layers - 1}",
                "layer_range",
            )
        return chosen

    def influence_layers(self, num_layers: int) -> range | None:
        """The layers whose influence is collected in a model of ``num_layers``, None for none. Raises ConfigError."""
        if self.influence == "off":
            return None
        first, last = (0, num_layers - 1) if self.influence == "auto" else map(int, self.influence.split(","))
        if last >= num_layers:
            raise ConfigError(
                f"influence={self.influence}: the model has {num_layers} layers, "
                f"the last one allowed is {num_layers - 1}",
                "influence",
            )
        return range(first, last + 1)


def _one_of(name: str, allowed: tuple[str, ...]) -> Callable[[RelayConfig], None]:
    def check(config: RelayConfig) -> None:
        value = getattr(config, name)
        if value not in allowed:
            raise ConfigError(f"{name}={value!r}: allowed are {', '.join(allowed)}", name)

    return check


def _between(name: str, low: float, high: float) -> Callable[[RelayConfig], None]:
    def check(config: RelayConfig) -> None:
        value = getattr(config, name)
        if not low <= value <= high:
            raise ConfigError(f"{name}={value!r}: allowed is a number from {low} to {high}", name)

    return check


def _bound(config: RelayConfig) -> None:
    try:
        good = config.bound == "floor" or 0 < float(config.bound) < float("inf")
    except ValueError:
        good = False
    if not good:
        raise ConfigError(f"bound={config.bound!r}: allowed is floor or a number of nats above 0", "bound")


def _layers(config: RelayConfig) -> None:
    r = config.layer_range
    if r is not None and not 0 <= r.start <= r.detect <= r.end:
        text = f"layer_range={r}: allowed is START,DETECT,END with 0 <= START <= DETECT <= END"
        raise ConfigError(text, "layer_range")


def _influence(config: RelayConfig) -> None:
    if config.influence in ("off", "auto"):
        return
    try:
        first, last = (int(part) for part in config.influence.split(","))
        good = 0 <= first <= last
    except ValueError:
        good = False
    if not good:
        raise ConfigError(
            f"influence={config.influence!r}: allowed are off, auto, or FIRST,LAST with 0 <= FIRST <= LAST",
            "influence",
        )


def _windows(config: RelayConfig) -> None:
    if config.stride > config.window:
        text = f"stride={config.stride}: allowed is a number from 1 to window={config.window}"
        raise ConfigError(text, "stride", "window")
    if config.min_segment < config.window:
        text = f"min_segment={config.min_segment}: allowed is a number from window={config.window} up"
        raise ConfigError(text, "min_segment", "window")


_CHECKS: tuple[Callable[[RelayConfig], None], ...] = (
    _one_of("policy", ("auto", *POLICIES)),
    _bound,
    _one_of("default", ("on", "exact", "off")),
    _one_of("entry", ("embeddings", "hidden")),
    _one_of("donate", ("output", "all", "none")),
    _one_of("attention", ("auto", "torch", "flashinfer", "triton")),
    _one_of("graphs", ("auto", "off")),
    _one_of("report", ("auto", "full", "coarse", "none")),
    _between("tau_dev", 0.0, 1e6),
    _between("tau_inf", 0.0, 1e6),
    _between("suffix", 0, 1 << 20),
    _between("audit_every", 0, 1 << 30),
    _between("probe_queries", 1, 1024),
    _between("route_above", 0.0, 1e6),
    _between("quote_tokens", 0, MOST_QUOTE_TOKENS),
    _between("min_segment", 1, 1 << 20),
    _between("min_relayed", 1, 1 << 20),
    _between("max_segments", 1, 4096),
    _between("max_depth", 0, 64),
    _between("window", 4, 1024),
    _between("stride", 1, 1024),
    _between("index_bytes", 1 << 20, 1 << 40),
    _layers,
    _influence,
    _windows,
)


def _parse_range(text: str) -> LayerRange | None:
    if text.lower() in ("", "none", "auto"):
        return None
    start, detect, end = (int(part) for part in text.split(","))
    return LayerRange(start, detect, end)


def _parse_budget(text: str) -> Budget | None:
    return None if text.lower() in ("", "none") else parse_budget(text)


def _parse_switch(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError(text)
    return text.lower() == "true"


def _parse_path(text: str) -> str | None:
    return None if text.lower() in ("", "none") else text


_PARSERS: dict[str, tuple[Callable[[str], Any], str]] = {
    "layer_range": (_parse_range, "START,DETECT,END or auto"),
    "budget": (_parse_budget, f"{BUDGETS}, or none"),
    "route_above": (float, "a number"),
    "tau_dev": (float, "a number"),
    "influence": (str, "off, auto or FIRST,LAST"),
    "tau_inf": (float, "a number"),
    "cost_model": (_parse_switch, "true or false"),
    "policy": (str, "a name"),
    "bound": (str, "floor or a number"),
    "certificate": (_parse_path, "a path"),
    "profile": (_parse_path, "a path"),
    "default": (str, "a name"),
    "donate": (str, "a name"),
    "entry": (str, "a name"),
    "attention": (str, "a name"),
    "graphs": (str, "a name"),
    "report": (str, "a name"),
}
_INTEGER: tuple[Callable[[str], Any], str] = (int, "a whole number")


def setting_names() -> tuple[str, ...]:
    """Names of all settings, as they stand in the JSON file."""
    return tuple(f.name for f in fields(RelayConfig))


def _parse(name: str, value: Any, source: str) -> Any:
    parser, allowed = _PARSERS.get(name, _INTEGER)
    text = ",".join(str(v) for v in value) if isinstance(value, list) else str(value)
    try:
        return parser("none" if value is None else text)
    except ValueError as error:
        raise ConfigError(f"{source}: {name}={value!r}: allowed is {allowed}") from error


def load_config(
    env: Mapping[str, str],
    *,
    typed: Mapping[str, str] = MappingProxyType({}),
    check: Callable[[RelayConfig], object] = lambda _: None,
) -> RelayConfig:
    """Read the configuration from ``env`` and the JSON file it may name, and ``check`` it.

    typed: of variables that stand for something else, what that is: the flag that the user gave.
    Raises ConfigError, naming the source, for an unknown setting, an unreadable file or a value that is not allowed.
    """
    chosen: dict[str, Any] = {}
    sources: dict[str, str] = {}
    names = setting_names()
    if path := env.get(CONFIG_ENV):
        for name, value in _read_file(Path(path), typed.get(CONFIG_ENV, CONFIG_ENV)).items():
            if name not in names:
                raise ConfigError(f"{path}: unknown setting {name!r}: allowed are {', '.join(names)}")
            chosen[name], sources[name] = _parse(name, value, path), path
    for variable in sorted(env):
        if not variable.startswith(ENV_PREFIX) or variable == CONFIG_ENV:
            continue
        name = variable[len(ENV_PREFIX) :].lower()
        if name not in names:
            allowed = ", ".join(ENV_PREFIX + n.upper() for n in names)
            raise ConfigError(f"unknown environment variable {variable}: allowed are {CONFIG_ENV}, {allowed}")
        sources[name] = typed.get(variable, variable)
        chosen[name] = _parse(name, env[variable], sources[name])
    try:
        config = RelayConfig(**chosen)
        check(config)
    except ConfigError as error:
        source = next((sources[name] for name in error.settings if name in sources), None)
        raise error if source is None else ConfigError(f"{source}: {error}") from error
    return config


def _read_file(path: Path, source: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{source}={path}: the file cannot be read ({error.strerror})") from error
    except ValueError as error:  # no JSON, or no UTF-8
        raise ConfigError(f"{source}={path}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{source}={path}: allowed is a JSON object of settings")
    return content
