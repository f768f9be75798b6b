"""What the site is made of, read from the notebooks and pages as they lie there: chapters in reading order, the names each
one defines with their remarks, and where a link leads. Needs the standard library alone, and imports nothing of ours."""
import ast, io, json, re, tokenize
from configparser import ConfigParser
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path

root = Path(__file__).resolve().parents[2]

def settings():
    "The section of `settings.ini`"
    config = ConfigParser(delimiters=['='])
    config.read(root/'settings.ini', encoding='utf-8')
    return config['DEFAULT']

directive = re.compile(r'^#\| *([\w-]+):? *(.*?) *$', re.M)

@dataclass
class Name:
    "A function or class that a chapter's cell puts into the library"
    name:str
    node:ast.AST   # its definition
    code:str       # source of the cell
    public:bool    # from an `#| export` cell: in `__all__`
    chapter:'Chapter'

    @property
    def full(self): return f'{self.chapter.module}.{self.name}'

    @property
    def anchor(self):
        "Of its cell; as Sphinx would make it: small letters and no underscore"
        return re.sub('_+', '-', f"{'class' if isinstance(self.node, ast.ClassDef) else 'def'}-{self.name}").lower()

@dataclass
class Chapter:
    "A notebook, which is a module"
    path:Path
    cells:list = field(repr=False)

    @property
    def shelf(self): return self.path.parent.name
    @property
    def number(self): return self.path.name[:2]
    @property
    def page(self): return f'{self.shelf}/{self.path.stem}'
    @property
    def module(self): return f'v2flow_nbdev.{self.shelf}.{self.path.stem[3:]}'
    @property
    def first(self): return ''.join(self.cells[0]['source'])
    @property
    def title(self): return self.first.split('\n')[0].removeprefix('# ')
    @property
    def subtitle(self): return next((l.removeprefix('> ') for l in self.first.split('\n') if l.startswith('> ')), '')

    @cached_property
    def names(self):
        "All that the exported cells define at their top level, cell by cell"
        return [name for cell in self.cells for name in self.names_of(cell)]

    def names_of(self, cell):
        code = ''.join(cell['source'])
        kind = dict(directive.findall(code)) if cell['cell_type'] == 'code' else {}
        if 'export' not in kind and 'exporti' not in kind: return []
        nodes = (n for n in ast.parse(code).body if isinstance(n, (ast.FunctionDef, ast.ClassDef)))
        return [Name(n.name, n, code, 'export' in kind, self) for n in nodes if not n.name.startswith('_')]

    @cached_property
    def known(self):
        "Modules whose names its cells import, and single names: what inline code may speak of without saying whose it is"
        code = '\n'.join(''.join(c['source']) for c in self.cells if c['cell_type'] == 'code')
        pairs = re.findall(r'^from v2flow_nbdev(?:\.([\w.]+))? import (.+)', code, re.M)
        return ({self.module} | {f'v2flow_nbdev.{m}' for m, what in pairs if what.strip() == '*'},
                {n.strip() for _, what in pairs for n in what.split(',')})

@cache
def chapters():
    "All notebooks but the front page, in reading order: numbers run through the shelves"
    paths = sorted((root/'nbs').glob('*/[0-9]*.ipynb'), key=lambda p: p.name)
    return [Chapter(p, json.loads(p.read_text(encoding='utf-8'))['cells']) for p in paths]

def guides():
    "Markdown pages of the project → their page on the site, those of `docs/` first; the README is the front page"
    own = ['docs/training.md', 'docs/long_runs.md', 'docs/departures.md', 'benchmarks/README.md']
    found = [p.relative_to(root).as_posix() for folder in ('', 'docs', 'docs/site', 'benchmarks', 'configs')
             for p in sorted((root/folder).glob('*.md'))]
    found += [p.relative_to(root).as_posix() for p in sorted((root/'data').rglob('README.md'))]
    order = [n for n in own if n in found] + [n for n in found if n not in own and n != 'README.md']
    def page(name): return re.sub(r'[/.]', '-', re.sub(r'^docs/|/?README\.md$|\.md$', '', name)).lower()
    return {name: f'guide/{page(name)}' for name in order}

def remarks(code):
    "Line → the comment that ends it"
    tokens = tokenize.generate_tokens(io.StringIO(code).readline)
    return {t.start[0]: t.string.lstrip('# ').rstrip() for t in tokens if t.type == tokenize.COMMENT}

def arguments(node, code):
    "(argument, remark) of a function, or of a dataclass' fields, and what is returned: docments, as nbdev reads them"
    said = remarks(code)
    if isinstance(node, ast.ClassDef):
        return [(n.target.id, said.get(n.end_lineno, '')) for n in node.body if isinstance(n, ast.AnnAssign)
                and not ast.unparse(n.annotation).startswith('ClassVar')], ''
    a = node.args
    every = [*a.posonlyargs, *a.args, *([a.vararg] if a.vararg else []), *a.kwonlyargs, *([a.kwarg] if a.kwarg else [])]
    every = [x for x in every if x.arg not in ('self', 'cls')]
    ends = {x.arg: d.end_lineno for x, d in [*zip(reversed([*a.posonlyargs, *a.args]), reversed(a.defaults)),
                                             *zip(a.kwonlyargs, a.kw_defaults)] if d}
    last = node.returns.end_lineno if node.returns else 0
    lines = {x.arg: ends.get(x.arg, x.end_lineno) for x in every}
    stars = {x.arg: s + x.arg for x, s in ((a.vararg, '*'), (a.kwarg, '**')) if x}
    return ([(stars.get(n, n), said.get(l, '') if l != last else '') for n, l in lines.items()],
            said.get(last, '') if node.returns else '')

def signature(node):
    "Arguments and result of a function as written; of a dataclass, its fields"
    if isinstance(node, ast.FunctionDef):
        args = ast.parse(f'def f({ast.unparse(node.args)}): 0').body[0].args
        for part in (args.posonlyargs, args.args):
            if part and part[0].arg in ('self', 'cls'): del part[0]; break
        return f'({ast.unparse(args)})' + (f' -> {ast.unparse(node.returns)}' if node.returns else '')
    fields = [n for n in node.body if isinstance(n, ast.AnnAssign) and not ast.unparse(n.annotation).startswith('ClassVar')]
    def default(v):
        factory = [ast.unparse(k.value) for k in getattr(v, 'keywords', []) if k.arg == 'default_factory']
        return f'{factory[0]}()' if factory and not factory[0].startswith('lambda') else factory[0].partition(': ')[2] if factory else ast.unparse(v)
    return '(' + ', '.join(f'{n.target.id}: {ast.unparse(n.annotation)}' + (f' = {default(n.value)}' if n.value else '')
                           for n in fields) + ')'

def is_dataclass(node): return any('dataclass' in ast.unparse(d) for d in node.decorator_list)

def address(target, suffix=''):
    "Where a file or folder of the repository is read on the web; suffix `edit` for its editor"
    kind = suffix or ('tree' if (root/target).is_dir() else 'blob')
    return f"{settings()['git_url']}/{kind}/{settings()['branch']}/{target}"
