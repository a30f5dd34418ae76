"""Client certificates as names that a tenant can be looked up by.

A certificate is known by what its authority vouches for (a URI such as a SPIFFE id, or a DNS name, in the subject
alternative name), which stays when it is renewed, or by its own SHA-256, which does not. The subject's common name is
not looked at: nobody checks what authorities write there.

TLS looks at a certificate's dates in a handshake alone. A session that is resumed later (gRPC's by two days), and a
connection that stays, would outlive them; so the end is looked at again with each request.
"""

from __future__ import annotations

import hashlib
import re
import ssl
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from functools import lru_cache
from typing import Final

from tallymark_collector.errors import Unauthenticated, UserError

MAX_IDENTITIES: Final = 32
"""Names of one certificate that are looked up."""

_SHA256: Final = re.compile(r"[0-9a-f]{64}", re.ASCII)
_DNS: Final = re.compile(r"(?=.{1,253}$)[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*", re.ASCII)
_URI: Final = re.compile(r"[a-z][a-z0-9+.-]*:[\x21-\x7e]{1,2000}", re.ASCII)


def check_identity(text: str) -> str:
    """`sha256:…`, `uri:…` or `dns:…` as it is stored. Raises UserError."""
    kind, _, name = text.strip().partition(":")
    match kind.lower():
        case "sha256" if _SHA256.fullmatch(name := name.replace(":", "").lower()):
            return f"sha256:{name}"
        case "uri" if _URI.fullmatch(name):
            return f"uri:{name}"
        case "dns" if _DNS.fullmatch(name := name.lower()):
            return f"dns:{name}"
    raise UserError(
        "a client certificate is named by uri:… or dns:… of its subject alternative name, or by sha256:… of its DER"
        " form (64 hexadecimal digits): uri:spiffe://acme.example/shop, dns:shop.acme.example"
    )


def of_call(properties: Mapping[str, Iterable[bytes]]) -> tuple[str, ...]:
    """The names of the client's certificate in a gRPC call's auth context, which TLS has verified; none without one.
    Raises Unauthenticated where it has expired since."""
    chain = [*properties.get("x509_pem_cert", ())]
    if not chain:
        return ()
    names = [("uri", name) for name in properties.get("peer_uri", ())]
    names += [("dns", name) for name in properties.get("peer_dns", ())]
    return _names(ssl.PEM_cert_to_DER_cert(chain[0].decode()), [(kind, name.decode("latin-1")) for kind, name in names])


def of_connection(connection: ssl.SSLObject | ssl.SSLSocket) -> tuple[str, ...]:
    """The same of a connection of Python's `ssl` (of asyncio: `transport.get_extra_info("ssl_object")`)."""
    certificate = connection.getpeercert(binary_form=True)
    if not certificate:
        return ()
    decoded = connection.getpeercert() or {}
    # Attributes of a certificate are pairs here, whatever the stubs know of them.
    pairs: Iterable[tuple[str, str]] = decoded.get("subjectAltName", ())  # type: ignore[assignment]
    return _names(certificate, [(kind.lower(), name) for kind, name in pairs if kind in ("URI", "DNS")])


def _names(der: bytes, names: Iterable[tuple[str, str]]) -> tuple[str, ...]:
    end = not_after(der)
    if end is not None and end < datetime.now(timezone.utc):
        raise Unauthenticated(f"the client certificate has expired at {end:%FT%TZ}: connect with a new one")
    found = [f"sha256:{hashlib.sha256(der).hexdigest()}"]
    for kind, name in sorted(names, key=lambda pair: pair[0], reverse=True):  # addresses before host names
        try:
            found.append(check_identity(f"{kind}:{name}"))
        except UserError:
            continue  # a name that nobody can have trusted, such as one with a wildcard
    return tuple(dict.fromkeys(found))[:MAX_IDENTITIES]


@lru_cache(maxsize=1024)
def not_after(der: bytes) -> datetime | None:
    """When a certificate ends (RFC 5280, 4.1.2.5); None where that cannot be read."""
    try:
        _, at, _ = _element(der, 0)  # Certificate
        _, at, _ = _element(der, at)  # TBSCertificate
        tag, _, end = _element(der, at)
        if tag == _VERSION:
            _, _, end = _element(der, end)
        for _ in range(2):  # behind the serial number: signature, issuer
            _, _, end = _element(der, end)
        _, at, _ = _element(der, end)  # Validity
        _, _, end = _element(der, at)  # notBefore
        tag, at, end = _element(der, end)
        text = der[at:end].decode("ascii")
        if tag == _UTC_TIME:
            text = f"{'19' if text >= '50' else '20'}{text}"
        return datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=timezone.utc)
    except (IndexError, ValueError):
        return None


def _element(der: bytes, at: int) -> tuple[int, int, int]:
    """Tag, beginning and end of the value of the DER element there."""
    tag, length, at = der[at], der[at + 1], at + 2
    if length & 0x80:
        size = length & 0x7F
        length, at = int.from_bytes(der[at : at + size], "big"), at + size
    return tag, at, at + length


_VERSION: Final = 0xA0
_UTC_TIME: Final = 0x17
