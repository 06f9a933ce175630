"""
A small Hub on 127.0.0.1: the part of its API that huggingface_hub uses to create repositories, commit files, and read
them. It fails where a test asks for it.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml


TOKEN = "hf_testtokentesttokentesttoken"
USER = "tester"


def blob_id(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Hub:
    """
    `repos` maps a repository's name to `{"private": bool, "files": {path: bytes}, "commits": [title]}`; `failures` is
    a list of `[method, pattern of the path, status or "cut", times]` to be used up; `requests` lists what was asked.
    """

    def __init__(self):
        self.repos, self.failures, self.requests = {}, [], []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def fail(self, method, pattern, status, times=10**6):
        self.failures.append([method, pattern, status, times])

    def close(self):
        self.server.shutdown()
        self.server.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, content=None, status=200, headers=None, body=None):
        body = json.dumps(content).encode() if body is None else body
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def error(self, status, message, code=""):
        self.answer({"error": message}, status, {"X-Error-Message": message, "X-Error-Code": code})

    def handle_request(self):
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        self.hub.requests.append((self.command, path))
        for failure in self.hub.failures:
            method, pattern, status, times = failure
            if times and self.command == method and re.search(pattern, path):
                failure[3] -= 1
                if status == "cut":
                    self.close_connection = True
                    self.connection.close()
                    return
                self.error(status, f"this request fails with {status}")
                return
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token != TOKEN:
            self.error(401, "Invalid credentials in Authorization header")
            return
        self.route(path, body, bool(token))

    do_GET = do_POST = do_HEAD = handle_request

    def route(self, path, body, authorized):
        if path == "/api/validate-yaml":
            self.validate(json.loads(body)["content"])
            return
        if path == "/api/repos/create":
            self.create(json.loads(body), authorized)
            return
        match = re.fullmatch(r"(?:/api/models)?/([\w-]+/[\w.-]+)(/.*)?", path)
        repo = self.hub.repos.get(match[1]) if match else None
        if repo is None or (repo["private"] and not authorized):
            self.error(404 if authorized else 401, "Repository Not Found", "RepoNotFound")
            return
        rest = match[2] or ""
        if match_file := re.fullmatch(r"/resolve/[^/]+/(.+)", rest):
            self.resolve(repo, match_file[1])
        elif rest.startswith("/preupload/"):
            self.preupload(repo, json.loads(body), authorized)
        elif rest.startswith("/commit/"):
            self.commit(match[1], repo, body, authorized)
        elif rest.startswith("/tree/"):
            prefix = "/".join(rest.split("/")[3:])
            self.answer([self.entry(repo, name) for name in sorted(repo["files"]) if name.startswith(prefix)])
        elif rest.startswith("/paths-info/"):
            request = re.findall(r"paths=([^&]+)", body.decode()) or json.loads(body).get("paths", [])
            self.answer([self.entry(repo, name) for name in map(unquote, request) if name in repo["files"]])
        elif rest == "" or rest.startswith("/revision/"):
            siblings = [{"rfilename": name} for name in sorted(repo["files"])]
            self.answer({"id": match[1], "sha": self.sha(repo), "private": repo["private"], "siblings": siblings,
                         "tags": [], "downloads": 0, "likes": 0})  # fmt: skip
        else:
            self.error(404, f"no such path here: {path}", "EntryNotFound")

    def validate(self, page):
        """The Hub refuses pages whose metadata it can't read, incomplete results among them."""
        try:
            data = yaml.safe_load(page.split("---")[1])
            for result in data["model-index"][0]["results"]:
                assert result["task"]["type"] and result["dataset"]["name"] and result["dataset"]["type"]
                assert all(metric["type"] and metric["value"] is not None for metric in result["metrics"])
            self.answer({"errors": [], "warnings": []})
        except (LookupError, AssertionError, yaml.YAMLError) as error:
            self.answer({"errors": [{"message": repr(error)}], "warnings": []}, 400)

    def sha(self, repo):
        return hashlib.sha1(str(len(repo["commits"])).encode()).hexdigest()

    def entry(self, repo, name):
        content = repo["files"][name]
        return {"type": "file", "path": name, "size": len(content), "oid": blob_id(content)}

    def create(self, request, authorized):
        if not authorized:
            self.error(401, "Invalid username or password.")
            return
        name = f"{request.get('organization') or USER}/{request['name']}"
        if request.get("organization") not in (None, USER):
            self.error(403, f"You don't have the rights to create a model under the namespace {name}")
            return
        exists = name in self.hub.repos
        private = request.get("visibility") == "private" or bool(request.get("private"))
        self.hub.repos.setdefault(name, {"private": private, "files": {}, "commits": []})
        self.answer({"url": f"{self.hub.url}/{name}", "name": name}, 409 if exists else 200)

    def preupload(self, repo, request, authorized):
        if not authorized:
            self.error(401, "Invalid username or password.")
            return
        files = [
            {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False,
             "oid": blob_id(repo["files"][file["path"]]) if file["path"] in repo["files"] else None}
            for file in request["files"]
        ]  # fmt: skip
        self.answer({"files": files, "commitOid": self.sha(repo)})

    def commit(self, name, repo, body, authorized):
        if not authorized:
            self.error(401, "Invalid username or password.")
            return
        lines = [json.loads(line) for line in body.decode().splitlines() if line]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                repo["files"][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                repo["files"].pop(value["path"], None)
        repo["commits"].append(next(line["value"]["summary"] for line in lines if line["key"] == "header"))
        oid = self.sha(repo)
        url = f"{self.hub.url}/{name}/commit/{oid}"
        self.answer({"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})

    def resolve(self, repo, path):
        if path not in repo["files"]:
            self.error(404, "Entry not found", "EntryNotFound")
            return
        content, start = repo["files"][path], 0
        status, headers = 200, {"ETag": f'"{blob_id(content)}"', "X-Repo-Commit": self.sha(repo)}
        if interval := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            start, end = int(interval[1]), int(interval[2] or len(content) - 1)
            status, headers["Content-Range"] = 206, f"bytes {start}-{end}/{len(content)}"
            content = content[start : end + 1]
        self.answer(status=status, headers={"Content-Type": "application/octet-stream", **headers}, body=content)
