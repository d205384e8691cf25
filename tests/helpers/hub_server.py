"""
A Hub on this machine: what the real client of `huggingface_hub` asks of it, answered from memory over loopback.

    with serve() as hub:
        subprocess.run([...], env=hub.environment(home, token=OWNER_TOKEN))
        hub.repository("owner/name").files("main")

The client reads `HF_ENDPOINT` when it is imported, hence in a process of its own. Large files go by LFS (Xet is off)
and are downloaded from another origin. Switches on [`Hub`] break things; counters tell what was really sent.
"""

import base64
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha1
from typing import Any
from urllib.parse import parse_qs, unquote

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from tests.helpers.hub_card_check import card_data, metadata_problems
from tests.helpers.hub_files import add_file_routes
from tests.helpers.hub_store import OWNER_TOKEN, READER_TOKEN, USERS, File, Hub, Refusal, is_large


__all__ = ["OWNER_TOKEN", "READER_TOKEN", "Hub", "serve"]

KINDS = {"models": "", "datasets": "datasets/", "spaces": "spaces/"}
API, AT = "/api/{kind}/{namespace}/{name}", "/{revision}"


def build_app(hub: Hub) -> FastAPI:
    app = FastAPI(openapi_url=None)

    @app.exception_handler(Refusal)
    async def refuse(request: Request, refusal: Refusal) -> Response:
        headers = {"X-Error-Message": refusal.message} | ({"X-Error-Code": refusal.code} if refusal.code else {})
        return JSONResponse({"error": refusal.message}, refusal.status, headers=headers)

    @app.get("/api/whoami-v2")
    async def whoami(request: Request) -> Any:
        if (user := hub.user(request)) is None:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return {
            "type": "user",
            "name": user,
            "orgs": [{"name": org} for name, orgs in USERS.values() if name == user for org in orgs],
        }

    @app.post("/api/repos/create")
    async def create(request: Request) -> Any:
        asked = await request.json()
        if (user := hub.user(request)) is None:
            raise Refusal(401, "Invalid username or password.")
        namespace = asked.get("organization") or user
        kind, repo_id = f"{asked.get('type') or 'model'}s", f"{namespace}/{asked['name']}"
        if not hub.may_write(request, namespace):
            raise Refusal(403, f'You don\'t have the rights to create a {kind[:-1]} under the namespace "{namespace}"')
        answer = {"url": f"{hub.url}/{KINDS[kind]}{repo_id}", "name": repo_id}
        if (kind, repo_id) in hub.repositories:
            return JSONResponse(answer | {"error": f"You already created this {kind[:-1]} repo"}, 409)
        repository = hub.add(repo_id, {".gitattributes": b"*.safetensors filter=lfs\n"}, kind)
        repository.private = asked.get("visibility") == "private"
        repository.sdk, repository.hardware = asked.get("sdk"), asked.get("hardware")
        repository.sleep_time = asked.get("sleepTimeSeconds")
        for name in ("secrets", "variables"):
            setattr(repository, name, {item["key"]: item["value"] for item in asked.get(name) or []})
        return answer

    @app.delete("/api/repos/delete")
    async def delete(request: Request) -> Any:
        asked = await request.json()
        namespace = asked.get("organization") or hub.user(request)
        key = (f"{asked.get('type') or 'model'}s", f"{namespace}/{asked['name']}")
        if not hub.may_write(request, namespace) or key not in hub.repositories:
            raise Refusal(404, "Repository not found", "RepoNotFound")
        del hub.repositories[key]
        return {}

    @app.post("/api/validate-yaml")
    async def validate_yaml(request: Request) -> Any:
        asked = await request.json()
        errors, warnings = metadata_problems(asked["content"], asked["repoType"])
        answer = {
            "errors": [{"message": text} for text in errors],
            "warnings": [{"message": text} for text in warnings],
        }
        return JSONResponse(answer, 400 if errors else 200)

    @app.put(API + "/settings")
    async def settings(request: Request) -> Any:
        repository, asked = hub.find(request, write=True), await request.json()
        repository.gated = bool(asked.get("gated", repository.gated))
        repository.private = asked["visibility"] == "private" if "visibility" in asked else repository.private
        return {"private": repository.private, "gated": repository.gated}

    @app.get(API)
    @app.get(API + "/revision" + AT)
    async def info(request: Request) -> Any:
        repository = hub.find(request)
        commit = hub.find_commit(request, repository)
        files = repository.commits[commit]
        data = card_data(files["README.md"].content.decode()) if "README.md" in files else {}
        siblings = [
            {"rfilename": path}
            | ({"size": len(file.content), "blobId": file.git_oid} if "blobs" in request.query_params else {})
            for path, file in sorted(files.items())
        ]
        facts = {
            "_id": repository.id,
            "id": repository.id,
            "sha": commit,
            "private": repository.private,
            "gated": "manual" if repository.gated else False,
        }
        facts |= {"disabled": False, "downloads": 0, "likes": 0, "tags": data.get("tags") or [], "cardData": data}
        return facts | {"siblings": siblings, "lastModified": "2026-01-01T00:00:00.000Z", "sdk": repository.sdk}

    @app.get(API + "/auth-check")
    async def auth_check(request: Request) -> Any:
        hub.find(request, content=True)
        return {}

    @app.get(API + "/refs")
    async def refs(request: Request) -> Any:
        repository, answer = hub.find(request), {"branches": [], "tags": [], "pullRequests": [], "converts": []}
        for ref, commit in repository.refs.items():
            group = next(
                g
                for part, g in (("heads", "branches"), ("tags", "tags"), ("pr", "pullRequests"))
                if ref.split("/")[1] == part
            )
            answer[group].append({"name": ref.split("/", 2)[2], "ref": ref, "targetCommit": commit})
        return answer

    @app.get(API + "/commits" + AT)
    async def commits(request: Request) -> Any:
        repository, history = hub.find(request), []
        oid: str | None = hub.find_commit(request, repository)
        while oid is not None:
            history.append(repository.log[oid] | {"date": "2026-01-01T00:00:00.000Z"})
            oid = repository.log[oid]["parent"]
        return history

    @app.get(API + "/tree" + AT)
    @app.get(API + "/tree" + AT + "/{path:path}")
    async def tree(request: Request) -> Any:
        repository = hub.find(request)
        files = repository.commits[hub.find_commit(request, repository)]
        folder = unquote(request.path_params.get("path", "")).strip("/")
        below = {path: file for path, file in files.items() if not folder or path.startswith(folder + "/")}
        if folder and not below:
            raise Refusal(404, f"{folder} does not exist", "EntryNotFound")
        depth = folder.count("/") + 1 if folder else 0
        recursive = request.query_params.get("recursive", "").lower() in ("true", "1")
        folders = {"/".join(path.split("/")[:n]) for path in below for n in range(depth + 1, path.count("/") + 1)}
        entries = [
            {"type": "directory", "path": path, "size": 0, "oid": sha1(path.encode()).hexdigest()}
            for path in folders
            if recursive or path.count("/") == depth
        ]
        entries += [file.facts(path) for path, file in below.items() if recursive or path.count("/") == depth]
        entries.sort(key=lambda entry: entry["path"])
        start, size = int(request.query_params.get("cursor", 0)), 1000
        headers = (
            {"Link": f'<{request.url.include_query_params(cursor=start + size)}>; rel="next"'}
            if start + size < len(entries)
            else {}
        )
        return JSONResponse(entries[start : start + size], headers=headers)

    @app.post(API + "/paths-info" + AT)
    async def paths_info(request: Request) -> Any:
        repository = hub.find(request)
        files = repository.commits[hub.find_commit(request, repository)]
        body = (await request.body()).decode()
        asked = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body).get("paths", [])
        folders = [path for path in asked if any(known.startswith(path.rstrip("/") + "/") for known in files)]
        found = [
            {"type": "directory", "path": path, "oid": sha1(path.encode()).hexdigest(), "size": 0} for path in folders
        ]
        return found + [files[path].facts(path) for path in asked if path in files]

    @app.get(API + "/discussions")
    async def discussions(request: Request) -> Any:
        hub.find(request)
        return {"discussions": [], "count": 0, "start": 0}

    @app.post(API + "/preupload" + AT)
    async def preupload(request: Request) -> Any:
        repository = hub.find(request, write=True)
        files = repository.commits[hub.find_commit(request, repository)]
        asked = (await request.json())["files"]
        modes = {file["path"]: "lfs" if is_large(file["path"], file["size"]) else "regular" for file in asked}
        oids = {path: files[path].etag if path in files else None for path in modes}
        return {
            "files": [
                {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oids[path]}
                for path, mode in modes.items()
            ]
        }

    @app.post(API + "/commit" + AT)
    async def commit(request: Request) -> Any:
        repository = hub.find(request, write=True)
        # Before the parent is looked up: while a body is awaited, other commits are made
        lines = [json.loads(line) for line in (await request.body()).splitlines()]
        if hub.commit_before == repository.id:
            before, hub.commit_before = repository.refs["refs/heads/main"], None
            repository.commit("refs/heads/main", dict(repository.commits[before]), "Somebody else", before)
        parent = hub.find_commit(request, repository)
        header = next(line["value"] for line in lines if line["key"] == "header")
        if header.get("parentCommit") not in (None, parent):
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repository.commits[parent])
        for line in lines:
            key, value = line["key"], line["value"]
            if key == "file":
                damage = b"damaged" if value["path"] == hub.damage else b""
                files[value["path"]] = File(base64.b64decode(value["content"]) + damage, is_lfs=False)
            elif key == "lfsFile":
                if value["oid"] not in hub.objects:
                    raise Refusal(400, f"LFS pointer pointed to a file that does not exist: {value['path']}")
                files[value["path"]] = File(hub.objects[value["oid"]], is_lfs=True)
            elif key in ("deletedFile", "deletedFolder"):
                gone = [
                    path
                    for path in files
                    if path == value["path"]
                    or (key == "deletedFolder" and path.startswith(value["path"].rstrip("/") + "/"))
                ]
                if not gone:
                    raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
                for path in gone:
                    del files[path]
        url, number = f"{hub.url}/{KINDS[repository.kind]}{repository.id}", 0
        ref = f"refs/heads/{unquote(request.path_params['revision'])}"
        if "create_pr" in request.query_params:
            number = 1 + sum(name.startswith("refs/pr/") for name in repository.refs)
            ref = f"refs/pr/{number}"
        elif ref not in repository.refs:
            ref = unquote(request.path_params["revision"])
            if not ref.startswith("refs/pr/"):
                raise Refusal(400, f"{ref} is no branch")
        oid = repository.commit(ref, files, header["summary"], parent)
        pull_request = {"pullRequestUrl": f"{url}/discussions/{number}"} if number else {}
        return {"success": True, "commitOid": oid, "commitUrl": f"{url}/commit/{oid}"} | pull_request

    @app.api_route(API + "/{group}" + AT, methods=["POST", "DELETE"])
    async def reference(request: Request) -> Any:
        """Tags and branches; for Spaces no revision follows."""
        repository, name = hub.find(request, write=True), unquote(request.path_params["revision"])
        group = {"tag": "refs/tags/", "branch": "refs/heads/"}[request.path_params["group"]]
        if request.method == "DELETE":
            if repository.refs.pop(group + name, None) is None:
                raise Refusal(404, f"{name} does not exist", "RevisionNotFound")
            return {}
        asked = await request.json()
        start, name = (name, asked["tag"]) if "tag" in asked else (asked.get("startingPoint", "main"), name)
        if group + name in repository.refs:
            raise Refusal(409, f"Reference already exists: {name}")
        if (target := repository.resolve(start)) is None:
            raise Refusal(404, f"Invalid rev id: {start}", "RevisionNotFound")
        repository.refs[group + name] = target
        return {}

    add_space_routes(app, hub)
    add_file_routes(app, hub)
    return app


def add_space_routes(app: FastAPI, hub: Hub) -> None:
    @app.api_route(API + "/{setting}", methods=["GET", "POST", "DELETE"])
    async def space(request: Request) -> Any:
        repository, setting = hub.find(request, write=request.method != "GET"), request.path_params["setting"]
        asked = json.loads(await request.body() or b"{}")
        if setting in ("secrets", "variables"):
            values = getattr(repository, setting)
            if request.method == "POST":
                values[asked["key"]] = asked["value"]
            elif request.method == "DELETE":
                values.pop(asked["key"], None)
            return {
                key: {"key": key} | ({"value": value} if setting == "variables" else {})
                for key, value in values.items()
            }
        if setting == "hardware":
            repository.hardware = asked["flavor"]
        if setting in ("hardware", "sleeptime"):
            repository.sleep_time = asked.get(
                "sleepTimeSeconds" if setting == "hardware" else "seconds", repository.sleep_time
            )
        hardware = {"current": repository.hardware or "cpu-basic", "requested": repository.hardware or "cpu-basic"}
        stage = "PAUSED" if setting == "pause" else "RUNNING"
        return {"stage": stage, "hardware": hardware, "gcTimeout": repository.sleep_time, "storage": None}


@contextmanager
def serve() -> Iterator[Hub]:
    """A running [`Hub`] on a free port; ended on leaving."""
    hub = Hub()
    app = build_app(hub)

    async def with_raw_path(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            # `refs%2Fpr%2F1` is one part of the path
            scope["path"] = scope["raw_path"].decode()
            hub.requests.append((scope["method"], unquote(scope["path"])))
        await app(scope, receive, send)

    server = uvicorn.Server(uvicorn.Config(with_raw_path, host="127.0.0.1", port=0, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        if not thread.is_alive():
            raise RuntimeError("The loopback Hub did not start.")
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    hub.url, hub.elsewhere = f"http://127.0.0.1:{port}", f"http://localhost:{port}"
    try:
        yield hub
    finally:
        server.should_exit = True
        thread.join(timeout=30)
