"`make test` runs every notebook in a fork of one process: fails where one fails, and shares nothing but imports"
import json, subprocess, sys
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
    sys.path.insert(0, str(root/'tests'))
    try: import check_notebooks, run_notebooks
    finally: sys.path.pop(0)
    names = [p.stem for p in check_notebooks.notebooks()]
    assert 'index' in names and set(run_notebooks.longest) <= set(names)
    assert 'tests/run_notebooks.py\n' in (root/'Makefile').read_text()
