"`make test` runs every notebook in a fork of one process: fails where one fails, and shares nothing but imports"
import ast, json, re, subprocess, sys
from configparser import ConfigParser
from importlib.metadata import packages_distributions
from unittest.mock import patch
import pytest
from check_notebooks import first_cell, last_cell, notebooks
from conftest import root

def notebook(path, *sources):
    cells = [dict(cell_type='code', id=f'c{i}', metadata={}, execution_count=None, outputs=[], source=s)
             for i, s in enumerate(sources)]
    path.write_text(json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)))
    return path

def run(*paths):
    return subprocess.run([sys.executable, root/'tests/run_notebooks.py', *paths], capture_output=True, text=True)

def test_a_broken_notebook_fails_and_says_where(tmp_path):
    good = notebook(tmp_path/'good.ipynb', "import json, os\nassert os.getcwd() == " + repr(str(tmp_path)),
                    'json.marked = left = 1', '#| eval: false\n1/0')
    bad = notebook(tmp_path/'bad.ipynb', 'import json\nfound = "left" in globals() or hasattr(json, "marked")',
                   'assert not found', 'assert 1 == 2, "one is not two"', 'open("after", "w")')
    killed = notebook(tmp_path/'killed.ipynb', 'import os\nos.kill(os.getpid(), 9)')
    done = run(good, bad, killed)
    assert done.returncode == 1 and done.stdout == 'failed: bad.ipynb, killed.ipynb\n', done.stdout + done.stderr
    assert f'AssertionError in {bad}' in done.stderr and 'Cell #3' in done.stderr and 'one is not two' in done.stderr
    assert not (tmp_path/'after').exists() and str(good) not in done.stderr

def test_all_notebooks_are_run():
    "The front page too; those that begin first exist"
    import run_notebooks
    names = [p.stem for p in notebooks()]
    assert 'index' in names and set(run_notebooks.longest) <= set(names)
    assert 'tests/run_notebooks.py\n' in (root/'Makefile').read_text()

# away from the clone

def code_of(path): return [''.join(c['source']) for c in json.loads(path.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code']

def parsed(path): return [ast.parse(code) for code in code_of(path)]

def test_every_notebook_begins_with_the_cell_that_installs_what_is_missing():
    assert not [p.name for p in notebooks() if code_of(p)[0] != first_cell or code_of(p).count(first_cell) > 1]
    assert not [p.name for p in notebooks() if p.stem != 'index' and code_of(p)[-1] != last_cell]

def test_the_first_cell_installs_where_the_package_is_missing_and_nothing_else():
    settings = ConfigParser(delimiters=['=']); settings.read(root/'settings.ini', encoding='utf-8')
    with patch('subprocess.run') as run: exec(first_cell, {})
    assert not run.called
    with patch('subprocess.run') as run, patch('importlib.util.find_spec', return_value=None): exec(first_cell, {})
    (command,), how = run.call_args
    assert command[:4] == [sys.executable, '-m', 'pip', 'install'] and how == dict(check=True)
    assert command[-1] == f"v2flow_nbdev[notebooks] @ git+{settings['DEFAULT']['git_url']}"

def test_the_last_cell_does_nothing_outside_of_a_clone(tmp_path):
    "nbdev's tests skip it; whoever runs all cells in Colab does not"
    done = subprocess.run([sys.executable, '-c', last_cell], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr and not list(tmp_path.iterdir()), done.stderr

def test_what_is_installed_is_all_that_notebooks_import():
    "Besides what every notebook's kernel has"
    settings = ConfigParser(delimiters=['=']); settings.read(root/'settings.ini', encoding='utf-8')
    lists = [settings['DEFAULT'][f'{k}requirements'] for k in ('', 'extra_', 'app_', 'notebook_')]
    known = {re.split('[<>=]', n)[0].lower().replace('_', '-') for n in ' '.join(lists).split()}
    # a browser's screenshots are optional; the rest comes with what is listed: the kernel, `torch`, `transformers`, `gradio`
    known |= {'playwright', 'ipython', 'tokenizers', 'fastapi', 'uvicorn', 'triton', 'v2flow-nbdev'}
    owners, missing = packages_distributions(), set()
    for path in notebooks():
        for node in (n for tree in parsed(path) for n in ast.walk(tree)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(
                node, ast.ImportFrom) and not node.level else []
            for name in {n.split('.')[0] for n in names} - set(sys.stdlib_module_names) - {'v2flow_nbdev'}:
                if not {d.lower().replace('_', '-') for d in owners.get(name, [name])} & known: missing.add((path.stem, name))
    assert not missing, missing

def test_notebooks_take_data_by_names_that_the_package_knows():
    "`find_data` and models of the project, wherever the working directory is: no path leads upwards"
    from v2flow_nbdev.base.files import known_files
    unknown, upwards = [], []
    for path in notebooks():
        for code, tree in zip(code_of(path), parsed(path)):
            if code.startswith('#| export'): continue
            upwards += [path.stem for l in code.splitlines() if re.search(r"""['"](\.\./)+(data|configs|benchmarks|nbs|tests)\b|['"](\.\./)*\.\.['"]""", l)]
            for node in ast.walk(tree):
                if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r'(data|configs|benchmarks)/\S+', node.value):
                    if not known_files(node.value.rstrip('/')): unknown.append((path.stem, node.value))
                if isinstance(node, ast.Call) and getattr(node.func, 'id', '') == 'find_data' and isinstance(node.args[0], ast.Constant):
                    name = node.args[0].value
                    if not known_files(name) and not known_files(f'data/{name}'): unknown.append((path.stem, name))
    # said to be missing; a file of a data set on the Hub
    assert not upwards and {u for u in unknown if u[1] not in ('checkpoints/emojis',)} == set()

# exercises

def exercises(path):
    "Numbers of the exercises that a notebook sets, and the cells that answer them: (number or '1', source)"
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    texts = [(c['cell_type'], ''.join(c['source'])) for c in cells]
    start = next((i for i, (kind, s) in enumerate(texts) if kind == 'markdown' and re.search('^## Exercises?$', s, re.M)), None)
    if start is None: return [], []
    after = re.split('^## Exercises?$', texts[start][1], flags=re.M)[1]
    asked = '\n'.join([after, *(s for kind, s in texts[start + 1:] if kind == 'markdown')])
    numbers = re.findall(r'^\**(\d+)\.', asked, re.M) or ['1']
    answers = [(m[1] or '1', s) for kind, s in texts[start:] if kind == 'code'
               and (m := re.search(r'^# Answer(?: (\d+))?\b', s, re.M))]
    return numbers, answers

def test_every_exercise_has_an_answer_that_is_run():
    "A cell of code, which every run of the notebooks executes, folded on the site; what is to be said is a comment in it"
    found = {p.stem: exercises(p) for p in notebooks()}
    assert sum(len(n) for n, _ in found.values()) > 120
    for name, (numbers, answers) in found.items():
        assert numbers == [n for n, _ in answers], (name, numbers, [n for n, _ in answers])
        for _, code in answers:
            assert code.startswith('#| code-fold: true\n# Answer'), (name, code[:80])
            assert not re.search(r'^#\| *(eval: *false|notest)', code, re.M), (name, code[:80])
    run = [code for _, answers in found.values() for _, code in answers if ast.parse(code).body]
    assert len(run) > 100, 'most answers compute something'
    assert not [p.name for p in notebooks() if '<details' in p.read_text(encoding='utf-8')]
