"""A Hugging Face hub on the loopback interface that serves folders as models, for tests: no network is asked."""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SHA = "0123456789abcdef0123456789abcdef01234567"  # of every revision


class Hub:
    """models: {"ORG/NAME": folder, or an error code of the hub such as "GatedRepo"}. cut: {file: bytes} after which its
    next download breaks off. asked: the paths of files that were sent."""

    def __init__(self, models):
        self.models, self.cut, self.asked = models, {}, []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_GET(self):
                hub.answer(self)

            do_HEAD = do_GET

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, handler):
        path = handler.path.partition("?")[0]
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path)
        model = self.models.get((api or file)[1] if api or file else "", "RepoNotFound")
        if api and api[2] == "revision" and api[3] not in ("main", SHA) and not isinstance(model, str):
            model = "RevisionNotFound"
        if isinstance(model, str):
            return self.send(handler, 403 if model == "GatedRepo" else 404, b"{}", {"X-Error-Code": model})
        if api and api[2] == "tree":
            entries = [
                {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": oid(f)} for f in model.iterdir()
            ]
            return self.send(handler, 200, json.dumps(entries).encode())
        if api:
            return self.send(handler, 200, json.dumps({"id": api[1], "sha": SHA, "siblings": []}).encode())
        content = (model / file[2]).read_bytes()
        headers = {"ETag": f'"{oid(model / file[2])}"', "X-Repo-Commit": SHA, "Accept-Ranges": "bytes"}
        first = int((re.match(r"bytes=(\d+)-", handler.headers.get("Range") or "") or [0, 0])[1])
        if first:
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
        cut = None
        if handler.command == "GET":
            self.asked.append((file[2], first))
            cut = self.cut.pop(file[2], None)
        self.send(handler, 206 if first else 200, content[first:], headers, cut)

    def send(self, handler, status, content, headers=(), cut=None):
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **dict(headers)}.items():
            handler.send_header(name, value)
        handler.end_headers()
        if handler.command == "GET":
            handler.wfile.write(content[:cut])
        if cut is not None:
            handler.close_connection = True


def oid(path):
    return hashlib.sha1(path.read_bytes()).hexdigest()
