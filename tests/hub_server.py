"""A small Hub on the loopback: what `huggingface_hub` needs of its HTTP interface to create, upload and download.

It keeps repositories in memory: each a list of commits, a commit a table of files, and branches that name commits. As
on the real one, small texts travel in the commit itself, and binary or large files as LFS objects: the batch interface
gives a signed address, the content is put there without a token, and verified; to be downloaded they are redirected to
a signed address again. Those name the same server as another host, which storage is to the real Hub. (That also speaks
Xet, which `HF_HUB_DISABLE_XET=1` leaves out.)
"""

import base64
import hashlib
import hmac
import json
import re
import secrets
import threading
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


LFS_PATTERNS = ("*.safetensors", "*.bin", "*.pt", "*.png")  # as the .gitattributes of a new repository has them
LFS_SIZE = 10 * 2**20
REPOSITORY = r"((?:spaces/)?[^/]+/[^/]+)"  # the names of Spaces begin with spaces/


class LoopbackHub:
    """Use as a context manager; `endpoint` is what `HF_ENDPOINT` is set to."""

    def __init__(self, token: str):
        self.token = token
        self.repositories: dict[str, dict] = {}  # by name: private, branches (name: sha), commits (sha: files)
        self.objects: dict[str, bytes] = {}  # of LFS, by their SHA-256
        self.verified: set[str] = set()  # those whose upload was confirmed
        self.requests: list[str] = []  # method and address of each
        self.open_headers: list[dict[str, str]] = []  # of requests to signed addresses, which must carry no token
        self.refusals: dict[str, list[int]] = {}  # by a part of an address: statuses with which the next requests fail
        self._key = secrets.token_bytes(16)

    def __enter__(self):
        hub = self

        class Handler(_Handler):
            of = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        port = self.server.server_address[1]
        self.endpoint, self.storage = f"http://127.0.0.1:{port}", f"http://localhost:{port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """The content of every file, also of those that are LFS objects."""
        _, files = self.at(repo_id, revision)
        return {path: self.objects[content] if isinstance(content, str) else content
                for path, content in files.items()}  # fmt: skip

    def commits(self, repo_id: str) -> list[str]:
        return list(self.repositories[repo_id]["commits"])

    def large_files(self, repo_id: str) -> list[str]:
        """Those that travelled as LFS objects."""
        return [path for path, content in self.at(repo_id, "main")[1].items() if isinstance(content, str)]

    def commit(self, repo_id: str, branch: str, added: dict[str, bytes | str], deleted: list[str]) -> str:
        """A file's content is its bytes, or the SHA-256 of an object."""
        repository = self.repositories[repo_id]
        parent = repository["branches"].get(branch)
        files = {**(repository["commits"][parent] if parent else {}), **added}
        files = {path: content for path, content in files.items() if path not in deleted}
        sha = hashlib.sha1(f"{len(repository['commits'])} {parent} {sorted(files)}".encode()).hexdigest()
        repository["commits"][sha], repository["branches"][branch] = files, sha
        return sha

    def at(self, repo_id: str, revision: str) -> tuple[str, dict] | None:
        """The commit that a branch, or its own name, names, and its files."""
        repository = self.repositories.get(repo_id)
        if repository is None:
            return None
        sha = repository["branches"].get(revision, revision)
        return (sha, repository["commits"][sha]) if sha in repository["commits"] else None

    def signed(self, method: str, oid: str) -> str:
        return f"{self.storage}/lfs/{oid}?signature={self._signature(method, oid)}"

    def is_signed(self, method: str, oid: str, signature: str) -> bool:
        return hmac.compare_digest(self._signature(method, oid), signature)

    def _signature(self, method: str, oid: str) -> str:
        return hmac.new(self._key, f"{method} {oid}".encode(), "sha256").hexdigest()


class _Handler(BaseHTTPRequestHandler):
    of: LoopbackHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_POST(self):
        body = self._body()
        if self._refuses():
            return
        path = self._path()
        if path == "/api/validate-yaml":
            self._send({"warnings": [], "errors": []})
        elif self.headers.get("Authorization") != f"Bearer {self.of.token}":
            self._send({"error": "Invalid username or password."}, 401)
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif match := re.fullmatch(rf"/api/models/{REPOSITORY}/preupload/(.+)", path):
            self._preupload(match[1], match[2], json.loads(body)["files"])
        elif match := re.fullmatch(rf"/api/models/{REPOSITORY}/commit/(.+)", path):
            self._commit(match[1], match[2], [json.loads(line) for line in body.splitlines()])
        elif match := re.fullmatch(rf"/api/models/{REPOSITORY}/branch/(.+)", path):
            self._branch(match[1], match[2], json.loads(body))
        elif match := re.fullmatch(rf"/{REPOSITORY}\.git/info/lfs/objects/batch", path):
            self._batch(json.loads(body))
        elif path == "/lfs/verify":
            asked = json.loads(body)
            whole = len(self.of.objects.get(asked["oid"], b"")) == asked["size"]
            if whole:
                self.of.verified.add(asked["oid"])
            self._send({} if whole else {"error": "not what was announced"}, 200 if whole else 422)
        else:
            self._send({"error": f"no such address: {path}"}, 404)

    def do_PUT(self):
        body = self._body()
        if self._refuses() or not self._opens():
            return
        oid = urlsplit(self.path).path.removeprefix("/lfs/")
        if hashlib.sha256(body).hexdigest() != oid:
            self._send({"error": "the content is not that of its address"}, 400)
            return
        self.of.objects[oid] = body
        self._send({})

    def do_GET(self):
        if self._refuses():
            return
        path = self._path()
        if path.startswith("/lfs/"):
            if self._opens():
                content = self.of.objects[path.removeprefix("/lfs/")]
                self._write(200, content, {"Content-Type": "application/octet-stream"})
        elif match := re.fullmatch(rf"/api/models/{REPOSITORY}/tree/([^/]+)", path):
            found = self._found(match[1], match[2])
            if found is not None:
                self._send([self._entry(path, content) for path, content in found[1].items()])
        elif match := re.fullmatch(rf"/api/models/{REPOSITORY}(?:/revision/([^/]+))?", path):
            found = self._found(match[1], match[2] or "main")
            if found is not None:
                siblings = [{"rfilename": path} for path in found[1]]
                self._send({"id": match[1], "sha": found[0], "siblings": siblings, "private": False, "tags": []})
        elif match := re.fullmatch(rf"/{REPOSITORY}/resolve/([^/]+)/(.+)", path):
            self._file(*match.groups())
        else:
            self._send({"error": f"no such address: {path}"}, 404)

    do_HEAD = do_GET

    # -- what is asked ------------------------------------------------------------------------------------------------

    def _path(self) -> str:
        """What is asked for, with Spaces among the models."""
        return unquote(urlsplit(self.path).path).replace("/api/spaces/", "/api/models/spaces/")

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _refuses(self) -> bool:
        self.of.requests.append(f"{self.command} {self.path}")
        for part, statuses in self.of.refusals.items():
            if part in f"{self.command} {self.path}" and statuses:
                self._send({"error": "try again"}, statuses.pop(0))
                return True
        return False

    def _opens(self) -> bool:
        """Whether a signed address is right; it needs no token, and must be given none."""
        self.of.open_headers.append(dict(self.headers))
        address = urlsplit(self.path)
        method = "GET" if self.command == "HEAD" else self.command
        signature = parse_qs(address.query).get("signature", [""])[0]
        right = self.of.is_signed(method, address.path.removeprefix("/lfs/"), signature)
        if not right:
            self._send({"error": "the signature is wrong"}, 403)
        return right

    def _create(self, asked: dict):
        space = "spaces/" if asked.get("type") == "space" else ""
        repo_id = f"{space}{asked.get('organization') or 'me'}/{asked['name']}"
        if repo_id in self.of.repositories:
            self._send({"error": "You already created this model repo", "url": f"{self.of.endpoint}/{repo_id}"}, 409)
            return
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.of.repositories[repo_id] = {"private": private, "branches": {}, "commits": {}, "sdk": asked.get("sdk")}
        attributes = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS)
        self.of.commit(repo_id, "main", {".gitattributes": attributes.encode()}, [])
        self._send({"url": f"{self.of.endpoint}/{repo_id}", "name": repo_id, "id": "1"})

    def _preupload(self, repo_id: str, revision: str, files: list[dict]):
        found = self._found(repo_id, revision)
        if found is None:
            return
        answers = []
        for file in files:
            path = file["path"]
            large = any(fnmatch(path, pattern) for pattern in LFS_PATTERNS) or file["size"] > LFS_SIZE
            answer = {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            answers.append({**answer, "oid": _oid(found[1][path])} if path in found[1] else answer)
        self._send({"files": answers})

    def _batch(self, asked: dict):
        objects = []
        for wanted in asked["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.of.verified:  # else it is there already, and is not sent again
                verify = {"href": f"{self.of.endpoint}/lfs/verify"}
                entry["actions"] = {"upload": {"href": self.of.signed("PUT", wanted["oid"])}, "verify": verify}
            objects.append(entry)
        self._send({"transfer": "basic", "objects": objects})

    def _commit(self, repo_id: str, branch: str, lines: list[dict]):
        values = [(line["key"], line["value"]) for line in lines]
        added = {value["path"]: base64.b64decode(value["content"]) for key, value in values if key == "file"}
        for key, value in values:
            if key == "lfsFile":
                if value["oid"] not in self.of.verified:
                    self._send({"error": f"the content of {value['path']} was not uploaded"}, 400)
                    return
                added[value["path"]] = value["oid"]
        deleted = [value["path"] for key, value in values if key == "deletedFile"]
        sha = self.of.commit(repo_id, branch, added, deleted)
        self._send({"commitOid": sha, "commitUrl": f"{self.of.endpoint}/{repo_id}/commit/{sha}", "success": True})

    def _branch(self, repo_id: str, branch: str, asked: dict):
        found = self._found(repo_id, asked.get("startingPoint", "main"))
        if found is not None:
            self.of.repositories[repo_id]["branches"][branch] = found[0]
            self._send({})

    def _found(self, repo_id: str, revision: str):
        found = self.of.at(repo_id, revision)
        if found is None:
            what = "RevisionNotFound" if repo_id in self.of.repositories else "RepoNotFound"
            self._send({"error": what}, 404, {"X-Error-Code": what})
        return found

    def _entry(self, path: str, content: bytes | str) -> dict:
        entry = {"type": "file", "path": path, "oid": _oid(content), "size": len(content)}
        if isinstance(content, str):
            entry["size"] = len(self.of.objects[content])
            entry["lfs"] = {"oid": content, "size": entry["size"], "pointerSize": 100}
        return entry

    def _file(self, repo_id: str, revision: str, path: str):
        found = self._found(repo_id, revision)
        if found is None:
            return
        if path not in found[1]:
            self._send({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": found[0]})
            return
        content, commit = found[1][path], {"X-Repo-Commit": found[0]}
        if isinstance(content, bytes):
            headers = {"ETag": f'"{_oid(content)}"', "Accept-Ranges": "bytes"}
            self._write(200, content, {"Content-Type": "application/octet-stream", **commit, **headers})
            return
        linked = {"X-Linked-ETag": f'"{content}"', "X-Linked-Size": str(len(self.of.objects[content]))}
        self._write(302, b"", {**commit, **linked, "Location": self.of.signed("GET", content)})

    # -- what is answered ---------------------------------------------------------------------------------------------

    def _send(self, said, status: int = 200, headers: dict[str, str] | None = None):
        self._write(status, json.dumps(said).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _write(self, status: int, content: bytes, headers: dict[str, str]):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _oid(content: bytes | str) -> str:
    """As git names a file's content; an LFS object by its SHA-256."""
    return content if isinstance(content, str) else hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
