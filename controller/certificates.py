"""The controller's own certificate authority and the HTTPS certificate that it signs, made on the first run."""

from __future__ import annotations

import hashlib
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from common import keys

SERVER_NAME = "vzfleet-controller"
"""A DNS name that is in every server certificate, by which agents check it whatever address they use."""
_CA_DAYS = 3650
_SERVER_DAYS = 825
_RENEW_DAYS = 30
_BACKDATED = timedelta(days=2)
"""So that hosts whose clocks are wrong by a day can speak with a controller that was set up just now."""
_ALWAYS: tuple[x509.GeneralName, ...] = (
    x509.DNSName("localhost"),
    x509.DNSName(SERVER_NAME),
    x509.IPAddress(IPv4Address("127.0.0.1")),
    x509.IPAddress(IPv6Address("::1")),
)


@dataclass(frozen=True)
class Certificates:
    """Paths (PEM) and `fingerprint`, the sha256 of the CA certificate's DER in hexadecimal, by which agents pin it."""

    ca: Path
    chain: Path
    key: Path
    fingerprint: str

    def server_context(self) -> ssl.SSLContext:
        """An SSL context for the HTTPS server: TLS 1.2 and newer. Raises Forbidden when others can read its key."""
        keys.check_private(self.key)
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(self.chain, self.key)
        return context


def ensure(
    directory: Path, names: Sequence[str], addresses: Sequence[str], *, now: datetime | None = None
) -> Certificates:
    """The certificates in `directory`, made where one is missing, expires soon or has other names or addresses.

    The CA is made once and never again: agents have pinned it. Raises Forbidden when others can read a key, ValueError
    for what is no name, address or certificate, OSError when the directory cannot be written.
    """
    moment = now or datetime.now(UTC)
    subjects = _subjects(names, addresses)
    ca_key, ca = _authority(directory, moment)
    chain, key = directory / "server.crt", directory / "server.key"
    if not _serves(chain, key, ca, subjects, moment):
        server_key = ec.generate_private_key(ec.SECP256R1())
        server = _sign_server(ca_key, ca, server_key.public_key(), subjects, moment)
        # The chain goes first: a key without its certificate would be taken for the old pair.
        chain.unlink(missing_ok=True)
        _write_key(key, server_key)
        keys.write_private(chain, _pem(server) + _pem(ca))
        chain.chmod(0o644)
    return Certificates(directory / "ca.crt", chain, key, hashlib.sha256(ca.public_bytes(Encoding.DER)).hexdigest())


def _subjects(names: Sequence[str], addresses: Sequence[str]) -> list[x509.GeneralName]:
    wanted = {*_ALWAYS, *(x509.DNSName(name) for name in names)}
    wanted |= {x509.IPAddress(ip_address(address)) for address in addresses}
    return sorted(wanted, key=repr)


def _authority(directory: Path, now: datetime) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    certificate, key_file = directory / "ca.crt", directory / "ca.key"
    if not certificate.exists():
        key = ec.generate_private_key(ec.SECP256R1())
        _write_key(key_file, key)
        keys.write_private(certificate, _pem(_sign_authority(key, now)))
        certificate.chmod(0o644)
    loaded = _load_key(key_file)
    ca = x509.load_pem_x509_certificate(certificate.read_bytes())
    if ca.public_key() != loaded.public_key():
        raise ValueError(f"{key_file} is not the key of {certificate}")
    return loaded, ca


def _sign_authority(key: ec.EllipticCurvePrivateKey, now: datetime) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "vzfleet CA")])
    return (
        _builder(name, name, key.public_key(), now, _CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )


def _sign_server(
    ca_key: ec.EllipticCurvePrivateKey,
    ca: x509.Certificate,
    key: ec.EllipticCurvePublicKey,
    subjects: Sequence[x509.GeneralName],
    now: datetime,
) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, SERVER_NAME)])
    return (
        _builder(name, ca.subject, key, now, _SERVER_DAYS)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(subjects), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA256())
    )


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now: datetime, days: int
) -> x509.CertificateBuilder:
    start = now - _BACKDATED
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + timedelta(days=days))
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _serves(chain: Path, key: Path, ca: x509.Certificate, subjects: Sequence[x509.GeneralName], now: datetime) -> bool:
    """Whether the server's certificate on disk is still the one that is wanted."""
    if not chain.exists() or not key.exists():
        return False
    keys.check_private(key)
    server = x509.load_pem_x509_certificates(chain.read_bytes())[0]
    named = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return (
        set(named) == set(subjects)
        and now + timedelta(days=_RENEW_DAYS) < server.not_valid_after_utc
        and _signed_by(server, ca)
        and server.public_key() == _load_key(key).public_key()
    )


def _signed_by(certificate: x509.Certificate, ca: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(ca)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _load_key(path: Path) -> ec.EllipticCurvePrivateKey:
    keys.check_private(path)
    key = load_pem_private_key(path.read_bytes(), password=None)
    if isinstance(key, ec.EllipticCurvePrivateKey):
        return key
    raise ValueError(f"{path} is no elliptic curve key")


def _write_key(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    keys.write_private(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode())


def _pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(Encoding.PEM).decode()
