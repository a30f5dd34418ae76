from datetime import date
from decimal import Decimal
from pathlib import Path

import pytest

from tallymark_collector.billing import Catalog, CatalogError, read_catalog
from tallymark_collector.billing.catalog_file import parse_catalog
from tallymark_collector.billing.plans import FlatFee, Graduated, PerUnit, Plan, Volume
from tallymark_collector.documents.reading import MAX_FILE_BYTES

GOOD = """\
currency: EUR
meters:
  api.requests: {unit: "{request}"}
  llm.tokens:   {unit: "{token}"}
  egress.bytes: {unit: By}
plans:
  starter:
    name: Starter
    charges:
      - {flat: 29.00, name: Base fee}
      - {meter: api.requests, included: 10_000, unit_price: 0.0004}
      - meter: llm.tokens
        graduated: &tiers
          - {up_to: 1000000, unit_price: "0.000002", flat: 1}
          - {unit_price: 0.0000015}
      - meter: egress.bytes
        volume: *tiers
  on: {charges: []}
accounts:
  acme: {plan: starter, since: 2026-01-15, anchor_day: 15, time_zone: Europe/Zurich}
  0123:
    - {plan: on, since: 2026-01-15, until: 2026-02-01}
    - {plan: starter, since: 2026-02-01}
  yes: {plan: on, since: 2026-01-15}
  2026-01-01: {plan: on, since: 2026-01-15}
  1.50: {plan: on, since: 2026-01-15}
  null: {plan: on, since: 2026-01-15}
"""

MISTAKES = """\
currency: eur
meters:
  calls: {unit: {call}}
  bytes: {unit: By}
plans:
  pro:
    charges:
      - {flatt: 29.00}
      - {meter: cals, unit_price: 1}
      - meter: bytes
        graduated:
          - {up_to: 100, unit_price: -1}
          - {up_to: 50, unit_price: 1}
          - {unit_price: 1e-5}
accounts:
  acme:
    plan: prof
    since: 2026-02-30
    anchor_day: 32
    time_zone: Europe/Zürich
"""


def problems(text: str) -> list[str]:
    with pytest.raises(CatalogError) as caught:
        parse_catalog(text)
    assert str(caught.value).splitlines() == [str(problem) for problem in caught.value.problems]
    return [str(problem).removeprefix("plans.yaml:") for problem in caught.value.problems]


def only_problem(text: str) -> str:
    found = problems(text)
    assert len(found) == 1, found
    return found[0]


def with_charge(charge: str, currency: str = "EUR") -> str:
    return f"currency: {currency}\nmeters: {{calls: {{unit: s}}}}\nplans:\n  pro:\n    charges:\n      - {charge}\n"


def with_account(account: str) -> str:
    return f"currency: EUR\nplans: {{pro: {{charges: []}}}}\naccounts:\n  {account}\n"


@pytest.fixture
def catalog() -> Catalog:
    return parse_catalog(GOOD)


def test_every_kind_of_charge_is_read(catalog: Catalog):
    flat, per_unit, graduated, volume = catalog.plans["starter"].charges
    assert isinstance(flat, FlatFee)
    assert isinstance(per_unit, PerUnit)
    assert isinstance(graduated, Graduated)
    assert isinstance(volume, Volume)
    assert (flat.name, str(flat.flat)) == ("Base fee", "29.00")
    assert (per_unit.meter, per_unit.included, str(per_unit.unit_price)) == ("api.requests", 10_000, "0.0004")
    assert [tier.up_to for tier in graduated.graduated] == [1_000_000, None]
    assert [tier.unit_price for tier in graduated.graduated] == [Decimal("0.000002"), Decimal("0.0000015")]
    assert volume.volume == graduated.graduated


def test_plans_carry_their_currency_and_their_units(catalog: Catalog):
    plan = catalog.plans["starter"]
    assert (plan.id, plan.name, plan.currency) == ("starter", "Starter", "EUR")
    assert plan.units == {"api.requests": "{request}", "llm.tokens": "{token}", "egress.bytes": "By"}
    assert catalog.plans["on"].units == {}


def test_ids_are_their_text_whatever_yaml_would_make_of_them(catalog: Catalog):
    assert [s.account for s in catalog.subscriptions] == [
        "acme",
        "0123",
        "0123",
        "yes",
        "2026-01-01",
        "1.50",
        "null",
    ]


def test_subscriptions_have_their_terms(catalog: Catalog):
    acme, before, after = catalog.subscriptions[:3]
    assert (acme.plan, acme.since, acme.anchor_day) == ("starter", date(2026, 1, 15), 15)
    assert (acme.time_zone, acme.until) == ("Europe/Zurich", None)
    assert (before.plan, before.until, before.time_zone, before.anchor_day) == ("on", date(2026, 2, 1), "UTC", 1)
    assert (after.plan, after.since) == ("starter", date(2026, 2, 1))


def test_eleven_mistakes_are_eleven_problems_each_at_its_line():
    assert [problem.split(": ")[:2] for problem in problems(MISTAKES)] == [
        ["1", "currency"],
        ["3", "meters.calls.unit"],
        ["8", "plans.pro.charges[0].flatt"],
        ["9", "plans.pro.charges[1].meter"],
        ["12", "plans.pro.charges[2].graduated[0].unit_price"],
        ["13", "plans.pro.charges[2].graduated[1].up_to"],
        ["14", "plans.pro.charges[2].graduated[2].unit_price"],
        ["17", "accounts.acme.plan"],
        ["18", "accounts.acme.since"],
        ["19", "accounts.acme.anchor_day"],
        ["20", "accounts.acme.time_zone"],
    ]


def test_problems_say_what_to_do():
    said = "\n".join(problems(MISTAKES))
    for hint in (
        "did you mean EUR?",
        'text with braces needs quotes, e.g. "{request}"',
        "unknown field; did you mean flat?",
        "add it under `meters` or use calls",
        "must not be negative, got -1",
        "must be above 100: the tier before it ends at 100",
        "write it like 0.0005",
        "add it under `plans` or use pro",
        "2026-02-30 is not a day of the calendar",
        "from 1 to 31, got '32'",
        "did you mean Europe/Zurich?",
    ):
        assert hint in said


def test_a_problem_knows_its_column():
    with pytest.raises(CatalogError) as caught:
        parse_catalog(with_charge("{meter: calls, unit_price: x}"), "prices.yaml")
    (problem,) = caught.value.problems
    assert (problem.file, problem.line, problem.column) == ("prices.yaml", 6, 36)


@pytest.mark.parametrize(
    ("charge", "problem"),
    [
        ("{meter: calls}", "6: plans.pro.charges[0]: a charge has exactly one of"),
        ("{flat: 1, unit_price: 1}", "6: plans.pro.charges[0]: a charge has exactly one of"),
        ("hello", "6: plans.pro.charges[0]: a charge has exactly one of"),
        ("{unit_price: 1}", "6: plans.pro.charges[0].meter: is required"),
        ("{flat: }", "6: plans.pro.charges[0].flat: expected a number in plain digits, e.g. 0.0005, not nothing"),
        ("{flat: 1.005}", "6: plans.pro.charges[0].flat: 1.005 has 3 decimals, the currency has 2"),
        ("{flat: 1, name: ''}", "6: plans.pro.charges[0].name: must not be empty"),
        ("{flat: 1, name: [a]}", "6: plans.pro.charges[0].name: expected text, got a list"),
        (
            "{meter: calls, unit_price: 0.0000000000000000001}",
            "6: plans.pro.charges[0].unit_price: at most 18 decimals, got 19",
        ),
        (
            "{meter: calls, unit_price: 1234567890123456789}",
            "6: plans.pro.charges[0].unit_price: at most 18 digits before the point, got 19",
        ),
        ("{meter: calls, unit_price: .inf}", "6: plans.pro.charges[0].unit_price: '.inf' is not a number"),
        ("{meter: calls, volume: []}", "6: plans.pro.charges[0].volume: needs at least one tier"),
        ("{meter: calls, volume: 3}", "6: plans.pro.charges[0].volume: expected a list (- …), got the text '3'"),
        (
            "{meter: calls, volume: [{up_to: 1, unit_price: 1}]}",
            "6: plans.pro.charges[0].volume[0].up_to: the last tier is open",
        ),
        (
            "{meter: calls, volume: [{unit_price: 1}, {unit_price: 1}]}",
            "6: plans.pro.charges[0].volume[0].up_to: only the last tier may be open",
        ),
        (
            "{meter: calls, volume: [{up_to: 0, unit_price: 1}, {unit_price: 1}]}",
            "6: plans.pro.charges[0].volume[0].up_to: must be above 0",
        ),
        (
            "{meter: calls, volume: [{up_to: 5, unit_price: 1}, {up_to: 5, unit_price: 1}, {unit_price: 1}]}",
            "6: plans.pro.charges[0].volume[1].up_to: must be above 5",
        ),
        (
            "{meter: calls, volume: [{unit_price: 1, flat: 0.001}]}",
            "6: plans.pro.charges[0].volume[0].flat: 0.001 has 3 decimals",
        ),
        (
            "{meter: calls, unit_price: 1}\n      - {meter: calls, unit_price: 2}",
            "7: plans.pro.charges[1].meter: 'calls' has a charge in this plan already",
        ),
        ("{meter: calls, unit_price: 1, colour: red}", "6: plans.pro.charges[0].colour: unknown field; known are"),
        (
            "{meter: calls, unit_prise: 1}",
            "6: plans.pro.charges[0].unit_prise: unknown field; did you mean unit_price?",
        ),
    ],
)
def test_charges_are_checked(charge: str, problem: str):
    assert only_problem(with_charge(charge)).startswith(problem)


@pytest.mark.parametrize(
    ("account", "problem"),
    [
        ("a: {plan: pro}", "4: accounts.a.since: is required"),
        ("a: {since: 2026-01-01}", "4: accounts.a.plan: is required"),
        ("a: pro", "4: accounts.a: expected a mapping, e.g. {plan: pro, since: 2026-01-01}"),
        ("a: []", "4: accounts.a: needs at least one subscription"),
        ("'': {plan: pro, since: 2026-01-01}", '4: accounts[""]: must not be empty'),
        (r'"a\0": {plan: pro, since: 2026-01-01}', r'4: accounts["a\u0000"]: must not contain the character NUL'),
        (r'"a\uD800": {plan: pro, since: 2026-01-01}', "4: accounts: contains half of a surrogate"),
        ("a: {plan: pro, since: 2026-1-1}", "4: accounts.a.since: expected a day as YYYY-MM-DD"),
        ("a: {plan: pro, since: 1969-12-31}", "4: accounts.a.since: expected a day from 1970-01-01"),
        ("a: {plan: pro, since: 2026-01-01T00:00:00}", "4: accounts.a.since: expected a day as YYYY-MM-DD"),
        ("a: {plan: pro, since: 1767225600}", "4: accounts.a.since: expected a day as YYYY-MM-DD"),
        (
            "a: {plan: pro, since: 2026-01-02, until: 2026-01-02}",
            "4: accounts.a.until: is the first day that is not covered, so at least 2026-01-03",
        ),
        (
            "a: {plan: pro, since: 2026-01-01, cycle: year}",
            "4: accounts.a.cycle: expected one of monthly, yearly, weekly",
        ),
        (
            "a: {plan: pro, since: 2026-01-01, cycle: Yearly, anchor_month: 1}",
            "4: accounts.a.cycle: expected one of monthly, yearly, weekly, got 'Yearly'; did you mean yearly?",
        ),
        (
            "a: {plan: pro, since: 2026-01-01, cycle: yearly}",
            "4: accounts.a.anchor_month: is required in a yearly cycle",
        ),
        (
            "a: {plan: pro, since: 2026-01-01, cycle: yearly, anchor_month: 13}",
            "4: accounts.a.anchor_month: expected a month from 1 to 12, got '13'",
        ),
        (
            "a: {plan: pro, since: 2026-01-01, cycle: yearly, anchor_month: 2, anchor_day: 30}",
            "4: accounts.a.anchor_month: February never has a day 30; `anchor_day` can be 29 at most",
        ),
        (
            "a: {plan: pro, since: 2026-01-01, cycle: yearly, anchor_month: 4, anchor_day: 31}",
            "4: accounts.a.anchor_month: April never has a day 31; `anchor_day` can be 30 at most",
        ),
        (
            "a: {plan: pro, since: 2026-01-01, cycle: yearly, anchor_month: 1, anchor_weekday: monday}",
            "4: accounts.a.anchor_weekday: a yearly cycle has no weekday; remove it, or say `cycle: weekly`",
        ),
        (
            "a: {plan: pro, since: 2026-01-01, anchor_month: 1}",
            "4: accounts.a.anchor_month: a monthly cycle has no month of its own; remove it, or say `cycle: yearly`",
        ),
        (
            "a: {plan: pro, since: 2026-01-01, cycle: weekly}",
            "4: accounts.a.anchor_weekday: is required in a weekly cycle",
        ),
        (
            "a: {plan: pro, since: 2026-01-01, cycle: weekly, anchor_weekday: Mon}",
            "4: accounts.a.anchor_weekday: expected one of monday, tuesday, wednesday, thursday, friday, saturday,",
        ),
        (
            "a: {plan: pro, since: 2026-01-01, cycle: weekly, anchor_weekday: monday, anchor_day: 1}",
            "4: accounts.a.anchor_day: a weekly cycle has no day of the month; remove it and say `anchor_weekday`",
        ),
        (
            "a: {plan: pro, since: 2026-01-01, cycle: weekly, anchor_weekday: monday, anchor_month: 1}",
            "4: accounts.a.anchor_month: a weekly cycle has no month of its own",
        ),
        ("a: {plan: pro, since: 2026-01-01, anchor_weeday: monday}", "4: accounts.a.anchor_weeday: unknown field; did"),
        ("a: {plan: pro, since: 2026-01-01, anchor_day: 0}", "4: accounts.a.anchor_day: expected a day of the month"),
        ("a: {plan: pro, since: 2026-01-01, anchor_day: 1.0}", "4: accounts.a.anchor_day: expected a day of the"),
        ("a: {plan: pro, since: 2026-01-01, time_zone: +01:00}", "4: accounts.a.time_zone: '+01:00' is not an IANA"),
        ("a: {plan: pro, since: 2026-01-01, time_zone: America}", "4: accounts.a.time_zone: 'America' is not"),
        (
            "a: {plan: pro, since: 2011-12-30, time_zone: Pacific/Apia}",
            "4: accounts.a.since: Pacific/Apia had no 2011-12-30",
        ),
        (
            "a: [{plan: pro, since: 2026-01-01}, {plan: pro, since: 2026-02-01}]",
            "4: accounts.a[0].until: is required: another subscription",
        ),
        (
            "a: [{plan: pro, since: 2026-01-01, until: 2026-02-02}, {plan: pro, since: 2026-02-01}]",
            "4: accounts.a[1].since: must not be before 2026-02-02",
        ),
        (
            "a: [{plan: pro, since: 2026-01-01, untill: 2026-02-02}]",
            "4: accounts.a[0].untill: unknown field; did you mean until?",
        ),
    ],
)
def test_accounts_are_checked(account: str, problem: str):
    assert only_problem(with_account(account)).startswith(problem)


def test_ids_names_and_units_have_a_length():
    assert parse_catalog(with_account(f"{'a' * 255}: {{plan: pro, since: 2026-01-01}}")).subscriptions
    assert "at most 255 characters, got 256" in only_problem(
        with_account(f"{'a' * 256}: {{plan: pro, since: 2026-01-01}}")
    )
    assert "at most 63 characters, got 64" in only_problem(
        with_charge("{flat: 1}").replace("unit: s", f"unit: {'s' * 64}")
    )


def test_an_entry_that_is_wrong_does_not_hide_what_is_wrong_with_its_list():
    text = with_charge("{meter: calls, unit_price: x}\n      - {meter: calls, unit_price: 1}")
    assert [problem.split(": ")[1] for problem in problems(text)] == [
        "plans.pro.charges[0].unit_price",
        "plans.pro.charges[1].meter",
    ]


@pytest.mark.parametrize("currency", ["XAU", "EURO", "12"])
def test_currencies_are_checked(currency: str):
    assert only_problem(with_charge("{flat: 1.00001}", currency)).startswith("1: currency: ")


def test_unknown_fields_are_named_wherever_they_stand():
    text = with_charge("{meter: calls, volume: [{unit_price: 1, flatt: 1}]}\n    nam: Pro")
    text = text.replace("{unit: s}", "{unit: s, units: s}")
    assert [problem.split(": ", 1)[1] for problem in problems(text)] == [
        "meters.calls.units: unknown field; did you mean unit?",
        "plans.pro.charges[0].volume[0].flatt: unknown field; did you mean flat?",
        "plans.pro.nam: unknown field; did you mean name?",
    ]


def test_fees_fit_their_currency():
    assert parse_catalog(with_charge("{flat: 1.001}", "KWD"))
    assert "the currency has 0" in only_problem(with_charge("{flat: 1.5}", "JPY"))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "1: is empty; a catalogue needs `currency` and `plans`"),
        ("# nothing\n", "1: is empty"),
        ("- a\n", "1: expected a mapping (name: value), got a list"),
        ("currency: EUR\n", "1: plans: is required"),
        ("currency: EUR\nplans: [a]\n", "2: plans: expected a mapping (name: value), got a list"),
        ("currency: EUR\nplans:\n  a:\n", "3: plans.a: expected a mapping (name: value), got nothing"),
        ("currency: EUR\nplans:\n  a: {name: b}\n", "3: plans.a.charges: is required"),
        ("currency: EUR\nplans: {}\nplan: {}\n", "3: plan: unknown field; did you mean plans?"),
        ("currency: EUR\nplans: {}\ncurrency: USD\n", "3: currency: is given twice, first on line 1; keep one"),
        ("currency: EUR\nplans: {}\naccounts: {? [a] : b}\n", "3: accounts: a name must be text"),
        ("currency: EUR\nplans: {}\naccounts: {a: *b}\n", "3: is not YAML here: found undefined alias 'b'"),
        ("currency: EUR\nplans: {\n", "3: is not YAML here: "),
        ("currency: EUR\n---\nplans: {}\n", "2: is not YAML here: expected a single document"),
        ("currency: EUR\nplans: {}\nac\x07counts: {}\n", "3: the character U+0007 is not allowed in YAML"),
        ("currency: EUR\nplans: {}\naccounts: &a {b: *a}\n", "1: is nested deeper than 32 levels; an alias inside"),
        ("currency: EUR\nplans: {}\naccounts: " + "[" * 5000, "1: is nested deeper than 32 levels"),
        ("currency: !!python/name:os.system EUR\nplans: {}\n", "1: currency: the tag tag:yaml.org,2002:python/name"),
        ("currency: EUR\nplans: !mine {}\n", "2: plans: the tag !mine means nothing here"),
    ],
)
def test_files_that_are_not_catalogues(text: str, problem: str):
    assert only_problem(text).startswith(problem)


def test_merge_keys_are_refused_at_their_place():
    text = with_account("a: &a {plan: pro, since: 2026-01-01}\n  b: {<<: *a, plan: pro, since: 2026-01-01}")
    assert only_problem(text).startswith("5: accounts.b: merge keys (<<) are not read")


def test_aliases_that_double_and_double_are_refused():
    rows = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    rows += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    assert only_problem("\n".join(rows)).startswith("1: has more than 1,000,000 entries")


def test_empty_sections_are_empty():
    assert parse_catalog("currency: EUR\nmeters:\nplans:\naccounts:\n").plans == {}


def test_cycles_are_read_with_their_anchors():
    rows = [
        "a: {plan: pro, since: 2026-01-01}",
        "b: {plan: pro, since: 2026-01-01, cycle: yearly, anchor_month: 2, anchor_day: 29}",
        "c: {plan: pro, since: 2026-01-01, cycle: yearly, anchor_month: 7}",
        "d: {plan: pro, since: 2026-01-01, cycle: weekly, anchor_weekday: sunday}",
    ]
    found = parse_catalog(with_account("\n  ".join(rows))).subscriptions
    assert [(s.cycle, s.anchor_day, s.anchor_month, s.anchor_weekday) for s in found] == [
        ("monthly", 1, None, None),
        ("yearly", 29, 2, None),
        ("yearly", 1, 7, None),
        ("weekly", None, None, "sunday"),
    ]


def test_a_file_on_disk(tmp_path: Path):
    file = tmp_path / "prices.yaml"
    file.write_bytes(b"\xef\xbb\xbf" + GOOD.encode())
    assert read_catalog(file) == parse_catalog(GOOD)
    file.write_text("currency: eur\nplans: {}\n")
    with pytest.raises(CatalogError) as caught:
        read_catalog(str(file))
    assert str(caught.value).startswith(f"{file}:1: currency: ")


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"currency: EUR\n# caf\xe9\n", ":2: is not UTF-8"), (b"#" * (MAX_FILE_BYTES + 1), ":1: is larger than")],
)
def test_files_that_cannot_be_text(tmp_path: Path, content: bytes, message: str):
    file = tmp_path / "prices.yaml"
    file.write_bytes(content)
    with pytest.raises(CatalogError, match=message):
        read_catalog(file)


def test_a_file_that_is_not_there(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        read_catalog(tmp_path / "prices.yaml")


def with_meter(meter: str) -> str:
    charge = "{meter: calls, unit_price: 1}"
    return f"currency: EUR\nmeters:\n  calls: {meter}\nplans:\n  pro:\n    charges:\n      - {charge}\n"


@pytest.mark.parametrize(
    ("meter", "problem"),
    [
        (
            "{unit: s, aggregation: mx}",
            "3: meters.calls.aggregation: expected one of sum, count, max, latest, unique, average, integral, got 'mx';"
            " did you mean max?",
        ),
        ("{unit: s, aggregation: 1}", "3: meters.calls.aggregation: expected one of"),
        ("{unit: s, aggregation: unique}", "3: meters.calls.of: is required with `aggregation: unique`"),
        ("{unit: s, aggregation: max, of: user.id}", "3: meters.calls.of: is for `aggregation: unique`; a max is not"),
        ("{unit: s, of: user.id}", "3: meters.calls.of: is for `aggregation: unique`; a sum is not"),
        ("{unit: s, aggregation: unique, of: tallymark.account.id}", "3: meters.calls.of: names the account itself"),
        ("{unit: s, aggregation: unique, of: ''}", "3: meters.calls.of: must not be empty"),
        ("{unit: s, across: sum}", "3: meters.calls.across: is for levels (average, integral, latest, max); a sum has"),
        ("{unit: s, aggregation: count, stale_after: 5m}", "3: meters.calls.stale_after: is for levels"),
        ("{unit: s, aggregation: max, across: max}", "3: meters.calls.across: expected one of sum, latest, got 'max'"),
        ("{unit: s, aggregation: max, stale_after: 5}", "3: meters.calls.stale_after: expected a time of at most 31"),
        ("{unit: s, aggregation: max, stale_after: 32d}", "3: meters.calls.stale_after: expected a time of at most 31"),
        ("{unit: s, aggregation: max, stale_after: 0m}", "3: meters.calls.stale_after: expected a time of at most 31"),
        ("{unit: s, agregation: max}", "3: meters.calls.agregation: unknown field; did you mean aggregation?"),
    ],
)
def test_an_aggregation_that_makes_no_sense(meter: str, problem: str):
    assert only_problem(with_meter(meter)).startswith(problem)


def test_a_plan_has_the_aggregations_of_the_meters_that_it_charges_for():
    catalog = parse_catalog(with_meter("{unit: s, aggregation: unique, of: user.id}") + "  free: {charges: []}\n")
    pro = catalog.plans["pro"]
    assert pro.to_document()["aggregations"] == {"calls": {"aggregation": "unique", "of": "user.id"}}
    assert Plan.from_document(pro.to_document()) == pro
    assert "aggregations" not in catalog.plans["free"].to_document()
    summed, written = (parse_catalog(with_meter(meter)) for meter in ("{unit: s}", "{unit: s, aggregation: sum}"))
    assert summed.plans["pro"] == written.plans["pro"]
    assert summed.plans["pro"].version != pro.version


@pytest.mark.parametrize(
    ("meter", "document", "unit"),
    [
        ("{unit: By, aggregation: integral, stale_after: 26h}", {"stale_after": 26 * 3600}, "By.h"),
        ("{unit: By, aggregation: average, across: latest, stale_after: 5m}", {"across": "latest"}, "By"),
        ("{unit: '', aggregation: integral, stale_after: 31d}", {"stale_after": 31 * 86_400}, "h"),
    ],
)
def test_levels_have_a_time_for_which_they_hold(meter: str, document: dict[str, object], unit: str):
    plan = parse_catalog(with_meter(meter)).plans["pro"]
    written = plan.to_document()["aggregations"]["calls"]
    assert written == {"aggregation": written["aggregation"], **document}
    assert Plan.from_document(plan.to_document()) == plan
    assert plan.aggregations["calls"].unit("" if unit == "h" else "By") == unit
