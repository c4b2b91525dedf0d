"""A Hugging Face Hub in this process, on 127.0.0.1, for tests: no network, everything in memory.

    with LocalHub() as hub:
        api = HfApi(endpoint=hub.endpoint, token=hub.token)

It answers what huggingface_hub 2.4 and transformers 5.23 ask of a Hub for model repos: create, commit (small
files in the commit, large ones and *.safetensors through LFS), branches, tags, pull requests, downloads with
ranges, search by tag. Private and gated repos, foreign namespaces and wrong tokens are refused as the Hub
refuses them. Beyond that it counts the bytes of every request (`requests`), and can be told to break:
`fail(...)` cuts connections in the middle of a body, `down` refuses to answer, `corrupt` flips bytes on the
way out.
"""

import base64
import contextlib
import hashlib
import json
import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LFS_SUFFIXES = (".safetensors", ".bin", ".pt")
LFS_BYTES = 10 * 1024 * 1024
DATE = "2026-01-01T00:00:00.000Z"
BLOCK = 16 * 1024


@dataclass
class Request:
    """One request as the Hub saw it; sent and received are bytes of the bodies that went over the wire."""

    method: str
    path: str
    token: str | None
    received: int = 0
    sent: int = 0
    status: int = 0


@dataclass
class Failure:
    """Cut requests that match in the middle: after so many bytes of the body, so many times."""

    pattern: re.Pattern
    after: int
    times: float


class Blob:
    def __init__(self, data: bytes, lfs: bool):
        self.data, self.lfs = data, lfs
        self.sha256 = hashlib.sha256(data).hexdigest()
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(data)}\n"
        stored = pointer.encode() if lfs else data
        self.oid = hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest()
        self.etag = self.sha256 if lfs else self.oid


@dataclass
class Repo:
    id: str
    private: bool = False
    gated_to: set[str] | None = None  # users who have been let in; None: not gated
    trees: dict[str, dict[str, Blob]] = field(default_factory=dict)  # commit -> path -> content
    titles: dict[str, str] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)  # refs/heads/*, refs/tags/*, refs/pr/* -> commit

    def commit(self, ref: str, tree: dict[str, Blob], title: str) -> str:
        content = "".join(f"{path} {blob.oid}\n" for path, blob in sorted(tree.items()))
        sha = hashlib.sha1(f"{self.id} {len(self.trees)} {title}\n{content}".encode()).hexdigest()
        self.trees[sha], self.titles[sha], self.refs[ref] = tree, title, sha
        return sha

    def resolve(self, revision: str | None) -> str | None:
        """The commit of a branch, a tag, a pull request's ref or a commit; None where there is none."""
        revision = revision or "main"
        for ref in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision):
            if ref in self.refs:
                return self.refs[ref]
        return revision if revision in self.trees else None

    def card(self, sha: str) -> dict:
        readme = self.trees[sha].get("README.md")
        header = readme and re.match(rb"---\n(.*?)\n---", readme.data, re.DOTALL)
        return (yaml.safe_load(header[1]) or {}) if header else {}

    def info(self, sha: str) -> dict:
        """What /api/models says of the repo; the base_model tags are made as the Hub makes them."""
        card = self.card(sha)
        bases = card.get("base_model") or []
        relation = card.get("base_model_relation", "finetune")
        tags = list(card.get("tags") or [])
        for base in [bases] if isinstance(bases, str) else bases:
            tags += [f"base_model:{base}", f"base_model:{relation}:{base}"]
        gated = False if self.gated_to is None else "auto"
        return {
            "_id": self.id, "id": self.id, "modelId": self.id, "sha": sha, "private": self.private,
            "gated": gated, "disabled": False, "downloads": 0, "likes": 0, "tags": tags, "cardData": card,
            "pipeline_tag": card.get("pipeline_tag"), "library_name": card.get("library_name"),
            "createdAt": DATE, "lastModified": DATE,
            "siblings": [{"rfilename": path} for path in sorted(self.trees[sha])],
        }  # fmt: skip


def head(hub, repo_id, revision="main"):
    """The files of a repo, as the Hub has them."""
    repo = hub.repos[repo_id]
    return {path: blob.data for path, blob in repo.trees[repo.resolve(revision)].items()}


class HubError(Exception):
    def __init__(self, status: int, code: str | None, message: str, *, body=None, **headers: str):
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers
        self.body = {"error": message} | (body or {})


class Cut(Exception):
    """The connection ends here, as if the server had died."""


class LocalHub:
    """One user (`user`, with `token`) and, beside them, `other` (with `other_token`)."""

    def __init__(self):
        self.user, self.token = "me", "hf_" + "localtoken" * 3
        self.other, self.other_token = "someone", "hf_" + "othertoken" * 3
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.failures: list[Failure] = []
        self.corrupt: str | None = None  # file name whose downloads arrive with flipped bytes
        self.down = False
        self.lock = threading.RLock()
        self.connections: set[socket.socket] = set()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads, self._server.hub = True, self
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "LocalHub":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        """Stop, and end the connections that clients keep: the next Hub may get the same port."""
        self._server.shutdown()
        self._server.server_close()
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def fail(self, pattern: str, *, after: int = 0, times: float = float("inf")) -> None:
        """Cut requests whose "METHOD path" matches, after this many bytes of a body."""
        self.failures.append(Failure(re.compile(pattern), after, times))

    def heal(self) -> None:
        self.failures, self.corrupt, self.down = [], None, False

    @contextlib.contextmanager
    def watch(self):
        """The list of requests made inside the block."""
        start, seen = len(self.requests), []
        yield seen
        seen += self.requests[start:]

    def failure_of(self, line: str) -> Failure | None:
        with self.lock:
            for failure in self.failures:
                if failure.times > 0 and failure.pattern.search(line):
                    failure.times -= 1
                    return failure
        return None

    def user_of(self, token: str | None) -> str | None:
        if token is None:
            return None
        users = {self.token: self.user, self.other_token: self.other}
        if token not in users:
            raise HubError(401, None, "Invalid username or password.")
        return users[token]

    # ---- the API; each method returns what is sent as JSON

    def readable(self, repo_id: str, user: str | None, *, content: bool = True) -> Repo:
        """The repo, if this user may see it. `content`: a gated repo shows its page to all, files to few."""
        repo = self.repos.get(repo_id)
        hidden = repo is None or (repo.private and not self.may_write(repo_id, user))
        if hidden:
            raise HubError(404 if user else 401, "RepoNotFound", "Repository not found")
        if content and repo.gated_to is not None and user not in repo.gated_to | {repo_id.split("/")[0]}:
            raise HubError(403 if user else 401, "GatedRepo", f"Access to model {repo_id} is restricted.")
        return repo

    def may_write(self, repo_id: str, user: str | None) -> bool:
        return user is not None and repo_id.split("/")[0] == user

    def check_write(self, repo_id: str, user: str | None) -> None:
        if user is None:
            raise HubError(401, None, "Invalid username or password.")
        if not self.may_write(repo_id, user):
            raise HubError(403, None, f'You don\'t have the rights to write under the namespace "{repo_id}"')

    def at(self, repo: Repo, revision: str | None) -> str:
        sha = repo.resolve(revision)
        if sha is None:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha

    def create(self, user: str | None, wanted: dict) -> dict:
        repo_id = f"{wanted.get('organization') or user}/{wanted['name']}"
        self.check_write(repo_id, user)
        url = f"{self.endpoint}/{repo_id}"
        if repo_id in self.repos:
            raise HubError(409, None, "You already created this model repo", body={"url": url})
        repo = self.repos[repo_id] = Repo(
            repo_id, private=wanted.get("private") or wanted.get("visibility") == "private"
        )
        repo.commit(
            "refs/heads/main",
            {".gitattributes": Blob(b"*.safetensors filter=lfs\n", False)},
            "initial commit",
        )
        return {"url": url, "name": repo_id, "id": repo_id}

    def search(self, user: str | None, query: dict) -> list[dict]:
        wanted = set(query.get("filter", []))
        visible = [repo for repo in self.repos.values() if not repo.private or self.may_write(repo.id, user)]
        infos = [repo.info(repo.refs["refs/heads/main"]) for repo in visible]
        return [info for info in infos if wanted <= set(info["tags"])]

    def lfs_batch(self, repo_id: str, user: str | None, wanted: dict) -> dict:
        self.check_write(repo_id, user)
        objects = []
        for item in wanted["objects"]:
            upload = {"upload": {"href": f"{self.endpoint}/lfs-upload/{item['oid']}", "header": {}}}
            known = item["oid"] in self.lfs
            objects.append({"oid": item["oid"], "size": item["size"]} | ({} if known else {"actions": upload}))
        return {"transfer": "basic", "objects": objects}

    def lfs_put(self, oid: str, data: bytes) -> dict:
        if hashlib.sha256(data).hexdigest() != oid:
            raise HubError(400, None, "the content is not what its oid says")
        self.lfs[oid] = data
        return {}

    def preupload(self, repo: Repo, sha: str, wanted: dict) -> dict:
        tree, files = repo.trees[sha], []
        for item in wanted["files"]:
            large = item["size"] >= LFS_BYTES or item["path"].endswith(LFS_SUFFIXES)
            file = {"path": item["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            known = tree.get(item["path"])
            files.append(file | ({"oid": known.etag} if known else {}))
        return {"files": files}

    def commit(self, repo: Repo, revision: str, lines: bytes, create_pr: bool) -> dict:
        """All of a commit or nothing: the tree is replaced in the last step."""
        sha = self.at(repo, revision)
        tree, title = dict(repo.trees[sha]), ""
        for line in lines.splitlines():
            operation = json.loads(line)
            key, value = operation["key"], operation["value"]
            if key == "header":
                title = value["summary"]
                if value.get("parentCommit") not in (None, sha):
                    raise HubError(412, None, "A commit has happened since. Please refresh and try again.")
            elif key == "file":
                tree[value["path"]] = Blob(base64.b64decode(value["content"]), False)
            elif key == "lfsFile":
                tree[value["path"]] = Blob(self.lfs[value["oid"]], True)
            elif key == "deletedFile" and tree.pop(value["path"], None) is None:
                raise HubError(404, "EntryNotFound", "A file with this name doesn't exist")
        number = 1 + sum(ref.startswith("refs/pr/") for ref in repo.refs)
        branch = revision if revision.startswith("refs/") else f"refs/heads/{revision}"
        new = repo.commit(f"refs/pr/{number}" if create_pr else branch, tree, title)
        answer = {"success": True, "commitOid": new, "commitUrl": f"{self.endpoint}/{repo.id}/commit/{new}"}
        if create_pr:
            answer["pullRequestUrl"] = f"{self.endpoint}/{repo.id}/discussions/{number}"
        return answer

    def add_ref(self, repo: Repo, ref: str, start: str | None) -> dict:
        if ref in repo.refs:
            raise HubError(409, None, f"{ref} exists already")
        repo.refs[ref] = self.at(repo, start)
        return {}

    def list_refs(self, repo: Repo) -> dict:
        kinds = {"refs/heads/": "branches", "refs/tags/": "tags", "refs/pr/": "pullRequests"}
        answer = {"branches": [], "tags": [], "pullRequests": [], "converts": []}
        for ref, sha in repo.refs.items():
            prefix = next(kind for kind in kinds if ref.startswith(kind))
            answer[kinds[prefix]].append({"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": sha})
        return answer

    def list_tree(self, repo: Repo, sha: str) -> list[dict]:
        return [_entry(path, blob) for path, blob in sorted(repo.trees[sha].items())]

    def paths_info(self, repo: Repo, sha: str, wanted: list[str]) -> list[dict]:
        return [_entry(path, repo.trees[sha][path]) for path in wanted if path in repo.trees[sha]]


def _entry(path: str, blob: Blob) -> dict:
    entry = {"type": "file", "oid": blob.oid, "size": len(blob.data), "path": path}
    return entry | ({"lfs": {"oid": blob.sha256, "size": len(blob.data), "pointerSize": 130}} if blob.lfs else {})


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer's body waits 40 ms for its header to be acknowledged

    def setup(self):
        super().setup()
        self.server.hub.connections.add(self.connection)

    def finish(self):
        self.server.hub.connections.discard(self.connection)
        super().finish()

    def log_message(self, *_):
        pass

    def do(self):
        hub: LocalHub = self.server.hub
        url = urlsplit(self.path)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        self.seen = Request(self.command, url.path, token)
        with hub.lock:
            hub.requests.append(self.seen)
        self.failure = hub.failure_of(f"{self.command} {url.path}")
        try:
            if hub.down:
                raise Cut
            body = self.read_body()
            try:
                with hub.lock:
                    answer = self.route(hub, url.path, parse_qs(url.query), body, hub.user_of(token))
            except HubError as error:
                self.refuse(error)
            else:
                self.answer(*answer) if isinstance(answer, tuple) else self.answer(json.dumps(answer).encode())
        except (Cut, BrokenPipeError, ConnectionResetError):
            self.close_connection = True
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
                self.count_received(size)
            self.rfile.readline()
            return b"".join(parts)
        left, parts = int(self.headers.get("Content-Length") or 0), []
        while left:
            block = self.rfile.read(min(BLOCK, left))
            if not block:
                raise Cut
            parts.append(block)
            left -= len(block)
            self.count_received(len(block))
        return b"".join(parts)

    def count_received(self, size: int) -> None:
        self.seen.received += size
        if self.failure and self.seen.received > self.failure.after:
            raise Cut

    def answer(self, data: bytes, status: int = 200, kind: str = "application/json", headers: dict | None = None):
        self.seen.status = status
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": len(data), **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "HEAD":
            return
        for start in range(0, len(data), BLOCK):
            block = data[start : start + BLOCK]
            if self.failure and self.seen.sent + len(block) > self.failure.after:
                self.wfile.write(block[: self.failure.after - self.seen.sent])
                self.wfile.flush()
                raise Cut
            self.wfile.write(block)
            self.seen.sent += len(block)

    def refuse(self, error: HubError) -> None:
        headers = {"X-Error-Message": str(error), **error.headers}
        if error.code:
            headers["X-Error-Code"] = error.code
        self.answer(json.dumps(error.body).encode(), error.status, headers=headers)

    def route(self, hub: LocalHub, path: str, query: dict, body: bytes, user: str | None):
        kind = (self.headers.get("Content-Type") or "").split(";")[0]
        wanted = json.loads(body) if body and kind.endswith(("/json", "+json")) else {}
        if path == "/api/whoami-v2":
            if user is None:
                raise HubError(401, None, "Invalid username or password.")
            return {"type": "user", "name": user, "orgs": [], "auth": {"accessToken": {"role": "write"}}}
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            return hub.create(user, wanted)
        if path == "/api/models":
            return hub.search(user, query)
        if path.startswith("/lfs-upload/"):
            return hub.lfs_put(path.rsplit("/", 1)[1], body)
        if match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return hub.lfs_batch(match[1], user, wanted)
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.download(hub, hub.readable(match[1], user), unquote(match[2]), unquote(match[3]))
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/([\w-]+)(?:/(.+))?)?", path):
            return self.api(hub, match[1], match[2], unquote(match[3] or ""), query, wanted, body, user)
        raise HubError(404, None, f"no route for {self.command} {path}")

    def download(self, hub: LocalHub, repo: Repo, revision: str, name: str):
        sha = hub.at(repo, revision)
        blob = repo.trees[sha].get(name)
        if blob is None:
            raise HubError(404, "EntryNotFound", "Entry not found", **{"X-Repo-Commit": sha})
        headers = {"ETag": f'"{blob.etag}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        data, status = blob.data, 200
        if hub.corrupt and name.endswith(hub.corrupt):
            data = data[: len(data) // 2] + bytes(byte ^ 0xFF for byte in data[len(data) // 2 :])
        if self.command == "GET" and (part := re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")):
            first, last = int(part[1]), min(int(part[2] or len(data) - 1), len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            data, status = data[first : last + 1], 206
        return data, status, "application/octet-stream", headers

    def api(self, hub: LocalHub, repo_id, verb, rest, query, wanted, body, user):
        reading = verb in (None, "revision", "tree", "paths-info", "refs", "commits")
        repo = hub.readable(repo_id, user, content=verb not in (None, "revision"))
        if not reading:
            hub.check_write(repo_id, user)
        if verb is None or verb == "revision":
            return repo.info(hub.at(repo, rest))
        if verb == "refs":
            return hub.list_refs(repo)
        if verb == "commits":
            return [{"id": sha, "title": repo.titles[sha], "message": "", "authors": [], "date": DATE}
                    for sha in reversed(repo.trees)]  # fmt: skip
        if verb == "tree":
            return hub.list_tree(repo, hub.at(repo, rest))
        if verb == "paths-info":
            return hub.paths_info(repo, hub.at(repo, rest), wanted.get("paths") or parse_qs(body.decode())["paths"])
        if verb == "preupload":
            return hub.preupload(repo, hub.at(repo, rest), wanted)
        if verb == "commit":
            return hub.commit(repo, rest, body, bool(query.get("create_pr")))
        if verb == "branch":
            return hub.add_ref(repo, f"refs/heads/{rest}", wanted.get("startingPoint"))
        if verb == "tag":
            return hub.add_ref(repo, f"refs/tags/{wanted['tag']}", rest)
        raise HubError(404, None, f"no route for {self.command} of {verb!r}")
