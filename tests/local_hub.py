"""A hub of models on this machine: as much of its HTTP interface as its own client asks for."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class LocalHub:
    """Repositories by name: the files of each revision, the newest last.

    Attributes:
        address: of the server.
        repositories: name -> list of (revision, files by path).
    """

    def __init__(self):
        self.address = ""
        self.repositories: dict[str, list[tuple[str, dict[str, bytes]]]] = {}

    def commit(self, name: str, lines: list[dict]) -> str:
        """Take over the files of a commit; returns its revision."""
        revisions = self.repositories[name]
        files = dict(revisions[-1][1]) if revisions else {}
        for line in lines:
            if line["key"] == "file":
                value = line["value"]
                files[value["path"]] = base64.b64decode(value["content"])
        revision = hashlib.sha1(f"{name} {len(revisions)}".encode()).hexdigest()
        revisions.append((revision, files))
        return revision

    def at(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Revision and files; None where there is no such revision."""
        revisions = self.repositories[name]
        if revision == "main":
            return revisions[-1] if revisions else None
        return next((one for one in revisions if one[0] == revision), None)


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub

    def log_message(self, *args: object) -> None:
        """Nothing on stderr."""

    def _send(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), Content_Type="application/json")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.path.partition("?")[0]
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            if name.startswith("refused/"):
                return self._send(403, b"", X_Error_Message="You may not write there")
            self.hub.repositories.setdefault(name, [])
            return self._json({"url": f"{self.hub.address}/{name}", "name": name})
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        _, _, kind, owner, name, what, _ = path.split("/", 6)
        assert kind == "models"
        if what == "preupload":
            files = json.loads(body)["files"]
            return self._json(
                {
                    "files": [
                        {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                        for f in files
                    ]
                }
            )
        assert what == "commit"
        lines = [json.loads(line) for line in body.splitlines()]
        revision = self.hub.commit(f"{owner}/{name}", lines)
        url = f"{self.hub.address}/{owner}/{name}/commit/{revision}"
        return self._json({"commitUrl": url, "commitOid": revision, "success": True})

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        parts = path.removeprefix("/api/models").strip("/").split("/")
        name = "/".join(parts[:2])
        if name not in self.hub.repositories:
            return self._send(404, b"", X_Error_Code="RepoNotFound")
        kind, revision = (*parts[2:4], "main")[:2] if len(parts) > 3 else ("revision", "main")
        found = self.hub.at(name, revision)
        if found is None:
            return self._send(404, b"", X_Error_Code="RevisionNotFound")
        commit, files = found
        if kind == "resolve":
            file = files.get("/".join(parts[4:]))
            if file is None:
                return self._send(404, b"", X_Error_Code="EntryNotFound")
            tag = hashlib.sha1(file).hexdigest()
            return self._send(200, file, ETag=f'"{tag}"', X_Repo_Commit=commit)
        entries = [
            {
                "type": "file",
                "path": path,
                "rfilename": path,
                "size": len(file),
                "oid": hashlib.sha1(file).hexdigest(),
            }
            for path, file in files.items()
        ]
        if kind == "tree":
            return self._json(entries)
        return self._json({"id": name, "sha": commit, "siblings": entries, "private": False})

    do_HEAD = do_GET  # noqa: N815


@contextmanager
def local_hub() -> Iterator[LocalHub]:
    """A hub that answers at its `address` while the block runs."""
    hub = LocalHub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.address = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
