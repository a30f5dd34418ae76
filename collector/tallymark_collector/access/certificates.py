"""Client certificates as names that a tenant can be looked up by.

A certificate is known by what its authority vouches for (a URI such as a SPIFFE id, or a DNS name, in the subject
alternative name), which stays when it is renewed, or by its own SHA-256, which does not. The subject's common name is
not looked at: nobody checks what authorities write there.
"""

from __future__ import annotations

import hashlib
import re
import ssl
from collections.abc import Iterable, Mapping
from typing import Final

from tallymark_collector.errors import UserError

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
    """The names of the client's certificate in a gRPC call's auth context, which TLS has verified; none without one."""
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
    found = [f"sha256:{hashlib.sha256(der).hexdigest()}"]
    for kind, name in sorted(names, key=lambda pair: pair[0], reverse=True):  # addresses before host names
        try:
            found.append(check_identity(f"{kind}:{name}"))
        except UserError:
            continue  # a name that nobody can have trusted, such as one with a wildcard
    return tuple(dict.fromkeys(found))[:MAX_IDENTITIES]
