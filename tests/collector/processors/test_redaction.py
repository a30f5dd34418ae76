"""Which values are never stored, by name and by look, and which are none of the rule's business."""

from __future__ import annotations

import pytest

from tallymark_collector.model import Attributes
from tallymark_collector.processors.redaction import STANDARD, Redaction
from tallymark_collector.processors.secret_texts import REDACTED

SECRETS = [
    "http.request.header.authorization",
    "http.request.header.Authorization",
    "http.request.header.proxy-authorization",
    "http.request.header.cookie",
    "http.response.header.set_cookie",
    "http.response.header.set-cookie",
    "http.request.header.x-api-key",
    "http.request.header.x_api_key",
    "http.request.header.ocp-apim-subscription-key",
    "http.request.header.x-amz-security-token",
    "http.request.header.x-goog-api-key",
    "rpc.grpc.request.metadata.authorization",
    "rpc.response.metadata.set-cookie",
    "db.connection_string",
    "process.command_line",
    "process.command_args",
    "process.environment_variable.AWS_SECRET_ACCESS_KEY",
    "authorization",
    "db.password",
    "app.client_secret",
    "app.clientSecret",
    "api_key",
    "api-key",
    "customer.apiKey",
    "oauth.access_token",
    "refreshToken",
    "ssh.private_key",
    "bearer",
    "hmac",
    "otp",
    "private_key_pem",
    "client-secret-value",
    "clientSecretValue",
    "password.text",
    "aws_access_key_id",
    "aws.access_key_id",
    "awsAccessKeyId",
    "auth_header",
    "authorization_header",
    "auth_token",
    "http.request.header.x-auth",
    "http.request.header.x-auth-token",
    "http.request.header.x-bearer",
    "http.request.header.x-hub-hmac-sha256",
]
NAMES = [
    "http.request.header.content-type",
    "http.request.header.user-agent",
    "http.request.header.x-request-id",
    "http.request.header.idempotency-key",
    "http.request.header.x-forwarded-for",
    "http.route",
    "http.request.method",
    "gen_ai.token.type",
    "gen_ai.usage.input_tokens",
    "session.id",
    "enduser.id",
    "user.id",
    "messaging.kafka.message.key",
    "aws.s3.key",
    "key",
    "token",
    "app.session",
    "network.bearer",
    "verification.otp",
    "crypto.hmac",
    "token_type",
    "token.type",
    "tokens",
    "llm.tokens",
    "llm.token_count",
    "session.duration",
    "session.previous_id",
    "session_kind",
    "bearer.type",
    "http.auth.scheme",
    "auth.method",
    "auth",
    "header",
    "value",
    "public_key_pem",
    "s3.key_id",
    "http.request.header.x-author",
    "http.request.header.author",
    "secretary",
    "tallymark.account.id",
    "tallymark.meter.api_key",
    "service.name",
    "service.instance.id",
]


@pytest.mark.parametrize("name", SECRETS)
def test_a_credential_by_its_name_leaves_its_name_alone(name: str) -> None:
    sent = Attributes.of({name: "s3cr3t", "a": 1})
    assert STANDARD.attributes(sent) == Attributes.of({name: REDACTED, "a": 1})
    assert STANDARD.attributes(Attributes.of({name: ("s3cr3t", "two")})).get(name) == (REDACTED,)
    assert STANDARD.attributes(Attributes.of({name: b"s3cr3t"})).get(name) == REDACTED
    assert STANDARD.attributes(Attributes.of({"outer": Attributes.of({name: "s3cr3t"})})).get("outer") == Attributes.of(
        {name: REDACTED}
    )
    for nothing in (None, True):
        assert STANDARD.attributes(Attributes.of({name: nothing})).get(name) is nothing


@pytest.mark.parametrize("name", NAMES)
def test_other_names_keep_their_values(name: str) -> None:
    for value in ("value", 17, 1.5, b"value", ("a", "b"), Attributes.of({"c": "d"})):
        sent = Attributes.of({name: value})  # type: ignore[dict-item]
        assert STANDARD.attributes(sent) is sent, "the same object: nothing is made again"


@pytest.mark.parametrize(
    ("sent", "stored"),
    [
        ("https://user:password@example.com/a?b=c", "https://REDACTED:REDACTED@example.com/a?b=c"),
        ("https://user:pass:w@rd@example.com/", "https://REDACTED:REDACTED@example.com/"),
        ("https://ghp_0123@example.com/", "https://REDACTED@example.com/"),
        ("postgresql://me:hunter2@db:5432/usage", "postgresql://REDACTED:REDACTED@db:5432/usage"),
        ("//me:hunter2@db", "//REDACTED:REDACTED@db"),
        ("https://example.com/a@b?c=d@e", None),
        ("https://example.com:8080/a@b", None),
        (
            "https://bucket.example/o?AWSAccessKeyId=A&Signature=B",
            "https://bucket.example/o?AWSAccessKeyId=REDACTED&Signature=REDACTED",
        ),
        ("/blob?sv=2024&sig=abc%3D", "/blob?sv=2024&sig=REDACTED"),
        ("/o?X-Goog-Signature=abc&x=1", "/o?X-Goog-Signature=REDACTED&x=1"),
        ("/o?X-Amz-Credential=a/b&X-Amz-Signature=c", "/o?X-Amz-Credential=REDACTED&X-Amz-Signature=REDACTED"),
        ("api_key=s3cr3t&q=1", "api_key=REDACTED&q=1"),
        ("q=1&ApiKey=s3cr3t", "q=1&ApiKey=REDACTED"),
        ("/a?api%5Fkey=s3cr3t", "/a?api%5Fkey=REDACTED"),
        ("/a?q=1#access_token=s3cr3t", "/a?q=1#access_token=REDACTED"),
        ("/a;jsessionid=s3cr3t?q=1", "/a;jsessionid=REDACTED"),
        ("GET /a?token=s3cr3t HTTP/1.1", "GET /a?token=REDACTED HTTP/1.1"),
        ("went to 'https://a.example/?key=s3cr3t', twice", "went to 'https://a.example/?key=REDACTED', twice"),
        ("tmk_4k7qz0m2xwvt_" + "s" * 49, "tmk_4k7qz0m2xwvt_REDACTED"),
        ("Authorization: Bearer abc.def-123", "Authorization: REDACTED"),
        ("sent authorization: Basic dXNlcjpwYXNz to it", "sent authorization: REDACTED to it"),
        ("{'Authorization': 'Bearer s3cr3t', 'x': 1}", "{'Authorization': 'REDACTED', 'x': 1}"),
        ('{"authorization": "Bearer s3cr3t"}', '{"authorization": "REDACTED"}'),
        ("Proxy-Authorization: s3cr3t", "Proxy-Authorization: REDACTED"),
        ("Bearer abcdefghijklmnopqrst", "Bearer REDACTED"),
        ("got bearer s3cr3t from it", "got bearer REDACTED from it"),
        ("Basic dXNlcjpwYXNz", "Basic REDACTED"),
        ("login failed password=hunter2 user=anne", "login failed password=REDACTED user=anne"),
        ("db_password='two words' x", "db_password='REDACTED' x"),
        ('with secret="two words', 'with secret="REDACTED'),
        ("Config(api_key=s3cr3t, x=1)", "Config(api_key=REDACTED x=1)"),
        ("Cookie: a=b; session=s3cr3t", "Cookie: a=b; session=REDACTED"),
        ('{"user": "anne", "password": "hunter2", "a": 1}', '{"user": "anne", "password": "REDACTED", "a": 1}'),
        ('{"password":"a\\"b\\\\"}', '{"password":"REDACTED"}'),
        ('"{\\"token\\": \\"s3cr3t\\", \\"a\\": 1}"', '"{\\"token\\": \\"REDACTED\\", \\"a\\": 1}"'),
        ('{"clientSecret": "s3', '{"clientSecret": "REDACTED'),
        (
            "key: -----BEGIN RSA PRIVATE KEY-----\nMIIE\nabc\n-----END RSA PRIVATE KEY-----\n",
            "key: -----BEGIN RSA PRIVATE KEY-----REDACTED-----END PRIVATE KEY-----\n",
        ),
        ("-----BEGIN PRIVATE KEY-----\\nMIIE", "-----BEGIN PRIVATE KEY-----REDACTED-----END PRIVATE KEY-----"),
        ("charged with sk_live_51H8abcdEFGH", "charged with sk_live_REDACTED"),
        ("rk_test_51H8abcdEFGH", "rk_test_REDACTED"),
        ("as AKIAIOSFODNN7EXAMPLE", "as AKIAREDACTED"),
        ("ghp_" + "a1" * 18, "ghp_REDACTED"),
        ("xoxb-1234567890-abcdef", "xoxb-REDACTED"),
        ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk", "REDACTED"),
        ("jwt eyJhbGciOiJub25lIn0.eyJzdWIiOiIxIn0. here", "jwt REDACTED here"),
        ("https://a.example/cb?code=SplxlOBeZQQYbYS6WxSbIA&state=x", "https://a.example/cb?code=REDACTED&state=x"),
        ("https://a.example/login?otp=123456", "https://a.example/login?otp=REDACTED"),
        ("https://a.example/login?x=1&code=123456", "https://a.example/login?x=1&code=REDACTED"),
        ("/countries?code=DE", None),
        ("/search?q=sk_live&page=2", None),
        ("Bearer of good news", None),
        ("authorization:read", None),
        ("card.authorization:capture", None),
        ("pre-authorization:approved", None),
        ("Basic plan, 5 seats", None),
        ("Authorization of the payment", None),
        ('{"token_type": "Bearer", "tokens": "17", "session.id": "a"}', None),
        ("tokens=17 token_type=input session.id=5", None),
        ("eyJust.a.name", None),
        ("-----BEGIN CERTIFICATE-----\nMIIE\n-----END CERTIFICATE-----", None),
        ("task-list risk-assessment-for-the-whole-company", None),
        ("/search?q=token&page=2", None),
        ("/search?monkey=1&design=2&tokens=3", None),
        ("a=b", None),
        ("Basic Enterprise", None),
        ("", None),
    ],
)
def test_texts_lose_the_credentials_that_are_known_by_their_look(sent: str, stored: str | None) -> None:
    found = STANDARD.text(sent)
    assert found == (sent if stored is None else stored)
    assert (found is sent) is (stored is None)
    assert STANDARD.text(found) == found, "again changes nothing"
    for name in ("url.full", "http.target", "anything"):
        assert STANDARD.attributes(Attributes.of({name: sent})).get(name) == found
        assert STANDARD.attributes(Attributes.of({name: (sent, "b")})).get(name) == (found, "b")


def test_a_name_of_ones_own_and_a_beginning() -> None:
    rule = Redaction(("enduser.*", "Customer.Email"))
    sent = Attributes.of({"enduser.id": "anne", "customer.email": "a@b.example", "enduserid": "c", "d": "e"})
    assert dict(rule.attributes(sent)) == {
        "enduser.id": REDACTED,
        "customer.email": REDACTED,
        "enduserid": "c",
        "d": "e",
    }
    ours = Attributes.of({"tallymark.account.id": "acme", "service.name": "shop"})
    assert Redaction(("tallymark.*", "service.name")).attributes(ours) is ours, "what is billed hangs on these"


def test_off_is_off() -> None:
    sent = Attributes.of(dict.fromkeys(SECRETS, "https://a:b@c/?sig=d"))
    off = Redaction(on=False)
    assert off.attributes(sent) is sent
    assert off.text("https://a:b@c") == "https://a:b@c"
    assert not off.names_secret("authorization")
