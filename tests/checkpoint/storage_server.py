"""A storage server of this process, which speaks as much of Google Cloud Storage's JSON API as reading needs."""

from __future__ import annotations

import contextlib
import http.server
import json
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def serve(root: Path) -> Iterator[str]:
    """Serves the folders below one as buckets; gives the address for TENSORSTORE_GCS_HTTP_URL."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            url = urllib.parse.urlsplit(self.path)
            query = dict(urllib.parse.parse_qsl(url.query))
            bucket, _, name = url.path.removeprefix("/storage/v1/b/").partition("/o")
            if name:
                self._object(root / bucket / urllib.parse.unquote(name[1:]))
            else:
                self._list(root / bucket, query)

        def _list(self, bucket: Path, query: dict[str, str]) -> None:
            files = (path for path in bucket.rglob("*") if path.is_file())
            names = sorted(path.relative_to(bucket).as_posix() for path in files)
            begin, end = query.get("startOffset", ""), query.get("endOffset", "\U0010ffff")
            prefix = query.get("prefix", "")
            items = [{"name": name} for name in names if name.startswith(prefix) and begin <= name < end]
            self._answer(200, json.dumps({"items": items}).encode())

        def _object(self, path: Path) -> None:
            if not path.is_file():
                self._answer(404, b"")
                return
            content = path.read_bytes()
            asked = self.headers.get("Range")
            if asked is None:
                self._answer(200, content)
                return
            first, _, last = asked.removeprefix("bytes=").partition("-")
            begin = int(first) if first else max(0, len(content) - int(last))
            end = min(len(content), int(last) + 1) if first and last else len(content)
            if begin >= len(content):
                self._answer(416, b"")
                return
            self._answer(206, content[begin:end], f"bytes {begin}-{end - 1}/{len(content)}")

        def _answer(self, status: int, content: bytes, content_range: str = "") -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("x-goog-generation", "1")
            if content_range:
                self.send_header("Content-Range", content_range)
            self.end_headers()
            self.wfile.write(content)
            self.wfile.flush()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
