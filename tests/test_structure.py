"The house: arrows point one way, the library is light, the wheel stands alone"
import ast, json, re, subprocess, sys
from pathlib import Path
import pytest
from conftest import root, shipped

lib = root/'v2flow_nbdev'
numbers = {m.group(1): int(path.name[:2]) for path in (root/'nbs').glob('[0-9]*.ipynb')
           if (m := re.search(r'#\| default_exp (\w+)', path.read_text(encoding='utf-8')))}

def imports_of(path):
    "Modules of this library that a module imports, anywhere in its code"
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or '').startswith('v2flow_nbdev')):
            yield (node.module or '').removeprefix('v2flow_nbdev').strip('.').split('.')[0]

def test_every_module_has_its_notebook():
    assert {p.stem for p in lib.glob('[a-z]*.py')} == set(numbers)

def test_no_import_points_to_a_higher_number():
    for name, number in numbers.items():
        for other in imports_of(lib/f'{name}.py'): assert numbers[other] < number, f'{name} ({number}) imports {other} ({numbers[other]})'

light = 'torch einops transformers numpy safetensors huggingface_hub tqdm yaml'.split()
heavy = 'PIL sklearn skimage torchmetrics gradio fastapi uvicorn playwright torchvision accelerate datasets diffusers matplotlib scipy psutil pyarrow pandas tensorboard peft emoji fastcore nbdev execnb typer IPython pytest vector_quantize_pytorch'.split()

def test_library_imports_with_the_packages_of_the_design_alone():
    modules = [f'v2flow_nbdev.{n}' for n in numbers if n not in ('cli', 'app')]
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
    code = "import sys, v2flow_nbdev.cli as cli\ntry: cli.main()\nfinally: print('heavy:', {'torch', 'transformers', 'numpy', 'PIL', 'yaml'} & set(sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, '-c', code, *args], capture_output=True, text=True)
    assert done.returncode == (0 if args[-1] == '--help' else 2) and done.stderr.strip().splitlines()[-1] == 'heavy: set()', done.stderr

def test_wheel_stands_alone(tmp_path):
    "Built, installed elsewhere without the repository, and imported from there"
    build = [sys.executable, '-m', 'build', '--wheel', '--no-isolation', '--outdir', tmp_path, root]
    done = subprocess.run(build, capture_output=True, text=True); assert done.returncode == 0, done.stderr[-2000:]
    wheel, = tmp_path.glob('*.whl')
    site = tmp_path/'site'
    subprocess.run([sys.executable, '-m', 'pip', 'install', '--quiet', '--no-deps', '--target', site, wheel], check=True, capture_output=True)
    code = f"import sys; sys.path.insert(0, {str(site)!r}); import v2flow_nbdev.pipeline as p, v2flow_nbdev.cli; print(p.__file__); p.V2FlowPipeline.from_pretrained({str(shipped)!r})"
    done = subprocess.run([sys.executable, '-P', '-c', code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith(str(site)), done.stderr

def test_public_names_have_docstrings():
    for path in lib.glob('[a-z]*.py'):
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
