"""Pipelines as text: every value comes back, and every mistake is answered with what there is."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import ClassVar, Literal

import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qgraph.errors import PipelineError
from qgraph.numerics.spec import PerBlock, QuantSpec
from qgraph.passes import all_passes
from qgraph.pipeline.context import Context
from qgraph.pipeline.parse import convert, parse
from qgraph.pipeline.pass_manager import Contract, Pass, PassManager
from qgraph.recipes.complete import complete

INT4 = QuantSpec(ir.DataType.INT4, PerBlock(0, 32), group="a, b")


@dataclass(frozen=True)
class Nothing(Pass):
    """A pass that changes nothing, with a parameter of each kind."""

    name: ClassVar[str] = "nothing"
    contract: ClassVar[Contract] = Contract.EQUIVALENT

    flag: bool = False
    count: int = 3
    ratio: float = 0.5
    text: str = "plain"
    level: Literal["O1", "O2", 3] = "O1"
    limit: int | None = None
    label: str | None = None
    spec: QuantSpec = field(default_factory=QuantSpec)
    rules: tuple[int, ...] = ()

    def run(self, model: ir.Model, context: Context) -> bool:
        return False


@dataclass(frozen=True)
class Demanding(Nothing):
    """One of its parameters has no default."""

    name: ClassVar[str] = "demanding"
    wanted: int = field(kw_only=True)

    def __post_init__(self) -> None:
        if self.wanted < 0:
            raise ValueError("wanted must not be negative")


class Nameless(Pass):
    """No name and no contract."""


NOTHING = f"{__name__}:Nothing"


def test_the_empty_pipeline() -> None:
    assert parse("", all_passes()) == []
    assert parse(" \n", all_passes()) == []


def test_steps_parameters_and_separators() -> None:
    parameters = '{ flag = true ; count=-7, level=O2;text = "a,b}" }'
    text = f" {NOTHING} ,\n{NOTHING} {parameters}, {NOTHING}{{}}"
    expected = [Nothing(), Nothing(flag=True, count=-7, level="O2", text="a,b}"), Nothing()]
    assert parse(text, all_passes()) == expected


@given(
    st.lists(
        st.builds(
            Nothing,
            flag=st.booleans(),
            count=st.integers(),
            ratio=st.floats(allow_nan=False),
            text=st.text(),
            level=st.sampled_from(["O1", "O2", 3]),
            limit=st.none() | st.integers(),
            label=st.none() | st.text() | st.just("none"),
            spec=st.sampled_from([QuantSpec(), INT4]),
        ),
        max_size=3,
    )
)
def test_what_a_pass_manager_prints_parses_back(passes: list[Pass]) -> None:
    assert parse(str(PassManager(passes)), all_passes()) == passes


def test_only_parameters_that_are_not_defaults_are_printed() -> None:
    assert str(Nothing()) == NOTHING
    assert str(Nothing(flag=True, text="two words")) == NOTHING + '{flag=true,text="two words"}'
    assert str(Nothing(spec=INT4)).endswith(f"{{spec={json.dumps(str(INT4))}}}")


def test_a_parameter_that_is_no_text_is_shown_and_refused() -> None:
    text = str(Nothing(rules=(1, 2)))
    assert text == NOTHING + "{rules=...}"
    with pytest.raises(PipelineError, match="'rules' must be given in Python"):
        parse(text, all_passes())


def test_every_pass_of_qgraph_is_found_by_name_and_prints_by_it() -> None:
    passes = all_passes()
    assert list(passes) == sorted(passes)
    for name, kind in passes.items():
        if any(f.init and f.default is f.default_factory is MISSING for f in fields(kind)):
            continue
        assert parse(name, all_passes()) == [kind()]
        assert str(kind()) == name
        assert kind.__doc__


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("anotate", r"no pass 'anotate' \(did you mean 'annotate'\?\): 'qgraph passes' lists them"),
        ("zzz", "no pass 'zzz': 'qgraph passes' lists them"),
        (f"{NOTHING}{{conut=1}}", r"no parameter 'conut': it has flag, count, .* mean 'count'\?"),
        (f"{NOTHING}{{count=1,count=2}}", "parameter 'count' is given twice"),
        (f"{NOTHING}{{count=1.5}}", "'count' must be an integer, not '1.5'"),
        (f"{NOTHING}{{count=none}}", "'count' must be an integer, not 'none'"),
        (f"{NOTHING}{{limit=much}}", "'limit' must be an integer or none, not 'much'"),
        (f"{NOTHING}{{ratio=half}}", "'ratio' must be a number, not 'half'"),
        (f"{NOTHING}{{flag=yes}}", "'flag' must be true or false, not 'yes'"),
        (f"{NOTHING}{{level=O3}}", "'level' must be one of O1, O2, 3, not 'O3'"),
        (
            f"{NOTHING}{{spec=int9}}",
            "'spec' must be a quantization like 'int8 per-tensor sym minmax'",
        ),
        (f"{NOTHING}{{count}}", "cannot read 'count': write parameters as key=value"),
        (f"{NOTHING}{{count=1", "cannot read the pipeline at .*: write it like"),
        ("a b", "cannot read the pipeline at 'a b'"),
        (",", "cannot read the pipeline at ','"),
        (f"{__name__}:Demanding", "needs a value for 'wanted'"),
        (f"{__name__}:Demanding{{wanted=-1}}", "wanted must not be negative"),
        (f"{__name__}:Nothin", r"has no class 'Nothin' \(did you mean 'Nothing'\?\)"),
        (f"{__name__}:Nameless", "has no name: give its class one"),
        ("json:JSONDecoder", "'json:JSONDecoder' is not a subclass of qgraph.Pass"),
        ("no_such_module:Foo", "there is no module 'no_such_module': put no_such_module.py"),
        ("json.nothing:Foo", "there is no module 'json.nothing'"),
    ],
)
def test_mistakes_are_answered_with_what_there_is(text: str, message: str) -> None:
    with pytest.raises(PipelineError, match=message):
        parse(text, all_passes())


@given(st.text(alphabet='ab:,;{}="\\ .', max_size=12))
def test_garbage_never_ends_in_another_error(garbage: str) -> None:
    with pytest.raises(PipelineError):
        parse("no-such-pass{" + garbage, all_passes())


def test_unions_try_their_options_in_order() -> None:
    assert convert(int | str, "3") == 3
    assert convert(int | str, "three") == "three"
    assert convert(str | None, "None") == "None"
    assert convert(None | str, "None") is None
    assert convert(None | str, "None", quoted=True) == "None"


OWN = """
from dataclasses import dataclass
from typing import ClassVar
from qgraph.pipeline.pass_manager import Contract, Pass

@dataclass(frozen=True)
class Mine(Pass):
    name: ClassVar[str] = "mine"
    contract: ClassVar[Contract] = Contract.EQUIVALENT
    k: int = 1

    def run(self, model, context):
        return False
"""


def test_a_pass_of_ones_own_is_imported_from_the_current_directory(tmp_path: Path) -> None:
    (tmp_path / "my_module.py").write_text(OWN)
    (tmp_path / "broken.py").write_text("import numpy\n1/0")
    (tmp_path / "missing.py").write_text("import not_installed_here")
    script = """
from qgraph.errors import PipelineError
from qgraph.passes import all_passes
from qgraph.pipeline.pass_manager import PassManager
from qgraph.pipeline.parse import parse
print(PassManager(parse("my_module:Mine{k=3},canonicalize", all_passes())))
for name in ("broken", "missing"):
    try:
        parse(f"{name}:Mine", all_passes())
    except PipelineError as error:
        print(error)
"""
    command = [sys.executable, "-P", "-c", script]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "my_module:Mine{k=3},canonicalize",
        "cannot import 'broken': ZeroDivisionError: division by zero",
        "cannot import 'missing': No module named 'not_installed_here'",
    ]


@pytest.mark.parametrize(
    ("text", "calibrated", "expected"),
    [
        ("insert-qdq", False, "canonicalize,annotate,insert-qdq"),
        (
            "insert-qdq",
            True,
            "canonicalize,annotate{scheme=static},insert-observers,calibrate,guard-static,insert-qdq",
        ),
        ("canonicalize,lower", False, "canonicalize,annotate,insert-qdq,lower"),
        (
            "annotate{scheme=static},calibrate",
            True,
            "canonicalize,annotate{scheme=static},insert-observers,calibrate",
        ),
        ("canonicalize,annotate,insert-qdq", True, "canonicalize,annotate,insert-qdq"),
        ("fold-constants", False, "fold-constants"),
    ],
)
def test_a_pipeline_is_completed_by_what_it_needs(
    text: str, calibrated: bool, expected: str
) -> None:
    passes = complete(parse(text, all_passes()), calibrated=calibrated)
    assert str(PassManager(passes)) == expected
