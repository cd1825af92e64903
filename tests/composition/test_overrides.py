"""Whatever is written on the command line either makes a model or is refused in one line that names the key."""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf

import vix
from vix.build import GROUPS, OVERLAYS, parse
from vix.composition.compose import compose, dotted_keys, format_error, is_hydra_error
from vix.errors import ConfigError, UserError

OPTIONS = {group: sorted(path.stem for path in (ROOT / "conf" / group).glob("*.yaml")) for group in GROUPS}
KEYS = sorted(
    {f"{group}.{key}" for group in GROUPS for path in (ROOT / "conf" / group).glob("*.yaml") for key in OmegaConf.load(path)}  # type: ignore[union-attr]
)
VALUES = st.one_of(
    st.integers(-3, 300),
    st.sampled_from([0, 1, 2, 4, 8, 64, 2**31, -(2**63), 10**30]),
    st.floats(allow_nan=True, allow_infinity=True),
    st.booleans(),
    st.none(),
    st.sampled_from(
        ["fast", "", "auto", "softmax", "mean", "cuda:7", "class_token", "../x", "a=b", "ü", "${seed}", "${nothing}"]
    ),
    st.lists(st.one_of(st.integers(-2, 70), st.text(max_size=3)), max_size=3),
    st.dictionaries(st.sampled_from(["a", "_target_"]), st.integers(0, 3), max_size=2),
)
NAMES = st.one_of(st.sampled_from(KEYS), st.sampled_from([*GROUPS, "seed", "rerun", "foo", "model.dimm", "attention.head"]))
CHOICES = st.fixed_dictionaries({}, optional={group: st.sampled_from(options) for group, options in OPTIONS.items()})


@pytest.fixture(scope="module")
def parts() -> Callable[[dict[str, str]], DictConfig]:
    """The config with the groups' options chosen; composing it anew every time would take most of the test's time."""
    loaded = {(g, o): OmegaConf.load(ROOT / "conf" / g / f"{o}.yaml") for g, options in OPTIONS.items() for o in options}
    default = compose()

    def chosen(choices: dict[str, str]) -> DictConfig:
        cfg = default.copy()
        OmegaConf.set_struct(cfg, False)
        for group, option in choices.items():
            cfg[group] = loaded[group, option].copy()
        return cfg

    return chosen


@pytest.fixture(autouse=True, scope="module")
def quiet() -> Iterator[None]:
    logging.disable()  # thousands of warnings that there is no GPU
    yield
    logging.disable(logging.NOTSET)


def refusal(cfg: DictConfig) -> str | None:
    """What train.py says of a config before it reads data, without memory for the model; None where it would train."""
    try:
        parse(cfg)
        with torch.device("meta"):
            model = vix.build_model(cfg)
        parse(cfg).build_optimizer(model)
        assert parse(cfg).trainer
    except ConfigError as refused:
        return str(refused)
    assert sum(p.numel() for p in model.parameters()) > 0
    return None


@pytest.mark.slow
@settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(choices=CHOICES, changes=st.dictionaries(NAMES, VALUES, max_size=3))
def test_any_values(parts: Callable[[dict[str, str]], DictConfig], choices: dict[str, str], changes: dict[str, Any]) -> None:
    """1,000 configs: valid options, and up to three keys, right or wrong, with any value."""
    needs_files = choices.get("data") in ("imagefolder", "arrays")
    cfg = parts({**choices, "data": "digits" if needs_files else choices.get("data", "digits")})
    for key in sorted(changes):  # a group before its keys
        group, _, option = key.partition(".")
        if not option:
            cfg[key] = changes[key]
        elif isinstance(OmegaConf.to_container(cfg).get(group), dict):  # type: ignore[union-attr]
            cfg[group][option] = changes[key]
    message = refusal(cfg)
    if message is not None:
        assert "\n" not in message
        assert message.split("=")[0].split(":")[0].split(".")[0].strip() in (*GROUPS, *changes, "seed", "rerun"), message


@pytest.mark.slow
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    overrides=st.lists(
        st.one_of(
            st.builds("{}{}={}".format, st.sampled_from(["", "", "+", "++", "~"]), NAMES, VALUES.map(str)),
            st.builds(
                "{}={}".format,
                st.sampled_from([*GROUPS, *OVERLAYS]),
                st.sampled_from(sum(OPTIONS.values(), ["quickstart", "modern"])),
            ),
            st.text(max_size=12),
        ),
        min_size=1,
        max_size=3,
    )
)
def test_any_words(overrides: list[str]) -> None:
    """Words that Hydra cannot use become one line too, and no error comes from inside PyTorch."""
    error: Exception | None = None
    message: str | None = None
    try:
        cfg = compose(overrides)
        message = refusal(cfg)
    except Exception as raised:
        error = raised
    if error is not None:
        assert isinstance(error, UserError) or is_hydra_error(error), repr(error)
        message = format_error(error, overrides)
        assert message
    assert message is None or "\n" not in message


def test_the_keys_are_the_configs(parts: Callable[[dict[str, str]], DictConfig]) -> None:
    """The strategies above draw from all keys there are."""
    for group, options in OPTIONS.items():
        for option in options:
            assert {key for key in dotted_keys(parts({group: option})) if key.startswith(f"{group}.")} <= {
                *KEYS,
                *(k for k in dotted_keys(parts({})) if k.startswith(f"{group}.")),
            }
