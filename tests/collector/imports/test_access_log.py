"""Lines of access logs: what servers write, what clients make them write, and why a line cannot be read."""

from __future__ import annotations

import pytest

from tallymark_collector.imports.access_log import combined, common, path_of
from tallymark_collector.imports.faults import LineFault

TIME = "[17/May/2015:10:05:03 +0000]"


def test_a_combined_line() -> None:
    assert combined(f'::1 - frank {TIME} "POST /a/b?c=d HTTP/1.1" 201 2326 "http://x/" "Mozilla (X; Y)"') == {
        "host": "::1",
        "user": "frank",
        "time": "17/May/2015:10:05:03 +0000",
        "request": "POST /a/b?c=d HTTP/1.1",
        "method": "POST",
        "target": "/a/b?c=d",
        "path": "/a/b",
        "protocol": "HTTP/1.1",
        "status": "201",
        "bytes": "2326",
        "referrer": "http://x/",
        "user_agent": "Mozilla (X; Y)",
    }


def test_a_common_line_ends_with_the_size() -> None:
    line = f'2001:db8::7 - - {TIME} "GET / HTTP/2.0" 304 -'
    found = common(line)
    assert (found["host"], found["bytes"], found["status"], "user" in found) == ("2001:db8::7", "0", "304", False)
    with pytest.raises(LineFault, match="expected the line's end at character"):
        common(line + ' "-" "curl"')


def test_quotes_in_quotes_are_escaped() -> None:
    found = combined(rf'h - - {TIME} "GET /\"a\\b\" HTTP/1.1" 200 1 "-" "say \"hi\" \x22"')
    assert (found["path"], found["user_agent"]) == ('/"a\\b"', 'say "hi" \\x22')


@pytest.mark.parametrize("user", ["john doe", "o'neil", '""', "a-b@c.d", "-"])
def test_users(user: str) -> None:
    found = common(f'h - {user} {TIME} "GET / HTTP/1.1" 200 1')
    assert found.get("user") == (None if user in ("-", '""') else user)


@pytest.mark.parametrize("request_", ["-", "", r"\x16\x03\x01", "GET", "GET /", "hello world again"])
def test_what_is_no_request_is_a_line_without_path(request_: str) -> None:
    found = common(f'h - - {TIME} "{request_}" 400 226')
    assert (found["request"], found["status"]) == (request_, "400")
    assert not {"method", "path", "target"} & set(found)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("", "expected the client's address at character 1"),
        ("h", "expected the identity"),
        ("h - ", "expected the user"),
        ("h - - 17/May/2015", "expected the time in brackets"),
        (f'h - - {TIME} "GET / HTTP/1.1', "expected the request between quotes"),
        (f'h - - {TIME} "GET / HTTP/1.1" OK 1', "expected the status, three digits"),
        (f'h - - {TIME} "GET / HTTP/1.1" 200 1.5', "expected the referrer between quotes at character"),
        (f'h - - {TIME} "GET / HTTP/1.1" 200 x', "expected the size in bytes"),
        (f'h - - {TIME} "GET / HTTP/1.1" 200 1 "-" "no end', "expected the user agent between quotes"),
        (f'h - - {TIME} "GET / HTTP/1.1" 200 1 "-" "a" b', "expected the line's end"),
    ],
)
def test_why_a_line_cannot_be_read(line: str, said: str) -> None:
    with pytest.raises(LineFault, match=said):
        combined(line)


@pytest.mark.parametrize(
    "evil", ["[" * 100_000, " [" * 50_000, '"' * 100_000, '\\"' * 50_000, "a " * 50_000, " " * 100_000]
)
def test_a_hostile_line_takes_no_longer_than_another(evil: str) -> None:
    """A pattern that tries again from everywhere would not end within this test's time."""
    for line in (
        evil,
        f"h - - {evil}",
        f"h - - {TIME} {evil}",
        f'h - - {TIME} "{evil}',
        f'h - - {TIME} "x" 200 1 "{evil}',
    ):
        with pytest.raises(LineFault):
            combined(line)


@pytest.mark.parametrize(
    ("target", "path"),
    [
        ("/a?b#c", "/a"),
        ("/", "/"),
        ("http://host:80/a/b?c", "/a/b"),
        ("http://host", "/"),
        ("http://host?q", "/"),
        ("*", "*"),
        ("host:443", "host:443"),
        ("//a", "//a"),
    ],
)
def test_paths(target: str, path: str) -> None:
    assert path_of(target) == path
