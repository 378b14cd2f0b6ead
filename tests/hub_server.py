"""A small server that speaks the part of the Hub's protocol that pushing and loading a repository need.

Standard library only. Everything is kept in memory; files go up "regular", as base64 within the commit, or by LFS.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class HubServer(ThreadingHTTPServer):
    """`with HubServer() as url:` serves the Hub's API there; `server.repos` maps repo ids to {path: bytes}.

    What else was asked for is in `private` (repo ids), `refs` (branches and tags, with what they were made from) and
    `commits` (the branch of each). A `token`, if there is one, is the only one that may write. Files of more than
    `lfs_above` bytes go up by LFS, to `blobs`. `failures` are paths whose next request is answered with status 500.
    """

    def __init__(self, token: str | None = None, lfs_above: int | None = None):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.lfs_above = lfs_above
        self.blobs: dict[str, bytes] = {}
        self.failures: list[str] = []
        self.repos: dict[str, dict[str, bytes]] = {}
        self.token = token
        self.private: set[str] = set()
        self.refs: dict[str, str | None] = {}
        self.commits: list[str] = []

    def __enter__(self) -> str:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{self.server_port}"

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def sha(self, repo: str) -> str:
        files = self.repos[repo]
        return hashlib.sha1(b"".join(name.encode() + data for name, data in sorted(files.items()))).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def _reply(self, payload=None, status=200, headers=None, data: bytes | None = None):
        body = json.dumps(payload).encode() if data is None else data
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _missing(self, code: str):
        self._reply({"error": code}, 404, {"X-Error-Code": code})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _fails(self) -> bool:
        failures = self.server.failures
        if not any(path in self.path for path in failures):
            return False
        failures.remove(next(path for path in failures if path in self.path))
        self._reply({"error": "Internal Server Error"}, 500)
        return True

    def do_PUT(self):
        body = self._body()
        if self._fails():
            return None
        assert hashlib.sha256(body).hexdigest() == self.path.removeprefix("/blobs/")
        self.server.blobs[self.path.removeprefix("/blobs/")] = body
        return self._reply({})

    def do_POST(self):
        body, repos = self._body(), self.server.repos
        if self._fails():
            return None
        if self.server.token is not None and self.headers["Authorization"] != f"Bearer {self.server.token}":
            return self._reply({"error": "Invalid username or password."}, 401)
        if self.path == "/api/repos/create":
            request = json.loads(body)
            repo = f"{request.get('organization') or 'user'}/{request['name']}"
            repos.setdefault(repo, {})
            if request.get("type") == "space":
                assert request["sdk"] == "gradio"
            if request.get("visibility") == "private":
                self.server.private.add(repo)
            return self._reply({"url": f"http://{self.headers['Host']}/{repo}", "id": repo, "name": repo})
        if self.path == "/api/validate-yaml":
            return self._reply({"errors": [], "warnings": []})
        if match := re.fullmatch(r"/api/(?:models|spaces)/(.+)/preupload/[^/]+", self.path):
            above = self.server.lfs_above
            files = [
                {**file, "uploadMode": "regular" if above is None or file["size"] <= above else "lfs"}
                for file in json.loads(body)["files"]
            ]
            files = [{**file, "shouldIgnore": False} for file in files]
            return self._reply({"files": [{k: f[k] for k in ("path", "uploadMode", "shouldIgnore")} for f in files]})
        if match := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", self.path):
            objects = [
                {**file, "actions": {"upload": {"href": f"http://{self.headers['Host']}/blobs/{file['oid']}"}}}
                for file in json.loads(body)["objects"]
            ]
            return self._reply({"transfer": "basic", "objects": objects})
        if match := re.fullmatch(r"/api/models/(.+)/(branch|tag)/(.+)", self.path):
            name = json.loads(body)["tag"] if match[2] == "tag" else match[3]
            self.server.refs[name] = match[3] if match[2] == "tag" else None
            return self._reply({})
        if match := re.fullmatch(r"/api/(?:models|spaces)/(.+)/commit/([^/]+)", self.path):
            repo = match[1]
            self.server.commits.append(match[2])
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    repos[repo][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                elif entry["key"] == "lfsFile":
                    repos[repo][entry["value"]["path"]] = self.server.blobs[entry["value"]["oid"]]
                elif entry["key"] == "deletedFile":
                    repos[repo].pop(entry["value"]["path"], None)
            sha = self.server.sha(repo)
            url = f"http://{self.headers['Host']}/{repo}/commit/{sha}"
            return self._reply({"commitUrl": url, "commitOid": sha, "success": True})
        return self._missing("EntryNotFound")

    def do_GET(self):
        repos, path = self.server.repos, self.path.split("?")[0]
        if path == "/api/whoami-v2":
            return self._reply(
                {"name": "user", "type": "user", "orgs": [], "auth": {"accessToken": {"role": "write"}}}
            )
        if match := re.fullmatch(r"/api/models/(.+?)/tree/[^/]+(/.*)?", path):
            files = repos.get(match[1])
            if files is None:
                return self._missing("RepoNotFound")
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in files.items()
            ]
            return self._reply([] if match[2] else entries)
        if match := re.fullmatch(r"/api/(?:models|spaces)/(.+?)(/revision/[^/]+)?", path):
            if match[1] not in repos:
                return self._missing("RepoNotFound")
            siblings = [{"rfilename": name} for name in repos[match[1]]]
            info = {
                "id": match[1],
                "sha": self.server.sha(match[1]),
                "private": False,
                "siblings": siblings,
                "tags": [],
            }
            return self._reply(info)
        if match := re.fullmatch(r"/(.+?)/resolve/[^/]+/(.+)", path):
            files = repos.get(match[1])
            if files is None:
                return self._missing("RepoNotFound")
            if match[2] not in files:
                return self._missing("EntryNotFound")
            data = files[match[2]]
            headers = {"X-Repo-Commit": self.server.sha(match[1]), "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}
            return self._reply(headers=headers, data=data)
        return self._missing("EntryNotFound")

    do_HEAD = do_GET  # noqa: N815
