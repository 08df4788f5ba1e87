"""As much of S3's protocol as pyarrow speaks, on a port of this machine, in memory: for tests of addresses.

It knows no credentials. It writes down what it was asked, and can be told to refuse.
"""

import hashlib
import os
import re
import threading
import time
from collections import Counter
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

PAGE = 1000
"""Keys in an answer to a listing, as S3 has it."""


class RefusedError(Exception):
    def __init__(self, status, code):
        super().__init__(code)
        self.status, self.code = status, code


class S3Server:
    """Buckets are dicts of key → (bytes, time of change)."""

    def __init__(self, *buckets):
        self.buckets = {name: {} for name in buckets}
        self.uploads = {}
        self.asked = Counter()
        self.refuse = lambda operation, key: None
        """Returns (status, code) for what shall not be answered."""
        self.lock = threading.Lock()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"store": self}))
        self.http.daemon_threads = True
        self.address = f"127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def close(self):
        self.http.shutdown()
        self.http.server_close()

    def uri(self, key):
        return f"s3://{key}?endpoint_override={self.address}&scheme=http"

    def files(self, bucket="bucket"):
        """Without the empty objects by which pyarrow marks folders."""
        with self.lock:
            return sorted(key for key in self.buckets[bucket] if not key.endswith("/"))

    def upload_folder(self, folder, key, bucket="bucket"):
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                name = f"{key}/{path.relative_to(folder).as_posix()}"
                self.buckets[bucket][name] = (path.read_bytes(), time.time())

    def answer(self, method, path, query, body, ranged):
        """Status, headers, body."""
        bucket, _, key = unquote(path).lstrip("/").partition("/")
        operation = self._operation(method, key, query)
        with self.lock:
            self.asked[operation] += 1
            refused = self.refuse(operation, key)
            if refused is not None:
                raise RefusedError(*refused)
            if bucket not in self.buckets:
                raise RefusedError(404, "NoSuchBucket")
            return getattr(self, f"_{operation}")(self.buckets[bucket], bucket, key, query, body, ranged)

    def _operation(self, method, key, query):
        if not key:
            return {"GET": "list", "HEAD": "look_bucket", "POST": "delete_many"}[method]
        if "uploads" in query:
            return "begin"
        if "uploadId" in query:
            return {"PUT": "part", "POST": "complete", "DELETE": "abort"}[method]
        return {"GET": "get", "HEAD": "look", "PUT": "put", "DELETE": "delete"}[method]

    def _look_bucket(self, objects, *_):
        return 200, {}, b""

    def _look(self, objects, bucket, key, query, body, ranged):
        if key not in objects:
            raise RefusedError(404, "NoSuchKey")
        content, changed = objects[key]
        return 200, self._about(content, changed), content

    def _get(self, objects, bucket, key, query, body, ranged):
        if key not in objects:
            raise RefusedError(404, "NoSuchKey")
        content, changed = objects[key]
        if ranged is None:
            return 200, self._about(content, changed), content
        first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", ranged).groups()
        first, last = int(first), min(int(last or len(content)), len(content) - 1)
        headers = {**self._about(content, changed), "Content-Range": f"bytes {first}-{last}/{len(content)}"}
        return 206, headers, content[first : last + 1]

    def _put(self, objects, bucket, key, query, body, ranged):
        objects[key] = (body, time.time())
        return 200, {"ETag": self._tag(body)}, b""

    def _delete(self, objects, bucket, key, *_):
        objects.pop(key, None)
        return 204, {}, b""

    def _delete_many(self, objects, bucket, key, query, body, ranged):
        for name in re.findall(r"<Key>(.*?)</Key>", body.decode()):
            objects.pop(unquote(name), None)
        return 200, {}, b"<DeleteResult></DeleteResult>"

    def _begin(self, objects, bucket, key, *_):
        name = f"upload-{len(self.uploads)}-{os.urandom(4).hex()}"
        self.uploads[name] = {}
        return 200, {}, _xml("InitiateMultipartUploadResult", Bucket=bucket, Key=key, UploadId=name)

    def _part(self, objects, bucket, key, query, body, ranged):
        self.uploads[query["uploadId"][0]][int(query["partNumber"][0])] = body
        return 200, {"ETag": self._tag(body)}, b""

    def _complete(self, objects, bucket, key, query, body, ranged):
        parts = self.uploads.pop(query["uploadId"][0])
        content = b"".join(part for _, part in sorted(parts.items()))
        objects[key] = (content, time.time())
        return 200, {}, _xml("CompleteMultipartUploadResult", Bucket=bucket, Key=key, ETag=self._tag(content))

    def _abort(self, objects, bucket, key, query, *_):
        self.uploads.pop(query["uploadId"][0], None)
        return 204, {}, b""

    def _list(self, objects, bucket, key, query, *_):
        prefix, delimiter = (query.get(name, [""])[0] for name in ("prefix", "delimiter"))
        most = min(PAGE, int(query.get("max-keys", [PAGE])[0]))
        after = query.get("continuation-token", query.get("start-after", [""]))[0]
        found = {}
        for name in sorted(objects):
            if name.startswith(prefix):
                folder = name[len(prefix) :].partition(delimiter) if delimiter else ("", "", "")
                shown = prefix + folder[0] + delimiter if folder[1] else name
                found.setdefault(shown, bool(folder[1]))
        page = [item for item in found.items() if item[0] > after][:most]
        rest = [name for name in found if page and name > page[-1][0]]
        pieces = [
            f"<Name>{bucket}</Name><KeyCount>{len(page)}</KeyCount><IsTruncated>{str(bool(rest)).lower()}</IsTruncated>"
        ]
        pieces += [f"<NextContinuationToken>{escape(page[-1][0])}</NextContinuationToken>"] if rest else []
        for name, is_folder in page:
            if is_folder:
                pieces.append(f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>")
                continue
            content, changed = objects[name]
            when = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(changed))
            pieces.append(
                f"<Contents><Key>{escape(name)}</Key><Size>{len(content)}</Size><LastModified>{when}</LastModified>"
                f"<ETag>{self._tag(content)}</ETag></Contents>"
            )
        return 200, {}, f"<ListBucketResult>{''.join(pieces)}</ListBucketResult>".encode()

    def _about(self, content, changed):
        return {"ETag": self._tag(content), "Last-Modified": formatdate(changed, usegmt=True)}

    def _tag(self, content):
        return f'"{hashlib.md5(content).hexdigest()}"'


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    store = None

    def log_message(self, *_):
        pass

    def handle_one_request(self):
        try:
            super().handle_one_request()
        except ConnectionError:
            self.close_connection = True

    def _serve(self):
        parts = urlsplit(self.path)
        chunked = self.headers.get("Transfer-Encoding") == "chunked"
        body = self._chunks() if chunked else self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "aws-chunked" in self.headers.get("Content-Encoding", ""):
            body = _unchunked(body)
        query = parse_qs(parts.query, keep_blank_values=True)
        try:
            status, headers, answer = self.store.answer(
                self.command, parts.path, query, body, self.headers.get("Range")
            )
        except RefusedError as error:
            status, headers = error.status, {}
            answer = _xml("Error", Code=error.code, Message=f"it says {error.code}")
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer)

    def _chunks(self):
        pieces = []
        while length := int(self.rfile.readline(), 16):
            pieces.append(self.rfile.read(length))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(pieces)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _serve  # noqa: N815


def _unchunked(body):
    """A body in the chunks of AWS's signatures: length in hexadecimal, perhaps a signature, the bytes."""
    pieces = []
    while body:
        line, _, body = body.partition(b"\r\n")
        length = int(line.partition(b";")[0], 16)
        if not length:
            break
        pieces.append(body[:length])
        body = body[length + 2 :]
    return b"".join(pieces)


def _xml(name, **values):
    inner = "".join(f"<{key}>{escape(value)}</{key}>" for key, value in values.items())
    return f'<?xml version="1.0" encoding="UTF-8"?><{name}>{inner}</{name}>'.encode()


@contextmanager
def served(monkeypatch, *buckets):
    """A server with these buckets, and credentials for it in the environment."""
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    server = S3Server(*(buckets or ("bucket",)))
    yield server
    server.close()


CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing-secret",
    "AWS_EC2_METADATA_DISABLED": "true",
}
