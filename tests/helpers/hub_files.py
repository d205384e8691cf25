"""Routes of the loopback Hub of [`hub_server`] that move files: LFS, in one part or several, and downloads."""

import re
from hashlib import sha1, sha256
from typing import Any
from urllib.parse import unquote

from fastapi import FastAPI, Request, Response
from starlette.types import Receive, Scope, Send

from tests.helpers.hub_store import File, Hub, Refusal


CHUNK = 5 * 2**20


class Cut(Response):
    """Announces a byte and ends without it, upon which uvicorn closes the connection."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"1")]})


def content_response(request: Request, file: File, headers: dict[str, str]) -> Response:
    headers = headers | {"ETag": f'"{file.etag}"', "Accept-Ranges": "bytes"}
    content, status = file.content, 200
    if match := re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", "")):
        start, end = int(match[1]), min(int(match[2] or len(content)), len(content) - 1)
        headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
        content, status = content[start : end + 1], 206
    if request.method == "HEAD":
        return Response(status_code=status, headers=headers | {"Content-Length": str(len(content))})
    return Response(content, status, headers, media_type="application/octet-stream")


def add_file_routes(app: FastAPI, hub: Hub) -> None:
    async def lfs_batch(request: Request) -> Any:
        hub.find(request, write=True)
        asked = (await request.json())["objects"]
        missing = sum(item["size"] for item in asked if item["oid"] not in hub.objects)
        if hub.quota is not None and missing + sum(map(len, hub.objects.values())) > hub.quota:
            raise Refusal(403, "Private repository storage limit reached, please upgrade your plan")
        objects = []
        for item in asked:
            if item["oid"] not in hub.objects:
                address = f"{hub.elsewhere}/lfs/{item['oid']}"
                upload: dict[str, Any] = {"href": address}
                if item["size"] > CHUNK:
                    numbers = range(1, -(-item["size"] // CHUNK) + 1)
                    header = {"chunk_size": str(CHUNK)} | {str(n): f"{address}?part={n}" for n in numbers}
                    upload = {"href": f"{hub.url}/lfs-complete", "header": header}
                item["actions"] = {"upload": upload, "verify": {"href": f"{hub.url}/lfs-verify"}}
            objects.append(item)
        return {"transfer": "multipart", "objects": objects}

    @app.put("/lfs/{oid}")
    async def upload(request: Request) -> Any:
        oid, part, body = request.path_params["oid"], request.query_params.get("part"), bytearray()
        hub.tokens_elsewhere += "authorization" in request.headers
        # Counted with the decision: while a body is awaited, other uploads are decided on
        if hub.uploads_left is not None:
            if hub.uploads_left <= 0:
                raise Refusal(403, "Request has expired")
            hub.uploads_left -= 1
        async for chunk in request.stream():
            body += chunk
            if hub.cut_uploads:
                hub.cut_uploads, hub.cuts = hub.cut_uploads - 1, hub.cuts + 1
                return Cut()
        if part is None:
            keep(oid, bytes(body))
        else:
            hub.parts.setdefault(oid, {})[int(part)] = bytes(body)
        return Response(headers={"ETag": f'"{sha1(body).hexdigest()}"'})

    def keep(oid: str, content: bytes) -> None:
        if sha256(content).hexdigest() != oid:
            raise Refusal(400, f"The content is not that of {oid}")
        hub.objects[oid] = content
        hub.uploads[oid] += 1

    @app.post("/lfs-complete")
    async def complete(request: Request) -> Any:
        asked = await request.json()
        parts = hub.parts.pop(asked["oid"])
        sent = {part["partNumber"]: part["etag"] for part in asked["parts"]}
        if sent != {number: f'"{sha1(content).hexdigest()}"' for number, content in parts.items()}:
            raise Refusal(400, "The parts are not those that were sent")
        keep(asked["oid"], b"".join(parts[number] for number in sorted(parts)))
        return {}

    @app.post("/lfs-verify")
    async def verify(request: Request) -> Any:
        asked = await request.json()
        if len(hub.objects.get(asked["oid"], b"")) != asked["size"]:
            raise Refusal(404, f"{asked['oid']} of {asked['size']} bytes is not here")
        return {}

    @app.api_route("/lfs/{oid}", methods=["GET", "HEAD"])
    async def download(request: Request) -> Any:
        hub.tokens_elsewhere += "authorization" in request.headers
        oid = request.path_params["oid"]
        hub.downloads[oid] += request.method == "GET"
        return content_response(request, File(hub.objects[oid], is_lfs=True), {})

    async def resolve(request: Request) -> Any:
        repository = hub.find(request, content=True)
        commit, path = hub.find_commit(request, repository), unquote(request.path_params["path"])
        headers = {"X-Repo-Commit": commit}
        if (file := repository.commits[commit].get(path)) is None:
            message = f'{path} does not exist on "{unquote(request.path_params["revision"])}"'
            return Response(
                status_code=404, headers=headers | {"X-Error-Code": "EntryNotFound", "X-Error-Message": message}
            )
        if not file.is_lfs:
            return content_response(request, file, headers)
        headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(len(file.content))}
        return Response(status_code=302, headers=headers | {"Location": f"{hub.elsewhere}/lfs/{file.sha256}"})

    for prefix in ("/{kind}", ""):
        app.post(prefix + "/{namespace}/{name}.git/info/lfs/objects/batch")(lfs_batch)
        app.api_route(prefix + "/{namespace}/{name}/resolve/{revision}/{path:path}", methods=["GET", "HEAD"])(resolve)
