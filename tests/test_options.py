"""Options: names, values, precedence, and what is handed on to Inductor."""

import logging

import pytest
import torch
from torch._inductor import config as inductor_config

import fa3_compile
from fa3_compile.errors import OptionError
from fa3_compile.options import KERNELS, Options, split


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    for name in ("AUTOTUNE", "KERNELS", "STRICT", "DETERMINISTIC", "FUEL", "VERIFY"):
        monkeypatch.delenv(f"FA3_{name}", raising=False)


def test_nothing_given_is_the_default():
    assert split() == (Options(), {})
    assert split({}, "default") == (Options(), {})


def test_ours_stay_and_the_rest_goes_to_inductor():
    options, patches = split(
        {"autotune": "quick", "fuel": 3, "max_autotune": True, "triton.cudagraphs": False}
    )
    assert options == Options(autotune="quick", fuel=3)
    assert patches == {"max_autotune": True, "triton.cudagraphs": False}


def test_dashes_are_underscores_as_in_torch():
    assert split({"max-autotune": True})[1] == {"max_autotune": True}


def test_a_kernel_name_is_a_tuple_of_one():
    assert split({"kernels": "reference"})[0].kernels == ("reference",)
    assert split({"kernels": ["cpu", "reference"]})[0].kernels == ("cpu", "reference")
    assert Options(kernels="cpu").kernels == ("cpu",)  # pyright: ignore[reportArgumentType]


def test_deterministic_is_told_to_inductor_where_it_has_the_option():
    known = "deterministic" in inductor_config.get_config_copy()
    assert split({"deterministic": True})[1] == ({"deterministic": True} if known else {})
    assert split({"strict": True})[1] == {}


@pytest.mark.parametrize("mode", ["max-autotune", "max-autotune-no-cudagraphs"])
def test_max_autotune_is_full_autotuning_in_both(mode):
    options, patches = split(None, mode)
    assert options.autotune == "full"
    assert patches == torch._inductor.list_mode_options(mode)


def test_other_modes_are_inductors_alone():
    options, patches = split(None, "reduce-overhead")
    assert options == Options()
    assert patches == {"triton.cudagraphs": True}


def test_unknown_mode_names_the_nearest():
    with pytest.raises(OptionError, match="did you mean 'max-autotune'"):
        split(None, "max-autotun")


def test_a_mode_that_is_no_text_is_named():
    with pytest.raises(OptionError, match="unknown name '3'"):
        split(None, 3)  # pyright: ignore[reportArgumentType]


def test_environment_and_its_precedence(monkeypatch):
    monkeypatch.setenv("FA3_AUTOTUNE", "Quick")
    monkeypatch.setenv("FA3_KERNELS", "cpu, reference")
    monkeypatch.setenv("FA3_STRICT", "1")
    monkeypatch.setenv("FA3_FUEL", "2")
    monkeypatch.setenv("FA3_VERIFY", "off")
    assert split()[0] == Options("quick", ("cpu", "reference"), True, False, 2, False)
    assert split({"autotune": "none", "fuel": None})[0].autotune == "none"
    assert split({"fuel": None})[0].fuel is None
    assert split(None, "max-autotune")[0].autotune == "full"


@pytest.mark.parametrize(
    "variable, text, says",
    [
        ("FA3_STRICT", "maybe", "True or False"),
        ("FA3_FUEL", "-1", "0 or more"),
        ("FA3_AUTOTUNE", "fast", "'none', 'quick' or 'full'"),
        ("FA3_KERNELS", "cpuu", "did you mean 'cpu'"),
    ],
)
def test_a_wrong_variable_says_which_and_what(monkeypatch, variable, text, says):
    monkeypatch.setenv(variable, text)
    with pytest.raises(OptionError, match=says) as caught:
        split()
    assert variable in caught.value.where


def test_a_variable_nobody_reads_is_warned_of_once(monkeypatch, caplog):
    monkeypatch.setenv("FA3_AUTOTUNNE", "full")
    monkeypatch.setenv("FA3_CACHEDIR", "/tmp/x")
    monkeypatch.setenv("FA3_CACHE_DIR", "/tmp/x")
    monkeypatch.setenv("FA3_HOME", "/opt/fa3")
    with caplog.at_level(logging.WARNING, "fa3_compile"):
        split()
        split()
    assert [r.getMessage() for r in caplog.records] == [
        "FA3_AUTOTUNNE is not read; did you mean FA3_AUTOTUNE?",
        "FA3_CACHEDIR is not read; did you mean FA3_CACHE_DIR?",
    ]


@pytest.mark.parametrize(
    "name, nearest",
    [
        ("autotun", "autotune"),
        ("fa3_kernel", "kernels"),
        ("fa3.strict_", "strict"),
        ("Determinstic", "deterministic"),
        ("max_autotun", "max_autotune"),
    ],
)
def test_unknown_names_get_the_nearest_legal_one(name, nearest):
    with pytest.raises(OptionError, match=f"did you mean '{nearest}'") as caught:
        split({name: True})
    assert f"unknown name {name!r}" in str(caught.value)


def test_a_prefix_that_no_name_has():
    with pytest.raises(
        OptionError, match="unknown name 'fa3_strict'.*\n.*\n.*did you mean 'strict'"
    ):
        split({"fa3_strict": True})


def test_an_empty_variable_is_not_set(monkeypatch):
    monkeypatch.setenv("FA3_STRICT", "")
    monkeypatch.setenv("FA3_KERNELS", "")
    assert split()[0] == Options()


def test_a_name_near_nothing_lists_ours():
    with pytest.raises(OptionError) as caught:
        split({"zzzzqqqq": 1})
    assert str(caught.value) == (
        "unknown name 'zzzzqqqq'\n"
        '  where: options of torch.compile(..., backend="fa3")\n'
        "  to do: The names are autotune, kernels, strict, deterministic, fuel, verify, and every "
        "key of torch._inductor.config"
    )


@pytest.mark.parametrize(
    "name, value, takes",
    [
        ("autotune", True, "'none', 'quick' or 'full'"),
        ("autotune", "max", "'none', 'quick' or 'full'"),
        ("kernels", 3, "a tuple of names"),
        ("kernels", (), "a tuple of names"),
        ("kernels", ("cpu", 1), "a tuple of names"),
        ("strict", 1, "True or False"),
        ("verify", None, "True or False"),
        ("fuel", -1, "0 or more"),
        ("fuel", True, "0 or more"),
        ("fuel", 1.0, "0 or more"),
        ("max_autotune", "yes", "a bool"),
    ],
)
def test_a_wrong_value_names_the_legal_ones(name, value, takes):
    with pytest.raises(OptionError, match=takes) as caught:
        split({name: value})
    assert name in str(caught.value)


def test_options_built_by_hand_are_checked_too():
    with pytest.raises(OptionError, match="did you mean 'triton'"):
        Options(kernels=("trition",))
    assert Options(kernels=KERNELS).kernels == KERNELS


def test_an_option_error_is_a_value_error():
    with pytest.raises(ValueError):
        split({"strict": "yes"})


def test_kernels_are_told_what_matters_to_them_and_differs_from_the_default():
    assert Options(fuel=1, strict=True).for_kernels() == {}
    chosen = Options("quick", ("cpu", "reference"), deterministic=True, verify=True)
    assert chosen.for_kernels() == {
        "autotune": "quick",
        "kernels": "cpu,reference",
        "deterministic": "True",
        "verify": "True",
    }


def test_the_kernels_that_options_know_are_those_that_exist():
    assert set(KERNELS) == set(fa3_compile.list_kernels())
