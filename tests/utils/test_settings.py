import dataclasses
from typing import Any, Literal

import pytest

from st_llmpool.modules.errors import ConfigurationError
from st_llmpool.utils.settings import from_mapping, merge, override


@dataclasses.dataclass
class Inner:
    rate: float = 1.0
    mode: Literal["fast", "slow"] = "fast"


@dataclasses.dataclass
class Outer:
    name: str
    inner: Inner = dataclasses.field(default_factory=Inner)
    many: list[Inner] = dataclasses.field(default_factory=list)
    count: int | None = None
    free: dict[str, Any] = dataclasses.field(default_factory=dict)
    layers: str | list[int] = "all"
    flag: bool = False
    texts: dict[str, str] = dataclasses.field(default_factory=dict)


def test_nested_mappings_become_nested_dataclasses():
    values = {"name": "x", "inner": {"rate": 2}, "many": [{"mode": "slow"}, {}], "layers": [1, 2], "free": {"a": [1]}}
    built = from_mapping(Outer, values)
    assert built == Outer("x", Inner(2.0), [Inner(mode="slow"), Inner()], layers=[1, 2], free={"a": [1]})
    assert isinstance(built.inner.rate, float)


@pytest.mark.parametrize(("text", "value"), [("1e-4", 1e-4), ("2.5E-3", 2.5e-3), (3, 3.0)])
def test_numbers_that_yaml_reads_as_text_become_floats(text, value):
    assert from_mapping(Inner, {"rate": text}).rate == value


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"nme": "x"}, "nme is not a key here. Did you mean 'name'?"),
        ({"name": "x", "inner": {"rat": 1}}, "inner.rat is not a key here. Did you mean 'rate'?"),
        ({"name": "x", "many": [{}, {"mod": 1}]}, "many.1.mod is not a key here. Did you mean 'mode'?"),
        ({}, "name is missing"),
        ({"name": "x", "inner": {"mode": "fats"}}, "inner.mode='fats' is unknown.*Did you mean 'fast'?"),
        ({"name": "x", "inner": {"rate": "quick"}}, "inner.rate='quick' must be of type float"),
        ({"name": "x", "count": 1.5}, "count=1.5 must be of type int"),
        ({"name": "x", "count": True}, "count=True must be of type int"),
        ({"name": "x", "flag": "yes"}, "flag='yes' must be of type bool"),
        ({"name": "x", "free": 3}, "free=3 must hold keys and values"),
        ({"name": "x", "inner": 3}, "inner must hold keys and values"),
        ({"name": None}, "name=None must be of type str"),
        ({"name": "x", "inner": {"rate": "nan"}}, "inner.rate='nan' must be a finite number"),
        ({"name": "x", "inner": {"rate": "-inf"}}, "inner.rate='-inf' must be a finite number"),
        ({"name": "x", "inner": {"rate": 10**400}}, "inner.rate=1000.* must be of type float"),
        ({"name": "x", "count": float("inf")}, "count=inf must be of type int"),
        ({"name": "x", "count": 2**64}, "count=18446744073709551616 is beyond"),
        ({"name": "x", "inner": {"mode": ["fast"]}}, "inner.mode=.'fast'. is unknown"),
        ({"name": "x", "inner": {"mode": 3}}, "inner.mode=3 is unknown"),
        ({"name": "x", "texts": {"a": None}}, "texts.a=None must be of type str"),
        ({3: "x"}, "3 is not a key here"),
    ],
)
def test_what_does_not_fit_is_refused_by_its_dotted_name(values, message):
    with pytest.raises(ConfigurationError, match=message):
        from_mapping(Outer, values)


def test_an_override_changes_the_value_at_its_place_and_creates_missing_sections():
    values = {"data": [{"limit": 1}, {"limit": 2}]}
    override(values, "data.1.limit=5")
    override(values, "training.rate=1e-4")
    override(values, "text=a=b")
    override(values, "prompt=Find: ")
    override(values, "nothing=null")
    assert values == {
        "data": [{"limit": 1}, {"limit": 5}],
        "training": {"rate": "1e-4"},
        "text": "a=b",
        "prompt": "Find:",
    } | {"nothing": None}


@pytest.mark.parametrize(
    "assignment",
    [
        "rate",
        "=3",
        "data.2.limit=1",
        "data.x.limit=1",
        "name.first=1",
        "name=[1",
        "data.²=1",
        "sets.0.name=x",
        "a=.inf",
    ],
)
def test_an_override_that_leads_nowhere_is_refused(assignment):
    with pytest.raises(ConfigurationError):
        override({"data": [{}], "name": "x", "sets": ["plain text"]}, assignment)


def test_merging_leaves_its_arguments_alone():
    base, over = {"a": {"b": 1, "c": 2}}, {"a": {"b": 3}, "d": [4]}
    assert merge(base, over) == {"a": {"b": 3, "c": 2}, "d": [4]}
    assert base == {"a": {"b": 1, "c": 2}}
    assert over == {"a": {"b": 3}, "d": [4]}
