"""Builds the site of the book from the notebooks as committed: nothing is executed, nothing is fetched.

    python docs/site/build.py [FOLDER]    writes FOLDER/html (default `_docs`), of which `source`, `doctrees` and `html` are made anew; any warning is an error"""
import ast, json, os, re, shutil, sys, textwrap
from html import escape
from pathlib import Path
import book
from book import address, arguments, chapters, guides, is_dataclass, root, settings, signature

def rows(*lines): return '\n'.join(lines)

class Stage:
    "The folder that Sphinx reads: pages whose links lead from page to page, and images beside them"
    def __init__(self, folder):
        self.folder = Path(folder)
        self.chapters, self.guides = chapters(), guides()
        self.names = {n.name: n for c in self.chapters for n in c.names}
        self.pages = {c.path.relative_to(root).as_posix(): c.page + '.ipynb' for c in self.chapters}
        self.pages |= {name: page + '.md' for name, page in self.guides.items()}
        self.pages |= {'README.md': 'index.ipynb', 'nbs/index.ipynb': 'index.ipynb'}

    def put(self, name, content):
        path = self.folder/name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    def link(self, target, source, page):
        "A link of a file of the repository, as it has to read on its page"
        if re.match(r'https?:|mailto:|#', target): return target
        file, hash, anchor = target.partition('#')
        path = Path(os.path.normpath(root/Path(source).parent/file))
        if not path.is_relative_to(root) or not path.exists(): return target  # Sphinx will say so
        name = path.relative_to(root).as_posix()
        up = '../'*page.count('/')
        if name in self.pages: return up + self.pages[name] + hash + anchor
        if path.suffix in ('.png', '.svg'):
            self.put('images/' + name, path.read_bytes())
            return up + 'images/' + name
        return address(name) + hash + anchor

    def name_of(self, code, known):
        "The name of the library that inline code speaks of, if it does"
        name = self.names.get(code.removesuffix('()'))
        if name is None: return
        modules, single = known
        telling = '_' in name.name or name.name != name.name.lower()
        if telling or name.chapter.module in modules or name.name in single: return name

    def prose(self, text, source, page, known=(set(), set())):
        "Links led to pages, public names to the reference, internal ones to their cells"
        def inline(m):
            if m['target']: return f"{m['text']}({self.link(m['target'], source, page)})"
            name = self.name_of(m['code'], known)
            if not name: return m[0]
            return f"{{py:obj}}`{m['code']} <{name.full}>`" if name.public else f"[{m[0]}](#{name.anchor})"
        part = re.compile(r'(?P<text>!?\[(?:[^\[\]`]|`[^`]*`)*\])\((?P<target>[^)\s]+)\)|(?<!`)`(?P<code>[^`\n]+)`(?!`)')
        def line(l): return l if l.startswith('#') else part.sub(inline, l)
        pieces = re.split(r'(^ *```.*?^ *```|\$\$.*?\$\$)', text, flags=re.S | re.M)
        return ''.join(p if i % 2 else '\n'.join(map(line, p.split('\n'))) for i, p in enumerate(pieces))

def markdown(text, key): return dict(cell_type='markdown', id=key, metadata={}, source=text)

def buttons(links):
    "A row of links above a page's text; a link to a file is one that is kept"
    return '<p class="v2-buttons">' + ' '.join(
        f'<a href="{url}"{" download" if url.endswith(".ipynb") and not url.startswith("http") else ""}>{text}</a>'
        for text, url in links) + '</p>'

def notebook_buttons(name, page, reference):
    s = settings()
    colab = f"https://colab.research.google.com/github/{s['user']}/{s['repo']}/blob/{s['branch']}/{name}"
    up = '../'*page.count('/')
    return buttons([('Open in Colab', colab), ('Download notebook', f'{up}notebooks/{Path(name).name}'),
                    ('Edit', address(name, 'edit')), *([('Reference', up + reference)] if reference else [])])

def alternative(before):
    "What is said of an output's image to those who cannot see it: the sentence that leads to it"
    text = re.sub(r'[`*#|$]|\[([^\]]*)\]\([^)]*\)', lambda m: m[1] or '', before.strip().split('\n')[-1])
    return 'Figure. ' + re.split(r'(?<=[.:?!]) ', text)[-1].rstrip(':')

def shown_output(output, said):
    "Without a widget's view, which is of no use without its kernel; a frame with a title"
    if 'data' not in output: return output
    data = {k: v for k, v in output['data'].items() if 'widget' not in k}
    if 'text/html' in data:
        data['text/html'] = ''.join(data['text/html']).replace('<iframe ', f'<iframe title="{escape(said)}" ')
    return dict(output, data=data)

def library_line(names):
    "Above a cell: what it puts into the library, and the way to the reference"
    public = [f'{{py:obj}}`{n.name} <{n.full}>`' for n in names if n.public]
    internal = [f'`{n.name}`' for n in names if not n.public]
    anchors = '\n'.join(f'({n.anchor})=' for n in names)
    said = ' · '.join([*(['in the library: ' + ', '.join(public)] if public else []),
                       *([('internal: ' if public else 'in the library, internal: ') + ', '.join(internal)] if internal else [])])
    return f'{anchors}\n:::{{container}} v2-exports\n{said}\n:::'

def staged_cells(stage, source, page, cells, names_of=lambda cell: [], known=(set(), set())):
    "Cells as the page shows them: hidden ones left out, code that is aside folded, names and links led somewhere"
    before = ''
    for cell in cells:
        text, key = ''.join(cell['source']), cell['id']
        if cell['cell_type'] == 'markdown':
            before = text
            yield markdown(stage.prose(text, source, page, known), key)
            continue
        if cell['cell_type'] != 'code': continue
        kind = dict(book.directive.findall(text))
        code = book.directive.sub('', text).strip('\n')
        if not code or 'hide' in kind or 'default_exp' in kind: continue
        names = names_of(cell)
        if names: yield markdown(library_line(names), key + '-names')
        imports = all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in ast.parse(code).body) if 'export' in kind else False
        folded = 'Imports' if imports else 'Code' if kind.get('code-fold') == 'true' else ''
        if folded and code.startswith('# Answer'): folded = 'Answer'
        yield dict(cell, source=code, outputs=[shown_output(o, alternative(before)) for o in cell['outputs']], execution_count=None,
                   metadata=dict(tags=['hide-input'] if folded else [], mystnb=dict(
                       image=dict(alt=alternative(before)), code_prompt_show=folded, code_prompt_hide=folded)))

def notebook(cells):
    cells = list(cells)
    return json.dumps(dict(cells=cells, nbformat=4, nbformat_minor=5, metadata=dict(
        kernelspec=dict(display_name='Python 3', language='python', name='python3'))), ensure_ascii=False)

def stage_chapter(stage, chapter):
    source = chapter.path.relative_to(root).as_posix()
    head, cells = chapter.first.partition('\n\n'), chapter.cells
    reference = f'reference/{chapter.shelf}.html#module-{chapter.module}' if chapter.names else ''
    row = notebook_buttons(source, chapter.page, reference)
    first = dict(cells[0], source='\n\n'.join([head[0], row, head[2]]))
    stage.put(chapter.page + '.ipynb', notebook(staged_cells(stage, source, chapter.page, [first, *cells[1:]],
        lambda cell: chapter.names_of(cell), chapter.known)))

def stage_guide(stage, name, page):
    text = (root/name).read_text(encoding='utf-8')
    title, gap, rest = text.partition('\n\n')
    row = buttons([('Edit', address(name, 'edit'))])
    stage.put(page + '.md', f"{stage.prose(title, name, page)}\n\n{row}\n\n{stage.prose(rest, name, page)}")

def toctree(caption, entries):
    return rows('```{toctree}', ':hidden:', f':caption: {caption}', '', *entries, '```')

def shelves(stage):
    "Shelf → its chapters, in reading order"
    found = {}
    for c in stage.chapters: found.setdefault(c.shelf, []).append(c)
    return found

def contents(stage, table):
    "The table of chapters, made from the files; what is on a shelf is said by the front page's own table"
    said = {shelf: text for shelf, text in re.findall(r'^\| `(\w+)` \| ([^|]+) \|', table, re.M)}
    lines = ['| shelf | what is on it | chapters |', '|---|---|---|']
    for shelf, found in shelves(stage).items():
        links = ' · '.join(f'[{c.number} {c.title}]({c.page}.ipynb)' for c in found)
        lines.append(f'| `{shelf}` | {said.get(shelf, "")} | {links} |')
    return re.sub(r'(^\|.*\n?)+', lambda m: '\n'.join(lines) + '\n', table, count=1, flags=re.M)

def stage_front(stage):
    "The front page's notebook: first what the model draws, then its sections; and the navigation of the whole site"
    source, page = 'nbs/index.ipynb', 'index'
    cells = json.loads((root/source).read_text(encoding='utf-8'))['cells']
    stage.put('_static/generated.png', (root/'data/checkpoints/emoji/held_out.png').read_bytes())
    title, lead, *rest = ''.join(cells[0]['source']).split('\n\n')
    start = next(c for c in stage.chapters if c.shelf == 'models')
    figure = rows('<figure class="v2-drawn"><a href="_static/generated.png">'
        '<img src="_static/generated.png" width="1048" height="694" alt="Forty small emoji, each above the caption that it was '
        'generated from; most are people with a hair, skin tone, sex and occupation as the caption says"></a>',
        '<figcaption>Written by a LLaMA of 6.8 million parameters, from captions held out of its training and drawn at random. '
        'A tick: among all same-base and 50 random images, the real one is nearest.</figcaption></figure>')
    row = buttons([('Read the method', f'{start.page}.html'), ('Train your own', 'guide/training.html'),
                   ('Reference', 'reference/index.html'), ('On GitHub', settings()['git_url'])])
    first = '\n\n'.join([title, lead, row, figure])
    def shown():
        yield dict(cells[0], source=first)
        for i, cell in enumerate(cells[1:]):
            text = ''.join(cell['source'])
            if text.startswith('## The notebooks'): cell = dict(cell, source=contents(stage, text))
            yield cell
            if i == 0: yield markdown('\n\n'.join(rest), 'demo')
    trees = [toctree(shelf, [f'{c.number} · {c.title} <{c.page}>' for c in found]) for shelf, found in shelves(stage).items()]
    data = [page for name, page in stage.guides.items() if name.startswith('data/')]
    trees += [toctree('guides', [page for page in stage.guides.values() if page not in data]),
              toctree('data and checkpoints', data), toctree('reference', ['All names <reference/index>',
                *(f'{shelf} <reference/{shelf}>' for shelf in shelves(stage))])]
    body = list(staged_cells(stage, source, page, shown()))
    body.append(markdown('\n\n'.join(trees), 'toctrees'))
    stage.put('index.ipynb', notebook(body))

def described(stage, node, code, name):
    "Docstring, remarks on arguments, and what is returned, as fields"
    def say(text):
        text = re.sub(r'''(?<![\w`])('[^'`]*'|"[^"`]*")(?![\w`])''', r'`\1`', text)  # a value is code, and no quotation
        return stage.prose(text, '', 'reference/', ({name.chapter.module}, set()))
    doc = textwrap.dedent(ast.get_docstring(node) or '')
    init = next((n for n in getattr(node, 'body', []) if getattr(n, 'name', '') == '__init__'), None)
    spoken = init if isinstance(node, ast.ClassDef) and init else node
    args, returned = ([], '') if isinstance(node, ast.ClassDef) and not init and not is_dataclass(node) else arguments(spoken, code)
    fields = [f':param {n}: {say(text)}'.replace('*', r'\*', n.count('*')) for n, text in args if text]
    origin = f'Explained in [{name.chapter.number} · {name.chapter.title}](#{name.anchor}).' if node is name.node else ''
    return rows(say(doc), '', *([origin, ''] if origin else []), *fields, *([f':returns: {say(returned)}'] if returned else []), '')

def entry(stage, name):
    "A name of the reference, with the way to the cell that explains it"
    node = name.node
    text = described(stage, node, name.code, name)
    if isinstance(node, ast.FunctionDef):
        return rows(f'::::{{py:function}} {name.name}{signature(node)}', '', text, '::::', '')
    init = next((n for n in node.body if getattr(n, 'name', '') == '__init__'), None)
    how = signature(init) if init else signature(node) if is_dataclass(node) else ''
    members = []
    for n in node.body:
        if not isinstance(n, ast.FunctionDef) or n.name.startswith('_') and n.name != '__call__': continue
        if not ast.get_docstring(n) and n.name not in ('forward', '__call__', 'encode', 'decode'): continue
        marks = [ast.unparse(d) for d in n.decorator_list]
        kind = 'property' if 'property' in marks or any('cached_property' in m for m in marks) else 'method'
        options = [f':{m}:' for m in ('classmethod', 'staticmethod') if m in marks]
        shown = n.name + ('' if kind == 'property' else signature(n))
        if kind == 'property' and n.returns: options.append(f':type: {ast.unparse(n.returns)}')
        members += [f':::{{py:{kind}}} {shown}', *options, '', described(stage, n, name.code, name), ':::', '']
    bases = [ast.unparse(b) for b in node.bases]
    return rows(f'::::{{py:class}} {name.name}{how}', '', text, *([f'Bases: {", ".join(f"`{b}`" for b in bases)}', ''] if bases else []),
                *members, '::::', '')

def stage_reference(stage):
    "A page for each shelf, and one with all names"
    table = []
    for shelf, found in shelves(stage).items():
        lines = [f'# `{shelf}`', '', f'The public names of `v2flow_nbdev.{shelf}`, chapter by chapter.', '']
        for c in found:
            public, internal = ([n for n in c.names if n.public is p] for p in (True, False))
            if not c.names: continue
            lines += [f'## {c.number} · {c.title}', '', f'```{{py:module}} {c.module}', '```', '',
                      f'`{c.module}`, written in [{c.path.stem}](../{c.page}.ipynb)', '']
            for n in public:
                doc = (ast.get_docstring(n.node) or '').replace('\n', ' ')
                lines += [entry(stage, n)]
                short = stage.prose(doc, '', 'reference/', ({c.module}, set())).replace('|', r'\|')
                table.append(f'| {{py:obj}}`{n.name} <{n.full}>` | {short} | [{c.number}](#{n.anchor}) |')
            if internal: lines += ['Internal: ' + ', '.join(f'[`{n.name}`](#{n.anchor})' for n in internal) + '.', '']
        stage.put(f'reference/{shelf}.md', '\n'.join(lines))
    stage.put('reference/index.md', rows('# Reference', '',
        'Every public name, with its docstring and the number of the chapter whose cell explains it. Where inline code in a chapter '
        'is such a name, it leads here.', '', '| name | what it is | chapter |', '|---|---|---|', *table, ''))

def math_font(stage):
    "STIX Two Math (SIL Open Font License), which the wheel `ziamath` carries, cut down to what equations use"
    from importlib.util import find_spec
    from io import BytesIO
    from fontTools import subset
    options = subset.Options(flavor='woff2', layout_features=['*'], notdef_outline=True)
    font = subset.load_font(Path(find_spec('ziamath').origin).parent/'fonts/STIXTwoMath-Regular.ttf', options)
    cut = subset.Subsetter(options)
    wanted = [*range(0x20, 0x180), *range(0x300, 0x370), *range(0x370, 0x400), *range(0x2000, 0x2070), *range(0x2100, 0x2250),
              *range(0x2260, 0x22FF), *range(0x23B0, 0x23E2), *range(0x27E6, 0x27EC), *range(0x1D400, 0x1D7FF)]
    cut.populate(unicodes=wanted)
    cut.subset(font)
    subset.save_font(font, out := BytesIO(), options)
    stage.put('_static/stix-two-math.woff2', out.getvalue())

def stage_all(folder):
    stage = Stage(folder)
    for c in stage.chapters: stage_chapter(stage, c)
    for name, page in stage.guides.items(): stage_guide(stage, name, page)
    stage_front(stage)
    stage_reference(stage)
    math_font(stage)
    for name in ('style.css', 'icon.svg'): stage.put(f'_static/{name}', (book.root/'docs/site'/name).read_bytes())
    for path in [*(c.path for c in stage.chapters), root/'nbs/index.ipynb']:
        stage.put(f'extra/notebooks/{path.name}', path.read_bytes())
    return stage

def main(folder='_docs'):
    from sphinx.cmd.build import main as sphinx
    folder = root/folder
    # all anew: a page that is not read again would keep its warnings to itself
    for part in ('source', 'doctrees', 'html'): shutil.rmtree(folder/part, ignore_errors=True)
    stage_all(folder/'source')
    code = sphinx(['-b', 'html', '-q', '-W', '--keep-going', '-c', str(root/'docs/site'), '-d', str(folder/'doctrees'),
                   '-D', f'html_static_path={folder}/source/_static', '-D', f'html_extra_path={folder}/source/extra',
                   str(folder/'source'), str(folder/'html')])
    if code == 0: print(f'the site is in {folder/"html"}: open {folder/"html"/"index.html"}')
    return code

if __name__ == '__main__': sys.exit(main(*sys.argv[1:]))
