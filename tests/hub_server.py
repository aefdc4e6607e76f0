"""A stand-in for the Hugging Face hub on this machine: repositories in a dictionary."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

Files = dict[str, bytes]


@dataclass
class Hub:
    """What the hub holds, and what it was asked for.

    Attributes
    ----------
    repos : dict
        Files by revision, by repository.
    gated : set of str
        Repositories that are given to nobody.
    fetched : list of str
        Files that were downloaded.
    commits : list of dict
        What was pushed: repository, revision, whether as a pull request, files.
    created : list of dict
        Bodies of the requests that made repositories.
    cards : list of str
        Model cards that were to be checked.
    refuse_card : str
        Why every card is refused; empty to take them.
    """

    repos: dict[str, dict[str, Files]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    fetched: list[str] = field(default_factory=list)
    commits: list[dict[str, Any]] = field(default_factory=list)
    created: list[dict[str, Any]] = field(default_factory=list)
    cards: list[str] = field(default_factory=list)
    refuse_card: str = ""
    url: str = ""


def files_of(folder: Path) -> Files:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def _sha(revision: str) -> str:
    return hashlib.sha1(revision.encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *args: object) -> None:
        """Say nothing."""

    def _answer(self, body: bytes, code: int = 200, **headers: str) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: Any) -> None:
        self._answer(json.dumps(value).encode(), **{"Content-Type": "application/json"})

    def _error(self, code: int, kind: str) -> None:
        self._answer(b"{}", code, **{"X-Error-Code": kind, "X-Error-Message": kind})

    def _find(self, repo: str, revision: str) -> Files | None:
        if repo in self.hub.gated:
            self._error(403, "GatedRepo")
            return None
        if repo not in self.hub.repos:
            self._error(404, "RepoNotFound")
            return None
        for name, files in self.hub.repos[repo].items():
            if revision in (name, _sha(name)):
                return files
        self._error(404, "RevisionNotFound")
        return None

    def do_GET(self) -> None:
        parts = [unquote(one) for one in urlsplit(self.path).path.strip("/").split("/")]
        if parts[:2] == ["api", "models"]:
            repo, kind, revision = "/".join(parts[2:4]), [*parts, "revision"][4], "main"
            revision = "/".join(parts[5:]) or "main"
            files = self._find(repo, revision)
            if files is None:
                return
            if kind == "tree":
                tree = [
                    {"type": "file", "path": name, "size": len(data), "oid": _sha(name)}
                    for name, data in files.items()
                ]
                self._json(tree)
                return
            names = [{"rfilename": name} for name in files]
            sha = revision if len(revision) == 40 else _sha(revision)
            self._json({"id": repo, "modelId": repo, "sha": sha, "siblings": names, "tags": []})
        elif parts[2:3] == ["resolve"]:
            repo, revision, name = "/".join(parts[:2]), parts[3], "/".join(parts[4:])
            files = self._find(repo, revision)
            if files is None:
                return
            data = files[name]
            if self.command == "GET":
                self.hub.fetched.append(name)
            sha = revision if len(revision) == 40 else _sha(revision)
            self._answer(
                data, **{"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": sha}
            )
        else:
            self._error(404, "RepoNotFound")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers["Content-Length"]))
        path = urlsplit(self.path).path.strip("/")
        parts = [unquote(one) for one in path.split("/")]
        if path == "api/validate-yaml":
            self.hub.cards.append(json.loads(raw)["content"])
            if self.hub.refuse_card:
                self._answer(self.hub.refuse_card.encode(), 400)
                return
            self._json({"errors": [], "warnings": []})
        elif path == "api/repos/create":
            asked = json.loads(raw)
            self.hub.created.append(asked)
            self._json({"url": f"{self.hub.url}/{asked['organization']}/{asked['name']}"})
        elif parts[4:5] == ["preupload"]:
            names = [one["path"] for one in json.loads(raw)["files"]]
            kept = [{"path": one, "uploadMode": "regular", "shouldIgnore": False} for one in names]
            self._json({"files": kept})
        elif parts[4:5] == ["commit"]:
            repo = "/".join(parts[2:4])
            lines = [json.loads(line) for line in raw.splitlines()]
            files = {
                one["value"]["path"]: base64.b64decode(one["value"]["content"])
                for one in lines
                if one["key"] == "file"
            }
            as_request = parse_qs(urlsplit(self.path).query).get("create_pr") == ["1"]
            head = next(one["value"] for one in lines if one["key"] == "header")
            self.hub.commits.append({"repo": repo, "create_pr": as_request, "files": files, **head})
            answer = {
                "commitUrl": f"{self.hub.url}/{repo}/commit/{_sha(repo)}",
                "commitOid": _sha(repo),
                "success": True,
            }
            if as_request:
                answer["pullRequestUrl"] = f"{self.hub.url}/{repo}/discussions/1"
            self._json(answer)
        else:
            self._error(404, "RepoNotFound")


@contextmanager
def serve(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Run a hub, and have huggingface_hub ask it."""
    from huggingface_hub import constants

    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
    ).start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    for name, value in {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_CACHE": str(cache),
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
