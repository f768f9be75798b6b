"Notebooks away from the clone: an empty folder, the installed wheel, and a stand-in for the Hub. All of them: tests/run_anywhere.py"
import json, os
import pytest
from conftest import root
from hub_stand_in import Hub
from run_anywhere import anywhere, serve

def notebook(path, *sources):
    cells = [dict(cell_type='code', id=f'c{i}', metadata={}, execution_count=None, outputs=[], source=s) for i, s in enumerate(sources)]
    path.write_text(json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)))
    return path

@pytest.fixture(scope='module')
def hub():
    with Hub() as hub:
        serve(hub)
        yield hub

def said(process):
    out, _ = process.communicate(timeout=900)
    return process.returncode, out

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='notebooks run in forks')
def test_notebooks_run_with_the_wheel_alone_and_data_of_the_hub(installed, hub, tmp_path):
    "One that finds data, one with a checkpoint, one with configs and logs; every cell, the first and the last too"
    names = ['base/02_files', 'models/10_tokenizer_config', 'training/49_text_recipes']
    code, out = said(anywhere([root/f'nbs/{n}.ipynb' for n in names], tmp_path, None, hub, installed))
    assert code == 0 and '3 of 3 notebooks ran' in out and 'left behind' not in out, out
    sent = hub.got()
    assert len(sent) == len(set(sent)) and 'configs/digits-text.yaml' in sent and len(sent) < 25, 'by name, and once'

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='notebooks run in forks')
def test_what_needs_the_clone_fails(installed, hub, tmp_path):
    "The run would see it: a file of the clone, a path upwards, a cell that other runs skip"
    bad = [notebook(tmp_path/'clone.ipynb', f'open({str(root/"README.md")!r})'),
           notebook(tmp_path/'upwards.ipynb', "open('../../data/README.md')"),
           notebook(tmp_path/'skipped.ipynb', '#| eval: false\n1/0'), notebook(tmp_path/'good.ipynb', 'import v2flow_nbdev')]
    (tmp_path/'place').mkdir()
    code, out = said(anywhere(bad, tmp_path/'place', None, hub, installed))
    assert code == 1 and '1 of 4 notebooks ran' in out and 'failed: clone.ipynb, skipped.ipynb, upwards.ipynb' in out, out
    assert 'README.md is of the clone' in out and 'ZeroDivisionError' in out
