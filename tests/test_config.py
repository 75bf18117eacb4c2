"""Settings: every wrong value is refused by name, and the later source wins."""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from sglang_relay.budget import Budget
from sglang_relay.config import CONFIG_ENV, ENV_PREFIX, ConfigError, LayerRange, RelayConfig, load_config, setting_names
from sglang_relay.engine import command_line

ALLOWED = {
    "policy": "auto, probe, probe_only, relay, cacheblend, legolink, rotate, full",
    "default": "on, exact, off",
    "donate": "output, all, none",
    "entry": "embeddings, hidden",
    "attention": "auto, torch, flashinfer, triton",
    "graphs": "auto, off",
    "report": "auto, full, coarse, none",
    "tau_dev": "number",
    "bound": "floor or a number",
    "audit_every": "number",
    "influence": "off, auto, or FIRST,LAST",
    "tau_inf": "number",
    "suffix": "number",
    "min_segment": "number",
    "min_relayed": "number",
    "max_segments": "number",
    "max_depth": "number",
    "window": "number",
    "stride": "number",
    "index_bytes": "number",
    "budget": "share",
    "probe_queries": "number",
    "route_above": "number",
    "quote_tokens": "number",
    "cost_model": "true or false",
    "layer_range": "START,DETECT,END",
}
BAD_TEXT = [
    *(("policy", text) for text in ("", "Relay", "probes", "rotate,relay")),
    *(("bound", text) for text in ("", "0", "-1", "ceiling", "nan", "inf")),
    *(("audit_every", text) for text in ("", "-1", "often", "1.5")),
    *(("default", text) for text in ("", "ON", "true")),
    *(("attention", text) for text in ("", "Torch", "sdpa", "none")),
    *(("entry", text) for text in ("", "Hidden", "layer", "off")),
    *(("graphs", text) for text in ("", "on", "true", "none")),
    *(("report", text) for text in ("", "Full", "off", "true")),
    *(("donate", text) for text in ("", "everything", "input")),
    *(("tau_dev", text) for text in ("", "-0.1", "nan", "inf", "2000000.0", "much")),
    *(("influence", text) for text in ("", "on", "3", "3,1", "-1,3", "1,2,3", "a,b")),
    *(("tau_inf", text) for text in ("", "-0.1", "nan", "inf", "much")),
    *(("suffix", text) for text in ("", "-1", "1.5", "9999999", "ten")),
    *(("min_segment", text) for text in ("", "0", "-5", "15", "2.0", "9999999")),
    *(("min_relayed", text) for text in ("", "0", "-5", "2.0")),
    *(("max_segments", text) for text in ("", "0", "-1", "4097", "x")),
    *(("max_depth", text) for text in ("", "-1", "65", "x")),
    *(("window", text) for text in ("", "3", "0", "1025", "x")),
    *(("stride", text) for text in ("", "0", "-1", "17", "1025", "x")),
    *(("index_bytes", text) for text in ("", "0", "-1", "1000", "1e9", "256MB")),
    *(("budget", text) for text in ("0.0", "-0.1", "1.01", "nan", "20%", "inf")),
    *(("budget", text) for text in ("much", "coverage:1.5", "2.5", "coverage:")),
    *(("probe_queries", text) for text in ("", "0", "1025", "2.5")),
    *(("route_above", text) for text in ("", "-0.1", "nan", "inf")),
    *(("quote_tokens", text) for text in ("", "-1", "1025", "1.5", "true")),
    *(("cost_model", text) for text in ("", "0", "1", "on", "none")),
    *(("layer_range", text) for text in ("1,3", "1,3,5,7", "3,1,5", "1,5,3", "-1,3,5", "a,b,c", "1;3;5", "7")),
]
BAD_JSON = [
    ("policy", 3),
    ("policy", None),
    ("default", True),
    ("influence", True),
    ("influence", [1, "x"]),
    ("tau_inf", None),
    ("suffix", True),
    ("suffix", 1.5),
    ("suffix", None),
    ("suffix", {}),
    ("tau_dev", None),
    ("tau_dev", [1, 2]),
    ("budget", True),
    ("layer_range", [1, 2]),
    ("layer_range", [1, 2, "x"]),
    ("layer_range", {"start": 1}),
    ("window", "wide"),
    ("cost_model", 1),
    ("cost_model", None),
]
GOOD = [
    ("policy", "full", "full"),
    ("bound", "floor", "floor"),
    ("bound", "0.02", "0.02"),
    ("certificate", "none", None),
    ("certificate", "/etc/relay", "/etc/relay"),
    ("profile", "none", None),
    ("profile", "/etc/profile.json", "/etc/profile.json"),
    ("audit_every", "0", 0),
    ("layer_range", "2,3,20", LayerRange(2, 3, 20)),
    ("layer_range", "0,0,0", LayerRange(0, 0, 0)),
    ("layer_range", "auto", None),
    ("report", "none", "none"),
    ("report", "coarse", "coarse"),
    ("tau_dev", "0", 0.0),
    ("influence", "off", "off"),
    ("influence", "auto", "auto"),
    ("influence", "2,5", "2,5"),
    ("tau_inf", "0", 0.0),
    ("suffix", "0", 0),
    ("budget", "1", Budget("share", 1.0)),
    ("budget", "0.2", Budget("share", 0.2)),
    ("budget", "careful", Budget("share", 0.3)),
    ("budget", "16", Budget("tokens", 16.0)),
    ("budget", "coverage:0.8", Budget("coverage", 0.8)),
    ("probe_queries", "24", 24),
    ("route_above", "0.25", 0.25),
    ("quote_tokens", "0", 0),
    ("cost_model", "false", False),
    ("cost_model", "True", True),
    ("budget", "none", None),
    ("default", "exact", "exact"),
    ("donate", "all", "all"),
    ("entry", "hidden", "hidden"),
    ("attention", "triton", "triton"),
    ("graphs", "auto", "auto"),
    ("min_segment", "16", 16),
    ("min_relayed", "1", 1),
    ("max_segments", "4096", 4096),
    ("max_depth", "0", 0),
    ("window", "32", 32),
    ("stride", "16", 16),
    ("index_bytes", "1048576", 1 << 20),
]


def env(**settings: object) -> dict[str, str]:
    return {ENV_PREFIX + name.upper(): str(value) for name, value in settings.items()}


def file_of(tmp_path: Path, content: Any) -> dict[str, str]:
    path = tmp_path / "relay.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return {CONFIG_ENV: str(path)}


def test_the_tables_name_every_setting() -> None:
    """A setting added later must come with its wrong and right values."""
    files = {"certificate", "profile"}  # any text is a path; whether something is there is seen later
    checked = set(setting_names()) - files
    assert checked == set(ALLOWED) == {n for n, _ in BAD_TEXT} == {n for n, *_ in GOOD} - files


def test_nothing_set_is_the_default() -> None:
    assert load_config({}) == RelayConfig()
    assert load_config({"SGLANG_PLATFORM": "relay_cpu", "PATH": "/bin"}) == RelayConfig()


@pytest.mark.parametrize(("name", "text"), BAD_TEXT)
def test_wrong_text_is_refused_with_setting_value_and_what_is_allowed(name: str, text: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(env(**{name: text}))
    message = str(refused.value)
    assert f"{name}={text}: allowed" in message or f"{name}={text!r}: allowed" in message
    assert ALLOWED[name] in message


@pytest.mark.parametrize(("name", "value"), BAD_JSON)
def test_wrong_json_value_is_refused_with_setting_and_value(tmp_path: Path, name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match="allowed") as refused:
        load_config(file_of(tmp_path, {name: value}))
    assert name in str(refused.value)


@pytest.mark.parametrize(("name", "text", "value"), GOOD)
def test_right_values_arrive(tmp_path: Path, name: str, text: str, value: Any) -> None:
    # Two settings bound others: a wide window needs a long shortest segment.
    more = {"min_segment": 64} if name == "window" else {}
    assert getattr(load_config(env(**more, **{name: text})), name) == value
    as_json = list(map(int, text.split(","))) if isinstance(value, LayerRange) else value
    if isinstance(value, Budget):
        as_json = text if value.kind == "coverage" else value.amount
    assert getattr(load_config(file_of(tmp_path, more | {name: as_json})), name) == value


def test_windows_and_segments_must_fit_together() -> None:
    with pytest.raises(ConfigError, match=r"stride=20.*window=16"):
        load_config(env(stride=20))
    with pytest.raises(ConfigError, match=r"min_segment=32.*window=40"):
        load_config(env(window=40))
    assert load_config(env(window=40, min_segment=40, stride=40)).window == 40


def test_environment_wins_over_the_file_and_the_file_over_the_defaults(tmp_path: Path) -> None:
    both = file_of(tmp_path, {"policy": "full", "suffix": 7}) | env(policy="rotate")
    config = load_config(both)
    assert (config.policy, config.suffix, config.tau_dev) == ("rotate", 7, RelayConfig().tau_dev)
    # A wrong value that a later source replaces does no harm, unless it cannot even be read.
    assert load_config(file_of(tmp_path, {"policy": "none-such"}) | env(policy="rotate")).policy == "rotate"


def test_unknown_names_are_refused_and_the_known_ones_listed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"SGLANG_RELAY_POLICI.*SGLANG_RELAY_POLICY"):
        load_config({"SGLANG_RELAY_POLICI": "relay"})
    with pytest.raises(ConfigError, match=r"'polici'.*policy"):
        load_config(file_of(tmp_path, {"polici": "relay"}))


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '"relay"', "null"])
def test_a_file_that_is_no_object_is_refused_by_its_path(tmp_path: Path, content: str) -> None:
    with pytest.raises(ConfigError, match=r"relay\.json"):
        load_config(file_of(tmp_path, content))


def test_a_file_that_cannot_be_read_is_refused_by_its_path(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="missing"):
        load_config({CONFIG_ENV: str(tmp_path / "missing.json")})
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config({CONFIG_ENV: str(tmp_path)})
    binary = tmp_path / "binary.json"
    binary.write_bytes(b"\xff\xfe\x00{")
    with pytest.raises(ConfigError, match=r"binary\.json"):
        load_config({CONFIG_ENV: str(binary)})


@pytest.mark.parametrize(("layers", "want"), [(1, (0, 0, 0)), (2, (1, 1, 1)), (4, (1, 3, 3)), (32, (1, 3, 31))])
def test_layer_range_from_the_model(layers: int, want: tuple[int, int, int]) -> None:
    assert RelayConfig().resolve_layer_range(layers) == LayerRange(*want)


def test_layer_range_beyond_the_model_is_refused() -> None:
    config = RelayConfig(layer_range=LayerRange(1, 3, 6))
    assert config.resolve_layer_range(7) == LayerRange(1, 3, 6)
    with pytest.raises(ConfigError, match=r"layer_range=1,3,6.*6 layers.*5"):
        config.resolve_layer_range(6)


def test_the_object_is_frozen() -> None:
    with pytest.raises(AttributeError):
        RelayConfig().suffix = 3  # type: ignore[misc]


# ---------------------------------------------------------------------- flags


@pytest.fixture
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in os.environ if n.startswith(ENV_PREFIX)]:
        monkeypatch.delenv(name)
    # Registers the names for removal: what the flags export ends with the test.
    for name in setting_names():
        monkeypatch.setenv(ENV_PREFIX + name.upper(), "")
        monkeypatch.delenv(ENV_PREFIX + name.upper())
    monkeypatch.setenv(CONFIG_ENV, "")
    monkeypatch.delenv(CONFIG_ENV)


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command_line.add_flags(None, parser)
    return parser.parse_args(arguments)


@pytest.mark.usefixtures("clean_environment")
def test_flags_become_environment_and_win_over_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(ENV_PREFIX + "SUFFIX", "3")
    path = file_of(tmp_path, {"tau_dev": 2.5, "suffix": 1, "policy": "full"})[CONFIG_ENV]
    command_line.export_flags(parse("--relay-config", path, "--relay-suffix", "5", "--relay-layer-range", "1,2,3"))
    config = load_config(os.environ)
    assert config == RelayConfig(policy="full", tau_dev=2.5, suffix=5, layer_range=LayerRange(1, 2, 3))


@pytest.mark.usefixtures("clean_environment")
def test_every_setting_has_its_flag() -> None:
    for name, text, value in GOOD:
        given = parse("--relay-" + name.replace("_", "-"), text)
        assert getattr(given, f"relay_{name}") == text, value


class Args(NamedTuple):
    """What is read of SGLang's ServerArgs where no layer is named."""


@pytest.mark.usefixtures("clean_environment")
@pytest.mark.parametrize(("name", "text"), [("policy", "best"), ("budget", "lots"), ("tau_dev", "nan")])
def test_a_wrong_value_is_refused_with_the_source_that_the_user_typed(
    name: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before any process is started: as a program's argument on the command line, as an exception elsewhere."""
    monkeypatch.setattr(command_line, "_typed", None)
    value = rf"{name}='?{text}'?: allowed"
    with monkeypatch.context() as patch:
        patch.setenv(ENV_PREFIX + name.upper(), text)
        with pytest.raises(ConfigError, match=f"^{ENV_PREFIX + name.upper()}: {value}"):
            command_line.check(Args(), relays=True)
    with monkeypatch.context() as patch:
        path = file_of(tmp_path, {name: text})[CONFIG_ENV]
        patch.setenv(CONFIG_ENV, path)
        with pytest.raises(ConfigError, match=f"^{path}: {value}"):
            command_line.check(Args(), relays=True)
    flag = "--relay-" + name.replace("_", "-")
    command_line.export_flags(parse(flag, text))
    with pytest.raises(SystemExit) as ended:
        command_line.check(Args(), relays=True)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert re.fullmatch(f"sglang-relay: {flag}: {value}.*\n", said), said


@pytest.mark.usefixtures("clean_environment")
def test_a_file_that_a_flag_names_is_refused_by_the_flag(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command_line, "_typed", None)
    for name in ("config", "certificate", "profile"):
        with monkeypatch.context() as patch:
            patch.setenv(ENV_PREFIX + name.upper(), "")  # removed afterwards
            command_line.export_flags(parse(f"--relay-{name}", str(tmp_path / "gone.json")))
            with pytest.raises(SystemExit):
                command_line.check(Args(), relays=True)
        said = capsys.readouterr().err
        assert said.startswith(f"sglang-relay: --relay-{name}") and "gone.json" in said and said.count("\n") == 1, said


@pytest.mark.usefixtures("clean_environment")
def test_windows_that_do_not_fit_are_refused_by_the_one_that_was_set() -> None:
    with pytest.raises(ConfigError, match=r"^SGLANG_RELAY_WINDOW: min_segment=32"):
        load_config(env(window=40))


@pytest.mark.usefixtures("clean_environment")
def test_a_server_that_does_not_relay_is_not_ended_by_a_wrong_setting(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(command_line, "_typed", None)
    monkeypatch.setenv(ENV_PREFIX + "POLICY", "best")
    command_line.check(Args(), relays=False)
    assert "not in use" in caplog.text and "SGLANG_RELAY_POLICY: policy='best'" in caplog.text


STARTS = """
import os, sys
from sglang.srt.plugins import load_plugins
from sglang.srt.server_args import ServerArgs
from sglang_relay.config import ConfigError
model = sys.argv[1]
load_plugins()

def start(backend, **settings):
    os.environ.update({"SGLANG_RELAY_" + name.upper(): value for name, value in settings.items()})
    try:
        args = ServerArgs(model_path=model, radix_cache_backend=backend)
        args.resolve_once()
        args.check_server_args()
        print("started")
    except ConfigError as error:
        print(error)
    for name in settings:
        del os.environ["SGLANG_RELAY_" + name.upper()]

start("relay", policy="rotate")
start("relay", suffix="ten")
start("relay-isolated", layer_range="1,3,6")
start("relay", influence="0,6")
start("relay", layer_range="1,3,5", influence="0,5")
start(None, suffix="ten")

import sglang
os.environ["SGLANG_RELAY_SUFFIX"] = "ten"
try:
    sglang.Engine(model_path=model, radix_cache_backend="relay")
except ConfigError as error:
    print("engine:", error)
"""


def test_settings_are_checked_in_whatever_way_a_server_starts(model: Path) -> None:
    variables = {name: value for name, value in os.environ.items() if not name.startswith(ENV_PREFIX)}
    done = subprocess.run(
        [sys.executable, "-c", STARTS, str(model)], env=variables, capture_output=True, text=True, check=False
    )
    layers = "the model has 6 layers, the last one allowed is 5"
    wrong = "SGLANG_RELAY_SUFFIX: suffix='ten': allowed is a whole number"
    assert done.stdout.splitlines() == [
        "started",
        wrong,
        f"SGLANG_RELAY_LAYER_RANGE: layer_range=1,3,6: {layers}",
        f"SGLANG_RELAY_INFLUENCE: influence=0,6: {layers}",
        "started",
        "started",
        f"engine: {wrong}",
    ], done.stderr[-3000:]


def test_a_command_line_with_a_wrong_variable_ends_with_one_line_of_its_own(model: Path) -> None:
    variables = {name: value for name, value in os.environ.items() if not name.startswith(ENV_PREFIX)}
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(model)]
    done = subprocess.run(
        [*command, "--radix-cache-backend", "relay"],
        env=variables | {"SGLANG_RELAY_POLICY": "best"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr[-3000:]
    assert "\nsglang-relay: SGLANG_RELAY_POLICY: policy='best': allowed are auto, probe" in done.stderr
    assert "Traceback" not in done.stderr and "Load weight" not in done.stderr
