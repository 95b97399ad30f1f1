"""A small Hub on the loopback: what `huggingface_hub` needs of its HTTP interface to create, upload and download.

It keeps repositories in memory, each a list of commits, a commit a table of files. The names of Spaces begin with
`spaces/`.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


_NAME = r"((?:spaces/)?[^/]+/[^/]+)"


class LoopbackHub:
    """Use as a context manager; `endpoint` is what `HF_ENDPOINT` is set to."""

    def __init__(self, token: str):
        self.token = token
        self.repositories: dict[str, dict] = {}  # by name: private, and commits (sha, files), the newest last
        self.requests: list[str] = []
        self.refusals: dict[str, list[int]] = {}  # by a part of a path: statuses with which the next requests fail

    def __enter__(self):
        hub = self

        class Handler(_Handler):
            of = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def files(self, repo_id: str) -> dict[str, bytes]:
        return self.repositories[repo_id]["commits"][-1][1]

    def commit(self, repo_id: str, added: dict[str, bytes], deleted: list[str]) -> str:
        commits = self.repositories[repo_id]["commits"]
        files = {**(commits[-1][1] if commits else {}), **added}
        files = {path: content for path, content in files.items() if path not in deleted}
        sha = hashlib.sha1(f"{len(commits)} {sorted(files)}".encode()).hexdigest()
        commits.append((sha, files))
        return sha

    def at(self, repo_id: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        commits = self.repositories.get(repo_id, {}).get("commits", [])
        found = commits[-1:] if revision == "main" else [one for one in commits if one[0] == revision]
        return found[0] if found else None


class _Handler(BaseHTTPRequestHandler):
    of: LoopbackHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self._refuses():
            return
        path = self._path()
        if path == "/api/validate-yaml":
            self._send({"warnings": [], "errors": []})
        elif self.headers.get("Authorization") != f"Bearer {self.of.token}":
            self._send({"error": "Invalid username or password."}, 401)
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif match := re.fullmatch(rf"/api/models/{_NAME}/preupload/[^/]+", path):
            modes = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                     for file in json.loads(body)["files"]]  # fmt: skip
            self._send({"files": modes})
        elif match := re.fullmatch(rf"/api/models/{_NAME}/commit/[^/]+", path):
            self._commit(match[1], [json.loads(line) for line in body.splitlines()])
        else:
            self._send({"error": f"no such address: {path}"}, 404)

    def do_GET(self):
        if self._refuses():
            return
        path = self._path()
        if match := re.fullmatch(rf"/api/models/{_NAME}/tree/([^/]+)", path):
            found = self._found(match[1], match[2])
            if found is not None:
                self._send([{"type": "file", "path": path, "size": len(content), "oid": _etag(content)}
                            for path, content in found[1].items()])  # fmt: skip
        elif match := re.fullmatch(rf"/api/models/{_NAME}(?:/revision/([^/]+))?", path):
            found = self._found(match[1], match[2] or "main")
            if found is not None:
                siblings = [{"rfilename": path} for path in found[1]]
                self._send({"id": match[1], "sha": found[0], "siblings": siblings, "private": False, "tags": []})
        elif match := re.fullmatch(rf"/{_NAME}/resolve/([^/]+)/(.+)", path):
            self._file(*match.groups())
        else:
            self._send({"error": f"no such address: {path}"}, 404)

    do_HEAD = do_GET

    def _path(self) -> str:
        """What is asked for, with Spaces among the models."""
        return unquote(urlsplit(self.path).path).replace("/api/spaces/", "/api/models/spaces/")

    def _refuses(self) -> bool:
        self.of.requests.append(f"{self.command} {self.path}")
        for part, statuses in self.of.refusals.items():
            if part in self.path and statuses:
                self._send({"error": "try again"}, statuses.pop(0))
                return True
        return False

    def _create(self, asked: dict):
        space = "spaces/" if asked.get("type") == "space" else ""
        repo_id = f"{space}{asked.get('organization') or 'me'}/{asked['name']}"
        if repo_id in self.of.repositories:
            self._send({"error": "You already created this model repo", "url": f"{self.of.endpoint}/{repo_id}"}, 409)
            return
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.of.repositories[repo_id] = {"private": private, "commits": [], "sdk": asked.get("sdk")}
        self.of.commit(repo_id, {".gitattributes": b""}, [])
        self._send({"url": f"{self.of.endpoint}/{repo_id}", "name": repo_id, "id": "1"})

    def _commit(self, repo_id: str, lines: list[dict]):
        values = [(line["key"], line["value"]) for line in lines]
        added = {value["path"]: base64.b64decode(value["content"]) for key, value in values if key == "file"}
        sha = self.of.commit(repo_id, added, [value["path"] for key, value in values if key == "deletedFile"])
        self._send({"commitOid": sha, "commitUrl": f"{self.of.endpoint}/{repo_id}/commit/{sha}", "success": True})

    def _found(self, repo_id: str, revision: str):
        found = self.of.at(repo_id, revision)
        if found is None:
            what = "RevisionNotFound" if repo_id in self.of.repositories else "RepoNotFound"
            self._send({"error": what}, 404, {"X-Error-Code": what})
        return found

    def _file(self, repo_id: str, revision: str, path: str):
        found = self._found(repo_id, revision)
        if found is None:
            return
        if path not in found[1]:
            self._send({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": found[0]})
            return
        content = found[1][path]
        headers = {"X-Repo-Commit": found[0], "ETag": f'"{_etag(content)}"', "Accept-Ranges": "bytes"}
        self._write(200, content, {"Content-Type": "application/octet-stream", **headers})

    def _send(self, said, status: int = 200, headers: dict[str, str] | None = None):
        self._write(status, json.dumps(said).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _write(self, status: int, content: bytes, headers: dict[str, str]):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
