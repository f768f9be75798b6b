"The house: arrows point one way, the library is light, the wheel stands alone"
import ast, json, re, subprocess, sys
from pathlib import Path
import pytest
from conftest import root, shipped

lib = root/'v2flow_nbdev'
notebooks = sorted(p for p in (root/'nbs').glob('*/[0-9]*.ipynb') if '.ipynb_checkpoints' not in p.parts)
numbers = {f'{path.parent.name}.{path.stem[3:]}': int(path.name[:2]) for path in notebooks}          # module → its place in the row
shelves = ['base', 'models', 'language', 'data', 'training', 'evaluation', 'systems', 'apps']

def imports_of(path):
    "(module of this library, name) of all that a module imports, anywhere in its code"
    here = path.relative_to(lib.parent).with_suffix('').parts
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            for a in node.names:
                if a.name.startswith('v2flow_nbdev'): yield a.name.removeprefix('v2flow_nbdev').strip('.'), None
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or '').startswith('v2flow_nbdev')):
            whole = '.'.join([*here[:len(here) - node.level], *filter(None, [node.module])]) if node.level else node.module
            name = whole.removeprefix('v2flow_nbdev').strip('.')
            for a in node.names: yield (name, a.name) if name in numbers else (f'{name}.{a.name}'.strip('.'), None)

def test_every_module_has_its_notebook():
    modules = {f'{p.parent.name}.{p.stem}' for p in lib.glob('*/[a-z]*.py')}
    assert modules == set(numbers) and {m.split('.')[0] for m in modules} <= set(shelves) and not list(lib.glob('[a-z]*.py'))
    for path in notebooks: assert f'#| default_exp {path.parent.name}.{path.stem[3:]}\n' in ''.join(''.join(c['source']) + '\n' for c in json.loads(path.read_text(encoding='utf-8'))['cells']), path
    assert len(set(numbers.values())) == len(numbers)
    order = [name.split('.')[0] for name, _ in sorted(numbers.items(), key=lambda i: i[1])]
    assert order == sorted(order, key=shelves.index), 'numbers run through the shelves, one after another'

def test_no_import_points_to_an_equal_or_larger_number():
    for name, number in numbers.items():
        for other, what in imports_of(lib/f'{name.replace(".", "/")}.py'): assert numbers[other] < number, f'{name} ({number}) imports {what} of {other} ({numbers[other]})'

def test_nobody_imports_an_underscore_of_another_module():
    for name in numbers:
        for other, what in imports_of(lib/f'{name.replace(".", "/")}.py'): assert not (what or '').startswith('_'), f'{name} imports {what} of {other}'

light = 'torch einops transformers numpy safetensors huggingface_hub tqdm yaml'.split()
heavy = 'PIL sklearn skimage torchmetrics gradio fastapi uvicorn playwright torchvision accelerate datasets diffusers matplotlib scipy psutil pyarrow pandas tensorboard peft emoji fastcore nbdev execnb typer IPython pytest vector_quantize_pytorch'.split()

def test_library_imports_with_the_packages_of_the_design_alone():
    modules = [f'v2flow_nbdev.{n}' for n in numbers if not n.startswith('apps.')]
    code = f'''
import importlib, importlib.util, sys
import {', '.join(light)}
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {heavy!r}: raise ImportError('blocked: ' + name)
before = set(sys.modules)
sys.meta_path.insert(0, Block())
for m in [m for m in sys.modules if m.split('.')[0] in {heavy!r}]: del sys.modules[m]
for m in {modules!r}: importlib.import_module(m)
found = [m for m in {heavy!r} if m in sys.modules]
assert not found, found
'''
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

@pytest.mark.parametrize('args', [['--help'], ['train-llm', '--help'], ['generate']])
def test_help_imports_nothing_heavy(args):
    "That is why it answers within a second; a clock would measure what else the machine does"
    code = "import sys, v2flow_nbdev.apps.cli as cli\ntry: cli.main()\nfinally: print('heavy:', {'torch', 'transformers', 'numpy', 'PIL', 'yaml'} & set(sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, '-c', code, *args], capture_output=True, text=True)
    assert done.returncode == (0 if args[-1] == '--help' else 2) and done.stderr.strip().splitlines()[-1] == 'heavy: set()', done.stderr

def test_wheel_stands_alone(tmp_path):
    "Built, installed elsewhere without the repository, and imported from there"
    build = [sys.executable, '-m', 'build', '--wheel', '--no-isolation', '--outdir', tmp_path, root]
    done = subprocess.run(build, capture_output=True, text=True); assert done.returncode == 0, done.stderr[-2000:]
    wheel, = tmp_path.glob('*.whl')
    site = tmp_path/'site'
    subprocess.run([sys.executable, '-m', 'pip', 'install', '--quiet', '--no-deps', '--target', site, wheel], check=True, capture_output=True)
    code = f"import sys; sys.path.insert(0, {str(site)!r}); import v2flow_nbdev.language.pipeline as p, v2flow_nbdev.apps.cli; print(p.__file__); p.V2FlowPipeline.from_pretrained({str(shipped)!r})"
    done = subprocess.run([sys.executable, '-P', '-c', code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith(str(site)), done.stderr

def test_public_names_have_docstrings():
    for path in lib.glob('*/[a-z]*.py'):
        tree = ast.parse(path.read_text(encoding='utf-8'))
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith('_') and path.stem != 'cli':
                one_liner = isinstance(node, ast.FunctionDef) and node.lineno == node.end_lineno
                assert ast.get_docstring(node) or one_liner, f'{path.name}: {node.name}'

def test_nothing_pickled_is_shipped():
    kinds = {p.suffix for p in (root/'data').rglob('*') if p.is_file() and '__pycache__' not in p.parts}
    assert kinds <= {'.safetensors', '.json', '.jsonl', '.md', '.png', '.parquet', '.py', '.txt'}, kinds

def test_shipped_checkpoint_is_small():
    assert sum(p.stat().st_size for p in shipped.rglob('*.safetensors')) < 5*2**20
