"""A certificate that has expired since its handshake names nobody any more."""

from __future__ import annotations

import ssl
from datetime import datetime, timedelta, timezone

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tallymark_collector.access import certificates
from tallymark_collector.errors import Unauthenticated

NOW = datetime.now(timezone.utc).replace(microsecond=0)


def certificate(end: datetime, names: int = 1) -> x509.Certificate:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "s" * 60)] * names)
    san = x509.SubjectAlternativeName([x509.DNSName("shop.example")])
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(min(NOW, end) - timedelta(days=1))
        .not_valid_after(end)
        .add_extension(san, critical=False)
        .sign(key, hashes.SHA256())
    )


@pytest.mark.parametrize("year", [1951, 1999, 2000, 2026, 2049, 2050, 2150, 9999])
@pytest.mark.parametrize("names", [1, 10])
def test_its_end_is_read_as_others_read_it(year: int, names: int) -> None:
    """In both forms that a time has, and with names of any length before it."""
    end = datetime(year, 6, 30, 12, 34, 56, tzinfo=timezone.utc)
    made = certificate(end, names)
    der = made.public_bytes(serialization.Encoding.DER)
    assert certificates.not_after(der) == made.not_valid_after_utc == end


def test_what_is_no_certificate_has_no_end() -> None:
    der = certificate(NOW).public_bytes(serialization.Encoding.DER)
    for damaged in (b"", b"\x30", der[:40], b"\x30\x82" + der, bytes(200)):
        assert certificates.not_after(damaged) is None


def test_who_has_expired_is_refused_on_a_connection_that_is_there() -> None:
    def of(end: datetime) -> tuple[str, ...]:
        pem = certificate(end).public_bytes(serialization.Encoding.PEM)
        assert ssl.PEM_cert_to_DER_cert(pem.decode())
        return certificates.of_call({"x509_pem_cert": [pem], "peer_dns": [b"shop.example"]})

    assert "dns:shop.example" in of(NOW + timedelta(hours=1))
    with pytest.raises(Unauthenticated, match=r"certificate has expired at \d{4}-.*: connect with a new one"):
        of(NOW - timedelta(seconds=1))
