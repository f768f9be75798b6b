"The page as a Space: its card, its pinned requirements, and that it starts"
import http.client, json, os, re, shutil, signal, subprocess, sys
from configparser import ConfigParser
from pathlib import Path
import pytest
from conftest import root, shipped

space = root/'space'
settings = ConfigParser(delimiters=['=']); settings.read(root/'settings.ini', encoding='utf-8'); settings = settings['DEFAULT']

def normal(name): return re.sub('[-_.]+', '-', name).lower()

def pins(path): return {normal(n): v for n,v in re.findall(r'^([\w.-]+)==(\S+)$', path.read_text(encoding='utf-8'), re.M)}

def test_the_card_is_one_that_the_hub_reads():
    from huggingface_hub import SpaceCard
    card = SpaceCard.load(space/'README.md').data
    assert (card.sdk, card.license) == ('gradio', 'apache-2.0') and (space/card.app_file).is_file()
    assert card.sdk_version == pins(root/'constraints.txt')['gradio'] == pins(space/'requirements.txt')['gradio']
    assert card.to_dict()['python_version'] in settings['pythons'].split()
    assert card.colorFrom in ('red', 'yellow', 'green', 'blue', 'indigo', 'purple', 'pink', 'gray')
    assert len(card.to_dict()['short_description']) <= 60                         # the Hub's limit

def test_everything_that_is_imported_is_pinned_to_what_was_tested():
    pinned, tested = pins(space/'requirements.txt'), pins(root/'constraints.txt')
    needed = ' '.join(settings[k] for k in ('requirements', 'extra_requirements', 'app_requirements')).split()
    assert {normal(re.split('[<>=]', n)[0]) for n in needed} <= set(pinned)
    assert not {n: v for n,v in pinned.items() if tested[n] != v}
    own, = re.findall(r'^v2flow_nbdev @ git\+(\S+)@v(\S+)$', (space/'requirements.txt').read_text(), re.M)
    assert own == (settings['git_url'], settings['version'])

def started(python, app, cwd, **variables):
    "The process, and the port it listens on"
    environment = {**{k: v for k,v in os.environ.items() if k != 'MODEL'}, 'CUDA_VISIBLE_DEVICES': '', 'OMP_NUM_THREADS': '1',
                   'PYTHONUNBUFFERED': '1', 'GRADIO_SERVER_PORT': '0', 'GRADIO_SERVER_NAME': '127.0.0.1', **variables}
    process = subprocess.Popen([str(python), str(app)], cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env={k: v for k,v in environment.items() if v is not None})
    said = process.stdout.readline()
    found = re.search(r'http://\S+?:(\d+) ', said)
    assert found, said + process.communicate(timeout=60)[1]
    return process, int(found[1])

def look(port):
    "The page, as the Hub's proxy asks for it"
    c = http.client.HTTPConnection('127.0.0.1', port, timeout=60)
    c.request('GET', '/', headers={'Host': 'me-v2flow.hf.space', 'X-Forwarded-Host': 'me-v2flow.hf.space', 'X-Forwarded-Proto': 'https'})
    answer = c.getresponse()
    return answer.status, answer.read().decode(), dict(answer.getheaders())

def ended(process):
    process.send_signal(signal.SIGTERM); process.communicate(timeout=60)
    return process.returncode

@pytest.mark.skipif(os.name == 'nt', reason='no SIGTERM there')
def test_it_starts_with_the_shipped_checkpoint_behind_a_proxy(tmp_path):
    pytest.importorskip('gradio')
    process, port = started(sys.executable, space/'app.py', tmp_path, PYTHONPATH=str(root), MODEL=str(shipped), TMPDIR=str(tmp_path))
    try: status, page, headers = look(port)
    finally: code = ended(process)
    assert status == 200 and 'V²Flow · digits' in page and '8 × 8 pixels ↔ 4 × 4 tokens' in page
    assert 'https://me-v2flow.hf.space' in page and '127.0.0.1' not in page       # the page calls the proxy back
    # the Hub shows a Space inside a page of its own
    assert 'x-frame-options' not in {k.lower() for k in headers} and 'frame-ancestors' not in str(headers)
    assert code == 128 + signal.SIGTERM and not list(tmp_path.glob('v2flow-app-*'))

def test_the_model_is_the_one_that_is_named(tmp_path, monkeypatch):
    import runpy
    shutil.copy(space/'app.py', tmp_path)
    model = runpy.run_path(str(tmp_path/'app.py'))['model']
    monkeypatch.delenv('MODEL', raising=False); monkeypatch.chdir(root)
    assert model() == shipped
    (tmp_path/'model').mkdir(); assert model() == tmp_path/'model'
    monkeypatch.setenv('MODEL', 'org/model'); assert model() == 'org/model'

@pytest.mark.long
@pytest.mark.skipif(os.name == 'nt', reason='no SIGTERM there')
def test_it_starts_in_an_environment_of_its_requirements_alone(dist, tmp_path):
    "As the Hub builds it, with the wheel of this clone in place of the tag; needs an index, and takes minutes"
    shutil.copytree(space, tmp_path/'space'); shutil.copytree(shipped, tmp_path/'space/model')
    wheel, = dist.glob('*.whl')
    lines = (space/'requirements.txt').read_text().splitlines()
    (tmp_path/'requirements.txt').write_text('\n'.join(str(wheel) if l.startswith('v2flow_nbdev @') else l for l in lines))
    subprocess.run([sys.executable, '-m', 'venv', tmp_path/'env'], check=True)
    python = tmp_path/'env/bin/python'
    alone = {k: v for k,v in os.environ.items() if k != 'PYTHONPATH'}             # else pip may see the clone as installed already
    done = subprocess.run([python, '-m', 'pip', 'install', '-qq', '-r', tmp_path/'requirements.txt'], capture_output=True, text=True,
                          env=alone)
    if 'No matching distribution' in done.stderr and 'Connection' in done.stderr: pytest.skip('no index here')
    assert done.returncode == 0, done.stderr[-2000:]
    process, port = started(python, tmp_path/'space/app.py', tmp_path/'space', PYTHONPATH=None)
    try: status, page, _ = look(port)
    finally: ended(process)
    assert status == 200 and '8 × 8 pixels ↔ 4 × 4 tokens' in page
