"""What is found in code that is read and not run."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from tallymark_collector.declarations import Use, read_sources, uses_in
from tallymark_collector.declarations.scanner import NoUnit
from tallymark_collector.errors import UserError

Found = set[tuple[str | None, str]]
Scan = Callable[..., Found]


def uses(folder: Path) -> list[Use]:
    sources = read_sources([folder])
    return [use for source in sources.files for use in uses_in(source, sources)]


@pytest.fixture
def scan(tmp_path: Path) -> Scan:
    """(meter, unit) of each place; a unit that is none is its name."""

    def run(source: str, **files: str) -> Found:
        (tmp_path / "main.py").write_text(textwrap.dedent(source))
        for name, text in files.items():
            file = tmp_path / (name.replace("__in__", "/") + ".py")
            file.parent.mkdir(exist_ok=True)
            file.write_text(textwrap.dedent(text))
        return {
            (use.meter, use.unit if isinstance(use.unit, str) else use.unit.name)
            for use in uses(tmp_path)
            if use.file.endswith("main.py")
        }

    return run


def test_the_ways_to_write_it(scan: Scan) -> None:
    assert scan("""
        import tallymark
        import tallymark as tm
        import tallymark.decorators
        from tallymark import track_usage, track_usage as metered, record
        from functools import partial

        bill = tallymark.track_usage
        by_token = partial(track_usage, unit="{token}")
        of_files = partial(partial(tm.track_usage, "files"), unit="{file}")

        @tallymark.track_usage("a")
        @tm.track_usage("b", unit="By")
        @metered(meter="c", quantity=2)
        @bill("d")
        @by_token("e")
        @of_files()
        @tallymark.decorators.track_usage("f")
        async def handler():
            record("g", 3)
            tallymark.record("h", 1.5, unit="s")
            with open("x") as file, track_usage("i"):
                pass
            return [record("j") for _ in range(3)], lambda: record("k")

        class View:
            meter = "l"
            track = [track_usage("requests"), track_usage(meter)]

            @track_usage(meter)
            def get(self): ...
    """) == {
        ("a", "{request}"), ("b", "By"), ("c", "{request}"), ("d", "{request}"), ("e", "{token}"), ("files", "{file}"),
        ("f", "{request}"), ("g", "INHERITED"), ("h", "s"), ("i", "{request}"), ("j", "INHERITED"),
        ("k", "INHERITED"), ("requests", "{request}"), ("l", "{request}"),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("quantity", "unit"),
    [
        ("7", "{request}"),
        ("-1.5", "{request}"),
        ("60 * 60", "{request}"),
        ("Decimal('0.1')", "{request}"),
        ("LIMIT", "{request}"),
        ("len", "1"),
        ("lambda r: r.n", "1"),
        ("count", "1"),
        ("itemgetter('n')", "1"),
        ("measure.argument('n')", "1"),
        ("measure.duration()", "s"),
        ("measure.duration", "s"),
        ("measure.duration('ms')", "ms"),
        ("measure.duration(unit=MILLI)", "ms"),
        ("measure.duration(made())", "COMPUTED"),
        ("measure.request_bytes", "By"),
        ("tallymark.measure.response_bytes", "By"),
        ("measure.tokens()", "{token}"),
        ("tokens", "{token}"),
        ("measure.items", "{item}"),
        ("measure.inside", "1"),
        ("measure.of(count)", "1"),
        ("measure.of(count, 'By')", "By"),
        ("measure.of(count, unit='{page}')", "{page}"),
        ("made()", "COMPUTED"),
        ("unheard_of", "COMPUTED"),
        ("True", "COMPUTED"),
    ],
)
def test_the_unit_that_a_quantity_means(scan: Scan, quantity: str, unit: str) -> None:
    before = """
        import tallymark
        from decimal import Decimal
        from operator import itemgetter
        from tallymark import measure, track_usage
        LIMIT = 10
        MILLI = "ms"
        tokens = measure.tokens()
        def count(result): ...
        made = object()
    """
    assert scan(f"{before}\n        f = track_usage('m', {quantity})") == {("m", unit)}
    assert scan(f"{before}\n        f = track_usage('m', quantity={quantity}, unit='{{own}}')") == {("m", "{own}")}


def test_names_that_are_constants(scan: Scan) -> None:
    assert scan(
        """
        from tallymark import record
        from constants import PREFIX, Meters as M
        from package import *
        import package.deep
        import constants
        from typing import Final
        TOKENS: Final = "llm.tokens"
        A, B = "a", "b"
        LATER = f"{PREFIX}.later"
        def work(unit="x"):
            local = "local" + ".name"
            for name in (TOKENS, A, B, local, LATER, M.IMAGES, M.FILES.value, constants.PREFIX):
                pass
            record(TOKENS); record(A); record(B); record(local); record(LATER); record(M.IMAGES)
            record(M.FILES.value); record(constants.PREFIX); record(package.deep.EGRESS); record(STAR)
        """,
        constants="PREFIX = 'api'\nclass Meters(str, Enum):\n    IMAGES = 'images'\n    FILES = 'files'\n",
        package__in____init__="from .deep import STAR",
        package__in__deep="from . import other\nEGRESS = other.EGRESS\nSTAR = 'star'\n",
        package__in__other="EGRESS = 'egress.bytes'",
    ) == {
        (name, "INHERITED")
        for name in (
            ["llm.tokens", "a", "b", "local.name", "api.later", "images", "files", "api", "egress.bytes", "star"]
        )
    }  # fmt: skip


def test_a_function_that_another_module_hands_on(scan: Scan) -> None:
    assert scan(
        "from metering import bill, note\nimport metering\nbill('a')\nnote('b')\nmetering.bill('c')",
        metering="""
            try:
                from tallymark import track_usage as bill
            except ImportError:
                def bill(*args): ...
            from tallymark import record
            note = record
        """,
    ) == {("a", "{request}"), ("b", "INHERITED"), ("c", "{request}")}


def test_a_function_that_goes_through_several_hands(scan: Scan) -> None:
    assert scan(
        "from package import bill\nfrom third import note\nbill('a')\nnote('b')",
        package__in____init__="from .first import *",
        package__in__first="from . import second\nfrom .second import bill\n",
        package__in__second="import tallymark\nbill = tallymark.record\n",
        third="from package.second import bill as note",
    ) == {("a", "INHERITED"), ("b", "INHERITED")}


@pytest.mark.parametrize(
    "line",
    [
        "record(name)",
        "record(f'{name}.x')",
        "record(f'{CHANGED!r}')",
        "record(CHANGED)",
        "record(SET)",
        "record(LOOP)",
        "record(TABLE['x'])",
        "record('a' if name else 'b')",
        "record(unheard.OF)",
        "record(*name)",
        "record(**name)",
        "map(record, name)",
        "other(callback=tallymark.record)",
    ],
)
def test_what_is_computed_at_run_time_is_told(scan: Scan, line: str) -> None:
    found = scan(f"""
        import tallymark
        from tallymark import record
        import unheard
        CHANGED = "a"
        CHANGED = "b"
        SET = "a"
        LOOP = LOOP
        TABLE = {{"x": "y"}}
        def work(name):
            global SET
            SET = name
            {line}
    """)
    assert {meter for meter, _ in found} == {None}


@pytest.mark.parametrize(
    "source",
    [
        "from elsewhere import record, track_usage\nrecord('a')\ntrack_usage('b')",
        "record('a')",
        "from tallymark import record\ndef f(record): record('a')",
        "from tallymark import record\ndef f():\n    record = print\n    record('a')",
        "from tallymark import record\n[record('a') for record in ()]",
        "import tallymark\ntallymark.identify('a')\ntallymark.configure(endpoint='b')",
        "import logging\nlogging.record('a')\nself.record('b')",
        "from tallymark import usage\nusage.add(3)",
        "'record(1)'",
    ],
)
def test_what_only_looks_like_it(scan: Scan, source: str) -> None:
    assert scan(source) == set()


def test_adding_to_a_meter_that_is_declared_elsewhere(scan: Scan) -> None:
    assert scan("from tallymark import usage\nusage.add(3, meter='a')\nusage.add(3, meter=f())") == {
        ("a", "INHERITED"),
        (None, "INHERITED"),
    }


def test_the_lines(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("from tallymark import track_usage\n\n@track_usage(\n    'x')\ndef f(): ...\n")
    (use,) = uses(tmp_path)
    assert (use.file, use.line, use.unit) == (str(tmp_path / "a.py"), 3, "{request}")
    assert use.unit is not NoUnit.COMPUTED


def test_only_the_code_of_the_service_is_read(tmp_path: Path) -> None:
    for name in (".venv/a", ".git/a", "node_modules/a", "env/a", "x/__pycache__/a", "build/a", "kept/a", "dist/a"):
        file = tmp_path / f"{name}.py"
        file.parent.mkdir(parents=True)
        file.write_text("import tallymark; tallymark.record('m')")
    (tmp_path / "env/pyvenv.cfg").touch()
    (tmp_path / "dist/__init__.py").touch()
    (tmp_path / "notebook.ipynb").write_text("{}")
    (tmp_path / "kept/link.py").symlink_to(tmp_path / "kept/a.py")
    found = sorted(use.file for use in uses(tmp_path))
    assert found == [str(tmp_path / "dist/a.py"), str(tmp_path / "kept/a.py")]
    assert len(read_sources([tmp_path / ".venv", tmp_path, tmp_path / "kept/a.py"]).files) == 4


def test_what_cannot_be_read_is_told_and_the_rest_is_read(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("x = 1\ndef f(:\n")
    (tmp_path / "nul.py").write_bytes(b"x = '\0'")
    (tmp_path / "latin.py").write_bytes(b"x = '\xe9'")
    (tmp_path / "declared.py").write_bytes(b"# coding: latin-1\nimport tallymark; tallymark.record('\xe9')")
    (tmp_path / "deep.py").write_text("x = " + "+".join("1" * 30_000))
    (tmp_path / "gone.py").symlink_to(tmp_path / "nowhere")
    (tmp_path / "good.py").write_text("import tallymark; tallymark.record('m'); '\\d'")
    sources = read_sources([tmp_path])
    found = [use.meter for source in sources.files for use in uses_in(source, sources)]
    assert found == ["é", "m"]
    told = {Path(one.name).name: (one.line, one.message) for one in sources.unreadable}
    assert set(told) == {"bad.py", "nul.py", "latin.py", "deep.py", "gone.py"}
    assert told["bad.py"][0] == 2
    assert "is not valid for Python 3." in told["bad.py"][1]


def test_aliases_without_end_end(scan: Scan) -> None:
    chain = "\n".join(f"x{n} = x{n - 1} + x{n - 1}" for n in range(1, 60))
    again = "\n".join("y = y.z" for _ in range(200))
    assert scan(f"import tallymark\nx0 = 'x'\n{chain}\n{again}\ntallymark.record(x59)\ntallymark.record(y)") == {
        (None, "INHERITED")
    }


def test_paths_without_python(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no Python file in"):
        read_sources([tmp_path])
    with pytest.raises(UserError, match="nowhere cannot be read: No such file"):
        read_sources([tmp_path / "nowhere"])
