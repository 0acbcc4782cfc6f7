"""The CA and the server's certificate: what they say, when they are remade, and that a strict client accepts them."""

from __future__ import annotations

import hashlib
import ssl
import stat
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from common.errors import Forbidden
from controller.certificates import SERVER_NAME, Certificates, ensure

NOW = datetime.now(UTC)


def made(directory: Path, *, now: datetime = NOW) -> Certificates:
    return ensure(directory, ["controller.example"], ["10.1.2.3", "fd00::1"], now=now)


def load(path: Path) -> list[x509.Certificate]:
    return x509.load_pem_x509_certificates(path.read_bytes())


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def handshake(server: ssl.SSLContext, client: ssl.SSLContext, name: str) -> str | None:
    """The protocol that both agree on, in memory. Raises ssl.SSLError."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server, server_hostname=name),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    for _ in range(4):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    return ends[0].version()


def test_the_first_run_makes_everything(tmp_path: Path) -> None:
    certificates = made(tmp_path)
    assert set(contents(tmp_path)) == {"ca.crt", "ca.key", "server.crt", "server.key"}
    for name, mode in {"ca.crt": 0o644, "ca.key": 0o600, "server.crt": 0o644, "server.key": 0o600}.items():
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == mode
    [ca] = load(certificates.ca)
    constraints = ca.extensions.get_extension_for_class(x509.BasicConstraints)
    assert constraints.critical and constraints.value == x509.BasicConstraints(ca=True, path_length=0)
    der = ssl.PEM_cert_to_DER_cert(certificates.ca.read_text())
    assert certificates.fingerprint == hashlib.sha256(der).hexdigest()
    assert timedelta(days=3640) < ca.not_valid_after_utc - NOW < timedelta(days=3651)


def test_the_server_certificate_names_what_was_asked_for(tmp_path: Path) -> None:
    server, ca = load(made(tmp_path).chain)
    server.verify_directly_issued_by(ca)
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert set(names.get_values_for_type(x509.DNSName)) == {"localhost", "controller.example", SERVER_NAME}
    addresses = {ip_address(address) for address in ("127.0.0.1", "::1", "10.1.2.3", "fd00::1")}
    assert set(names.get_values_for_type(x509.IPAddress)) == addresses
    usage = server.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.SERVER_AUTH]
    assert server.not_valid_after_utc - server.not_valid_before_utc <= timedelta(days=825)
    assert not server.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1", "::1", "controller.example", "10.1.2.3", SERVER_NAME])
def test_a_client_that_pins_the_ca_is_served(tmp_path: Path, name: str) -> None:
    certificates = made(tmp_path)
    client = ssl.create_default_context(cafile=certificates.ca)
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    assert handshake(certificates.server_context(), client, name) == "TLSv1.3"


def test_other_names_other_authorities_and_old_protocols_are_not(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    certificates, other = made(tmp_path), made(tmp_path / "other")
    trusting = ssl.create_default_context(cafile=certificates.ca)
    with pytest.raises(ssl.SSLError):
        handshake(certificates.server_context(), trusting, "elsewhere.example")
    with pytest.raises(ssl.SSLError):
        handshake(other.server_context(), trusting, "localhost")
    assert certificates.server_context().minimum_version == ssl.TLSVersion.TLSv1_2


def test_a_second_run_changes_nothing(tmp_path: Path) -> None:
    first = made(tmp_path)
    before = contents(tmp_path)
    assert made(tmp_path) == first
    assert contents(tmp_path) == before


def test_a_host_whose_clock_is_a_day_behind_can_speak_with_a_new_controller(tmp_path: Path) -> None:
    made(tmp_path)
    for name in ("ca.crt", "server.crt"):
        certificate = x509.load_pem_x509_certificates((tmp_path / name).read_bytes())[0]
        assert certificate.not_valid_before_utc <= NOW - timedelta(days=1)


def test_new_names_and_old_age_remake_the_servers_alone(tmp_path: Path) -> None:
    first = made(tmp_path)
    before = contents(tmp_path)
    assert made(tmp_path, now=NOW + timedelta(days=792)) == first
    assert contents(tmp_path) == before
    made(tmp_path, now=NOW + timedelta(days=794))
    later = contents(tmp_path)
    assert later["server.crt"] != before["server.crt"]
    assert ensure(tmp_path, ["renamed.example"], []).fingerprint == first.fingerprint
    renamed = contents(tmp_path)
    assert renamed["server.crt"] != later["server.crt"]
    assert (renamed["ca.crt"], renamed["ca.key"]) == (before["ca.crt"], before["ca.key"])


@pytest.mark.parametrize("lost", ["server.crt", "server.key"])
def test_what_was_lost_is_made_again(tmp_path: Path, lost: str) -> None:
    made(tmp_path)
    (tmp_path / lost).unlink()
    client = ssl.create_default_context(cafile=tmp_path / "ca.crt")
    assert handshake(made(tmp_path).server_context(), client, "localhost")


def test_a_certificate_of_another_authority_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    made(tmp_path)
    made(tmp_path / "other")
    for name in ("ca.crt", "ca.key"):
        (tmp_path / "other" / name).replace(tmp_path / name)
    client = ssl.create_default_context(cafile=tmp_path / "ca.crt")
    assert handshake(made(tmp_path).server_context(), client, "localhost")


@pytest.mark.parametrize("name", ["ca.key", "server.key"])
def test_a_key_that_others_can_read_is_refused(tmp_path: Path, name: str) -> None:
    certificates = made(tmp_path)
    (tmp_path / name).chmod(0o640)
    with pytest.raises(Forbidden):
        made(tmp_path)
    if name == "server.key":
        with pytest.raises(Forbidden):
            certificates.server_context()


def test_a_lost_or_foreign_ca_key_is_an_error_and_not_a_new_ca(tmp_path: Path) -> None:
    made(tmp_path)
    (tmp_path / "server.key").replace(tmp_path / "ca.key")
    with pytest.raises(ValueError, match="not the key"):
        made(tmp_path)
    (tmp_path / "ca.key").unlink()
    with pytest.raises(FileNotFoundError):
        made(tmp_path)


@pytest.mark.parametrize(("names", "addresses"), [(["exämple"], []), ([], ["not an address"])])
def test_what_is_no_name_or_address_is_refused(tmp_path: Path, names: list[str], addresses: list[str]) -> None:
    with pytest.raises(ValueError):
        ensure(tmp_path, names, addresses)
    assert contents(tmp_path) == {}
