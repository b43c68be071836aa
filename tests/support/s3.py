"""A small object store that speaks S3 over TLS on loopback, and lets in only who signs rightly."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import http.server
import re
import ssl
import subprocess
import threading
import urllib.parse
from pathlib import Path
from xml.sax.saxutils import escape

REGION, BUCKET = "test-1", "slm-backups"


def _certificate(directory: Path) -> tuple[Path, Path]:
    certificate, key = directory / "s3.pem", directory / "s3.key"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    command += ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    command += ["-out", str(certificate), "-keyout", str(key)]
    subprocess.run(command, check=True, capture_output=True)
    return certificate, key


def _hmac(key: bytes, text: str) -> bytes:
    return hmac.new(key, text.encode(), hashlib.sha256).digest()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # A header and a body are two writes: Nagle's algorithm would hold the second one for 40 ms.
    disable_nagle_algorithm = True

    def log_message(self, *_):
        """Say nothing."""

    def _signed(self, body: bytes) -> bool:
        """Whether the signature (AWS's version 4) is the one of the store's secret."""
        told = self.headers.get("Authorization", "")
        found = re.search(
            r"Credential=([^/]+)/([^,]+), ?SignedHeaders=([^,]+), ?Signature=(\w+)", told
        )
        if not found or found[1] != self.server.key:
            return False
        date, region, service, _ = found[2].split("/")
        path, _, query = self.path.partition("?")
        pairs = "&".join(
            sorted(part if "=" in part else f"{part}=" for part in query.split("&") if part)
        )
        headers = "".join(f"{name}:{self.headers[name].strip()}\n" for name in found[3].split(";"))
        digest = hashlib.sha256(body).hexdigest()
        request = "\n".join([self.command, path, pairs, headers, found[3], digest])
        total = hashlib.sha256(request.encode()).hexdigest()
        text = "\n".join(["AWS4-HMAC-SHA256", self.headers["x-amz-date"], found[2], total])
        key = f"AWS4{self.server.secret}".encode()
        for part in (date, region, service, "aws4_request"):
            key = _hmac(key, part)
        return hmac.compare_digest(_hmac(key, text).hex(), found[4])

    def _answer(self, status: int, body: bytes | str = b"", **headers: str) -> None:
        data = body.encode() if isinstance(body, str) else body
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{hashlib.md5(data).hexdigest()}"')
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if not self._signed(body):
            error = "<Error><Code>SignatureDoesNotMatch</Code><Message>no</Message></Error>"
            self._answer(403, error)
            return
        path, _, query = self.path.partition("?")
        told = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
        bucket, _, name = urllib.parse.unquote(path).lstrip("/").partition("/")
        if bucket != BUCKET:
            self._answer(404, "<Error><Code>NoSuchBucket</Code></Error>")
        else:
            getattr(self, f"_{self.command.lower()}")(name, told, body)

    def __getattr__(self, name: str):
        if name.startswith("do_"):
            return self._serve
        raise AttributeError(name)

    def _get(self, name: str, told: dict, _: bytes) -> None:
        if not name:
            self._answer(200, self._listing(told.get("prefix", ""), told.get("delimiter")))
        elif name not in self.server.objects:
            self._answer(404, "<Error><Code>NoSuchKey</Code></Error>")
        else:
            modified = "Tue, 24 Nov 2026 12:00:00 GMT"
            self._answer(200, self.server.objects[name], Last_Modified=modified)

    _head = _get

    def _listing(self, prefix: str, delimiter: str | None) -> str:
        names, folders = [], set()
        for name in sorted(self.server.objects):
            rest = name[len(prefix) :]
            if not name.startswith(prefix):
                continue
            if delimiter and delimiter in rest:
                folders.add(prefix + rest.partition(delimiter)[0] + delimiter)
            else:
                names.append(name)
        rows = [
            f"<Contents><Key>{escape(name)}</Key><LastModified>2026-11-24T12:00:00.000Z</LastModified>"
            f"<Size>{len(self.server.objects[name])}</Size></Contents>"
            for name in names
        ]
        rows += [
            f"<CommonPrefixes><Prefix>{escape(one)}</Prefix></CommonPrefixes>"
            for one in sorted(folders)
        ]
        return (
            f"<ListBucketResult><IsTruncated>false</IsTruncated>{''.join(rows)}</ListBucketResult>"
        )

    def _put(self, name: str, told: dict, body: bytes) -> None:
        if "uploadId" in told:
            self.server.parts.setdefault(told["uploadId"], {})[int(told["partNumber"])] = body
        else:
            self.server.objects[name] = body
        self._answer(200)

    def _post(self, name: str, told: dict, body: bytes) -> None:
        if "delete" in told:
            for key in re.findall(r"<Key>(.*?)</Key>", body.decode()):
                self.server.objects.pop(key, None)
            self._answer(200, "<DeleteResult></DeleteResult>")
        elif "uploads" in told:
            found = f"<UploadId>{len(self.server.parts) + 1}-{abs(hash(name))}</UploadId>"
            self._answer(
                200, f"<InitiateMultipartUploadResult>{found}</InitiateMultipartUploadResult>"
            )
        else:
            parts = self.server.parts.pop(told["uploadId"])
            self.server.objects[name] = b"".join(parts[number] for number in sorted(parts))
            self._answer(
                200, "<CompleteMultipartUploadResult><ETag>x</ETag></CompleteMultipartUploadResult>"
            )

    def _delete(self, name: str, _told: dict, _body: bytes) -> None:
        self.server.objects.pop(name, None)
        self._answer(204)


@contextlib.contextmanager
def store(directory: Path, key: str, secret: str):
    """Run a store with an empty bucket; yields it with its `port`, `certificate` and `objects`."""
    certificate, private = _certificate(directory)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, private)
    # A client that never says a word holds up its own thread, not the next client.
    server.socket = context.wrap_socket(
        server.socket, server_side=True, do_handshake_on_connect=False
    )
    server.key, server.secret, server.objects, server.parts = key, secret, {}, {}
    server.port, server.certificate = server.server_address[1], certificate
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
