"""A small Hub on the loopback address, for tests: the endpoints that `huggingface_hub` asks for, repositories in memory.

    with Hub() as hub:
        hub.add('me/model', {'config.json': b'{}'})   # a commit
        hub.requests                                   # (method, path) of all that was asked for"""
import base64, fnmatch, hashlib, json, re, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

def blob_id(data):
    "As git names a file"
    return hashlib.sha1(b'blob %d\0' % len(data) + data).hexdigest()

def is_large(path): return path.endswith(('.safetensors', '.png', '.gguf'))

class Hub:
    "`faults`: path → what happens to its next transfers: 'cut' (half of it arrives), 'altered' (one byte is another)"
    def __init__(self): self.repos, self.requests, self.objects, self.faults, self.cards = {}, [], {}, {}, []

    def __enter__(self):
        hub = self
        class Handler(_Handler): pass
        Handler.hub = hub
        self.server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.url = f'http://127.0.0.1:{self.server.server_address[1]}'
        threading.Thread(target=self.server.serve_forever, kwargs=dict(poll_interval=0.02), daemon=True).start()
        return self

    def __exit__(self, *_): self.server.shutdown(); self.server.server_close()

    def add(self, repo, files, delete=(), branch='main', **settings):
        "A commit on top of the branch; settings of the repository: private or gated, for a token"
        r = self.repos.setdefault(repo, dict(commits={}, refs={}, private=False, gated=False))
        r.update(settings)
        old = r['commits'].get(r['refs'].get(branch, r['refs'].get('main')), {})
        new = {p: d for p,d in old.items() if not any(fnmatch.fnmatch(p, x) for x in delete)} | files
        sha = hashlib.sha1(f'{repo}{len(r["commits"])}{time.time_ns()}'.encode()).hexdigest()
        r['commits'][sha], r['refs'][branch] = new, sha
        return sha

    def files(self, repo, revision='main'):
        r = self.repos[repo]
        return r['commits'][r['refs'].get(revision, revision)]

    def got(self, repo=''):
        "The files that were sent, each as often as it was"
        found = [re.match(rf'/{repo or ".*?"}/resolve/[^/]+/(.*)', p) for m,p in self.requests if m == 'GET']
        return sorted(m[1] for m in found if m)

class _Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    def log_message(self, *_): pass

    def answer(self, status=200, body=b'', **headers):
        if not isinstance(body, bytes):
            body, headers = json.dumps(body).encode(), {'Content-Type': 'application/json', **headers}
        self.send_response(status)
        for name, value in headers.items(): self.send_header(name.replace('_', '-'), str(value))
        if 'Content-Length' not in headers: self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        if self.command != 'HEAD': self.wfile.write(body)

    def refuse(self, status, code, message=''):
        self.answer(status, {'error': message or code}, X_Error_Code=code, X_Error_Message=message or code)

    def repository(self, name):
        "None where the answer is sent already"
        r = self.hub.repos.get(name)
        token = self.headers.get('Authorization', '').removeprefix('Bearer ')
        if r is None or r['private'] and token != r['private']: return self.refuse(401 if not token else 404, 'RepoNotFound')
        if r['gated'] and token != r['gated'] and '/resolve/' in self.path: return self.refuse(403, 'GatedRepo', 'Access is restricted')
        return r

    def commit_of(self, r, revision):
        sha = r['refs'].get(revision, revision)
        return sha if sha in r['commits'] else self.refuse(404, 'RevisionNotFound')

    def handle_one(self):
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        size = int(self.headers.get('Content-Length') or 0)
        body = self.rfile.read(size) if size else b''
        for pattern, act in ((r'/api/models/([^/]+/[^/]+)(?:/revision/(.+))?', self.info),
                             (r'/api/models/([^/]+/[^/]+)/tree/([^/]+).*', self.tree),
                             (r'/api/models/([^/]+/[^/]+)/preupload/(.+)', self.preupload),
                             (r'/api/models/([^/]+/[^/]+)/commit/(.+)', self.commit),
                             (r'/api/models/([^/]+/[^/]+)/tag/(.+)', self.tag),
                             (r'/api/repos/create', self.create), (r'/api/validate-yaml', self.validate),
                             (r'/([^/]+/[^/]+)\.git/info/lfs/objects/batch', self.batch),
                             (r'/lfs/(\w+)', self.store), (r'/([^/]+/[^/]+)/resolve/([^/]+)/(.+)', self.resolve)):
            if m := re.fullmatch(pattern, path): return act(body, *m.groups())
        self.refuse(404, 'NotFound', f'{self.command} {path} is not among the endpoints of this stand-in')

    do_GET = do_HEAD = do_POST = do_PUT = handle_one

    def info(self, body, name, revision=None):
        if (r := self.repository(name)) and (sha := self.commit_of(r, revision or 'main')):
            self.answer(body=dict(id=name, modelId=name, sha=sha, private=bool(r['private']), tags=[], gated=bool(r['gated']),
                             siblings=[dict(rfilename=p) for p in r['commits'][sha]]))

    def tree(self, body, name, revision):
        if (r := self.repository(name)) and (sha := self.commit_of(r, revision)):
            entries = [dict(type='file', path=p, size=len(d), oid=blob_id(d))
                       | (dict(lfs=dict(oid=hashlib.sha256(d).hexdigest(), size=len(d), pointerSize=130)) if is_large(p) else {})
                       for p,d in sorted(r['commits'][sha].items())]
            self.answer(body=entries)

    def create(self, body):
        asked = json.loads(body)
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if not self.headers.get('Authorization'): return self.refuse(401, 'Unauthorized', 'Invalid username or password.')
        if not name.startswith('me/'): return self.refuse(403, 'Forbidden', f"You don't have the rights to create a model under {name}")
        if name in self.hub.repos: return self.answer(409, dict(error='You already created this model repo', url=f'{self.hub.url}/{name}'))
        self.hub.add(name, {}, private=self.headers.get('Authorization', '').removeprefix('Bearer ')
                     if asked.get('private') or asked.get('visibility') == 'private' else False)
        self.answer(body=dict(url=f'{self.hub.url}/{name}', name=name))

    def validate(self, body):
        self.hub.cards.append(json.loads(body)['content']); self.answer(body=dict(errors=[], warnings=[]))

    def preupload(self, body, name, revision):
        if not (r := self.repository(name)): return
        here = r['commits'].get(r['refs'].get(revision, revision), {})
        def mode(f): return 'lfs' if is_large(f['path']) else 'regular'
        def oid(f):
            data = here.get(f['path'])
            return data is not None and (hashlib.sha256(data).hexdigest() if is_large(f['path']) else blob_id(data)) or None
        self.answer(body=dict(files=[dict(path=f['path'], uploadMode=mode(f), shouldIgnore=False, oid=oid(f))
                                     for f in json.loads(body)['files']]))

    def batch(self, body, name):
        if not self.repository(name): return
        objects = [dict(oid=o['oid'], size=o['size'], **({} if o['oid'] in self.hub.objects else dict(
            actions=dict(upload=dict(href=f"{self.hub.url}/lfs/{o['oid']}"))))) for o in json.loads(body)['objects']]
        self.answer(body=dict(transfer='basic', objects=objects))

    def store(self, body, oid):
        if hashlib.sha256(body).hexdigest() != oid: return self.refuse(400, 'BadDigest')
        self.hub.objects[oid] = body; self.answer()

    def commit(self, body, name, revision):
        if not self.repository(name): return
        new, gone = {}, []
        for line in body.splitlines():
            item = json.loads(line); value = item['value']
            if item['key'] == 'file': new[value['path']] = base64.b64decode(value['content'])
            if item['key'] == 'lfsFile': new[value['path']] = self.hub.objects[value['oid']]
            if item['key'] == 'deletedFile': gone.append(value['path'])
        sha = self.hub.add(name, new, gone, revision)
        self.answer(body=dict(success=True, commitOid=sha, commitUrl=f'{self.hub.url}/{name}/commit/{sha}', hookOutput=''))

    def tag(self, body, name, revision):
        if (r := self.repository(name)) and (sha := self.commit_of(r, revision)):
            r['refs'][json.loads(body)['tag']] = sha
            self.answer(body={})

    def resolve(self, body, name, revision, path):
        if not (r := self.repository(name)) or not (sha := self.commit_of(r, revision)): return
        if path not in r['commits'][sha]: return self.refuse(404, 'EntryNotFound')
        data = r['commits'][sha][path]
        etag = hashlib.sha256(data).hexdigest() if is_large(path) else blob_id(data)
        told = dict(ETag=f'"{etag}"', X_Repo_Commit=sha, Accept_Ranges='bytes')
        start = int(m[1]) if (m := re.match(r'bytes=(\d+)-', self.headers.get('Range', ''))) else 0
        if start: told['Content-Range'] = f'bytes {start}-{len(data) - 1}/{len(data)}'
        status, rest = 206 if start else 200, data[start:]
        waiting = self.hub.faults.get(path, [])
        fault = waiting.pop(0) if self.command == 'GET' and waiting else None
        if fault == 'altered': rest = bytes([rest[0] ^ 1]) + rest[1:]
        if fault == 'cut':
            self.close_connection = True
            return self.answer(status, rest[:len(rest)//2], **told, **{'Content-Length': len(rest)})
        self.answer(status, rest, **told, **{'Content-Length': len(rest)})
