"""A small HTTPS server with a certificate of its own CA, whose answers a test writes as a function."""

from __future__ import annotations

import datetime
import http.server
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

Answer = Callable[["Handler"], None]


@dataclass(frozen=True)
class Authority:
    """A CA, and a server's certificate and key signed by it, in PEM."""

    ca: str
    chain: str


def make_authority(name: str = "vzfleet-controller") -> Authority:
    """A new CA with a certificate for `name`."""
    now = datetime.datetime.now(datetime.UTC)
    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    ca_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test CA")])

    def builder(subject: x509.Name, public: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(ca_name)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(hours=1))
        )

    ca = (
        builder(ca_name, ca_key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(ca_key, hashes.SHA256())
    )
    leaf = (
        builder(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]), key.public_key())
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    pem = serialization.Encoding.PEM
    return Authority(ca.public_bytes(pem).decode(), (leaf.public_bytes(pem) + private).decode())


@cache
def authority() -> Authority:
    """One authority for all tests of a process."""
    return make_authority()


class Handler(http.server.BaseHTTPRequestHandler):
    """One request; the test's function answers it with these helpers."""

    protocol_version = "HTTP/1.1"
    server: Server

    def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
        """A whole answer. `content_range="…"` becomes `Content-Range: …`."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-").title(), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def cut(self, status: int, body: bytes, length: int, **headers: str) -> None:
        """An answer which breaks off after `body`, of `length` bytes promised."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-").title(), value)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True

    def body(self) -> bytes:
        """The request's body, chunked or not."""
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", "0")))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def _handle(self) -> None:
        self.server.requests.append((self.command, self.path, dict(self.headers)))
        self.server.answer(self)

    do_GET = do_PUT = do_POST = _handle

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@dataclass
class Server(http.server.ThreadingHTTPServer):
    """The server. `requests` are those that came: method, path, headers."""

    answer: Answer
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    daemon_threads = True

    def __post_init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)

    def __hash__(self) -> int:
        return id(self)

    @property
    def api(self) -> str:
        return f"https://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, *_: object) -> None:
        """A client that went away is none."""


@contextmanager
def https_server(directory: Path, answer: Answer, by: Authority | None = None) -> Iterator[Server]:
    """Serve on a free port of loopback until the end of the block."""
    chain = directory / "server.pem"
    chain.write_text((by or authority()).chain)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(chain)
    chain.unlink()
    server = Server(answer)
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
