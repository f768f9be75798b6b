"""Are the notebooks clean, executed and small, and are library and README in step with them? Prints what is not, and exits with 1.

    python tests/check_notebooks.py                   check
    python tests/check_notebooks.py --execute [NAME]  run notebooks top to bottom in fresh kernels, keep outputs, clean
    python tests/check_notebooks.py --write-readme    write README.md from nbs/index.ipynb"""
import filecmp, json, os, re, shutil, subprocess, sys
from pathlib import Path
from tempfile import TemporaryDirectory

root = Path(__file__).parent.parent

def notebooks():
    "All of them, shelf by shelf"
    return sorted(p for p in (root/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)

tools = Path(sys.executable).parent

# of every notebook; `#| hide`: the site leaves it out
first_cell = """#| hide
# Where the package is missing, as in Colab, it is installed with all that the notebooks import: from GitHub, for no index has it yet
import importlib.util, subprocess, sys
if importlib.util.find_spec('v2flow_nbdev') is None:
    subprocess.run([sys.executable, '-m', 'pip', 'install', '--quiet',
                    'v2flow_nbdev[notebooks] @ git+https://github.com/v2flow-nbdev/v2flow-nbdev'], check=True)"""
# of all but the front page
last_cell = """#| hide
import nbdev
if nbdev.config.is_nbdev(): nbdev.nbdev_export()  # in a clone"""

def fault(path):
    "Why a notebook cannot be read at all, in a line that names it; None where it can"
    name = path.relative_to(root).as_posix()
    try: content = json.loads(text := path.read_text(encoding='utf-8'))
    except UnicodeDecodeError: return f'{name} is not UTF-8'
    except ValueError as e:
        return f'{name} holds a merge conflict: resolve it' if re.search('^(<<<<<<<|>>>>>>>)', text,
            re.M) else f'{name} is not JSON ({e})'
    if not isinstance(content, dict) or not isinstance(content.get('cells'), list):
        return f'{name} is no notebook: it has no cells'

def read(path):
    "The content of a notebook; ends the program with a line if it cannot be read"
    if why := fault(path): sys.exit(why)
    return json.loads(path.read_text(encoding='utf-8'))

def readme():
    "README.md: the text cells of the front page without its glossary, links seen from the repository's root"
    cells = read(root/'nbs/index.ipynb')['cells']
    text = '\n\n'.join(''.join(c['source']).strip() for c in cells if c['cell_type'] == 'markdown')
    text = text.split('\n## Glossary')[0].rstrip()
    text = text.replace('](../', '](')
    return re.sub(r'\]\(((?:\w+/)?\w+\.ipynb)', r'](nbs/\1', text) + '\n'

def execute(names):
    for path in notebooks():
        if names and path.stem not in names: continue
        read(path)
        print(path.stem, flush=True)
        subprocess.run([tools/'jupyter', 'nbconvert', '--to', 'notebook', '--execute', '--inplace', '--log-level',
                        'ERROR', path], check=True, cwd=path.parent)
        content = json.loads(path.read_text(encoding='utf-8'))
        for output in (o for c in content['cells'] for o in c.get('outputs', [])):
            # PIL images come twice; one is enough
            if 'image/png' in output.get('data', {}): output['data'].pop('image/jpeg', None)
        content['metadata'].pop('widgets', None)
        path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + '\n', encoding='utf-8')
        subprocess.run([tools/'nbdev_clean', '--fname', path], check=True, cwd=root)

def problems():
    faults = [why for path in notebooks() if (why := fault(path))]
    yield from faults
    if faults: return  # the tools below would stop at the first of these, and not say which
    with TemporaryDirectory() as tmp:
        copy = Path(tmp)/'copy'; copy.mkdir()
        for name in ('nbs', 'v2flow_nbdev'):
            shutil.copytree(root/name, copy/name, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'))
        for name in ('settings.ini', 'setup.py', 'README.md'): shutil.copy(root/name, copy/name)
        for tool in ('nbdev_clean', 'nbdev_export'):
            subprocess.run([tools/tool], check=True, cwd=copy, stdout=subprocess.DEVNULL)
        def differ(folder, pattern):
            ours, theirs = ({p.relative_to(base).as_posix(): p for p in (base/folder).rglob(pattern)
                             if '.ipynb_checkpoints' not in p.parts} for base in (root, copy))
            return sorted(n for n in ours.keys() | theirs.keys() if n not in ours or n not in theirs
                          or not filecmp.cmp(ours[n], theirs[n], shallow=False))
        for name in differ('nbs', '*.ipynb'): yield f'{name} is not clean: run nbdev_clean'
        for name in differ('v2flow_nbdev', '*.py'): yield f'{name} is not what the notebooks export: run nbdev_export'
    for path in notebooks():
        name = path.relative_to(root).as_posix()
        cells = [c for c in json.loads(path.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code']
        outputs = [o for c in cells for o in c['outputs']]
        sources = [''.join(c['source']) for c in cells]
        if sources[:1] != [first_cell]: yield f'{name}: its first code cell is not `first_cell` of tests/check_notebooks.py: copy it'
        if path.stem != 'index' and sources[-1:] != [last_cell]: yield f'{name}: its last cell is not `last_cell` of tests/check_notebooks.py'
        if cells and not outputs: yield f'{name} has no outputs: execute it'
        if any(o['output_type'] == 'error' for o in outputs): yield f'{name} holds an error'
        if any(o.get('name') == 'stderr' for o in outputs): yield f'{name} prints on stderr'
        if path.stat().st_size > 300_000: yield f'{name} is {path.stat().st_size//1000} kB; keep it under 300'
    if (root/'README.md').read_text(encoding='utf-8') != readme():
        yield 'README.md is not what nbs/index.ipynb says: run make readme'

if __name__ == '__main__':
    if sys.argv[1:2] == ['--execute']: execute(sys.argv[2:])
    elif sys.argv[1:] == ['--write-readme']: (root/'README.md').write_text(readme(), encoding='utf-8')
    else:
        found = list(problems())
        print('\n'.join(found) or 'notebooks are clean; library and README are in step with them')
        sys.exit(bool(found))
