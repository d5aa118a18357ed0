"""A server on 127.0.0.1 that speaks the part of the Hugging Face hub's API that downloads need.

Small files are answered in place, and .safetensors from another address as the hub does with large ones: a redirect
whose headers say what it leads to. Private and gated repositories, and revisions and files that are missing, are
refused with the hub's codes.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_atoken"  # of the one account that this hub knows


@dataclass
class Repo:
    """A repository: files by commit, and names of commits."""

    commits: dict[str, dict[str, bytes]]
    refs: dict[str, str]
    private: bool = False
    gated: bool = False


@dataclass
class Hub:
    """What is published, and every file that was downloaded, by repository."""

    url: str = ""
    large: str = ""  # another address, where large files are
    repos: dict[str, Repo] = field(default_factory=dict)
    fetched: list[str] = field(default_factory=list)
    broken: int = 0  # a status that every request is answered with

    def publish(self, name: str, files: Mapping[str, bytes] | Path, branch: str = "main", **how: Any) -> str:
        """Add a commit with these files, or those of a folder; return its name."""
        if isinstance(files, Path):
            files = {
                path.relative_to(files).as_posix(): path.read_bytes() for path in files.rglob("*") if path.is_file()
            }
        known = self.repos.setdefault(name, Repo({}, {}, **how))
        commit = hashlib.sha1(f"{name} {len(known.commits)}".encode()).hexdigest()
        known.commits[commit], known.refs[branch] = dict(files), commit
        return commit


def _is_large(name: str) -> bool:
    return name.endswith((".safetensors", ".bin"))


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:
        """Keep the tests' output clean."""

    def do_HEAD(self) -> None:
        """Answer without the body."""
        self.do_GET(body=False)

    def do_GET(self, body: bool = True) -> None:
        """Answer /api/models/..., /NAME/resolve/REVISION/FILE and /large/..."""
        path = unquote(urlsplit(self.path).path).strip("/")
        if self.hub.broken:
            return self.answer(self.hub.broken, b"", {}, body)
        parts = path.split("/")
        if parts[0] == "large":
            return self.send_large("/".join(parts[1:]), body)
        name = "/".join(parts[2:4] if parts[:2] == ["api", "models"] else parts[:2])
        repo = self.hub.repos.get(name)
        allowed = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if repo is None or (repo.private and not allowed):
            return self.refuse(401, "RepoNotFound", body)
        api = parts[:2] == ["api", "models"]
        if repo.gated and not allowed and not (api and "tree" not in parts):
            return self.refuse(401, "GatedRepo", body)
        rest = parts[4:] if api else parts[2:]
        revision = next((part for at, part in enumerate(rest) if at == 1), "main")
        commit = repo.refs.get(revision, revision)
        if commit not in repo.commits:
            return self.refuse(404, "RevisionNotFound", body)
        files = repo.commits[commit]
        if api:
            return self.describe(name, repo, commit, rest[:1] == ["tree"], body)
        file = "/".join(rest[2:])
        if file not in files:
            return self.refuse(404, "EntryNotFound", body)
        return self.send_file(name, commit, file, files[file], body)

    def describe(self, name: str, repo: Repo, commit: str, tree: bool, body: bool) -> None:
        """The repository's files, with or without what is known of each."""
        files = repo.commits[commit]
        value: Any = {
            "id": name, "modelId": name, "sha": commit, "private": repo.private, "gated": repo.gated, "tags": [],
            "siblings": [{"rfilename": file} for file in files],
        }  # fmt: skip
        if tree:
            value = []
            for file, data in files.items():
                entry: dict[str, Any] = {"type": "file", "path": file, "size": len(data), "oid": _blob(data)}
                if _is_large(file):
                    digest = hashlib.sha256(data).hexdigest()
                    entry["lfs"] = {"oid": digest, "size": len(data), "pointerSize": 134}
                value.append(entry)
        self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"}, body)

    def send_file(self, name: str, commit: str, file: str, data: bytes, body: bool) -> None:
        """A file, or where it lies."""
        if _is_large(file):
            digest = hashlib.sha256(data).hexdigest()
            told = {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(data)), "X-Repo-Commit": commit}
            return self.answer(302, b"", {**told, "Location": f"{self.hub.large}/large/{name}/{commit}/{file}"}, body)
        if body:
            self.hub.fetched.append(f"{name}/{file}")
        return self.answer(200, data, {"ETag": f'"{_blob(data)}"', "X-Repo-Commit": commit}, body)

    def send_large(self, place: str, body: bool) -> None:
        """A large file, by repository, commit and name, where the redirect leads."""
        owner, repo, commit, file = place.split("/", 3)
        if body:
            self.hub.fetched.append(f"{owner}/{repo}/{file}")
        self.answer(200, self.hub.repos[f"{owner}/{repo}"].commits[commit][file], {}, body)

    def refuse(self, status: int, code: str, body: bool) -> None:
        """The hub's way to say no."""
        self.answer(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code}, body)

    def answer(self, status: int, data: bytes, headers: Mapping[str, str], body: bool) -> None:
        """Write the answer."""
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data)


def _blob(data: bytes) -> str:
    """git's name of a blob."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextmanager
def serve() -> Iterator[Hub]:
    """Run a hub with nothing in it."""
    hub = Hub()
    bound = type("Bound", (Handler,), {"hub": hub})
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), bound) for _ in range(2)]
    hub.url, hub.large = (f"http://127.0.0.1:{server.server_address[1]}" for server in servers)
    threads = [threading.Thread(target=server.serve_forever, daemon=True) for server in servers]
    for thread in threads:
        thread.start()
    try:
        yield hub
    finally:
        for server, thread in zip(servers, threads, strict=True):
            server.shutdown()
            server.server_close()
            thread.join()
