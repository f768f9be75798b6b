"A release: one version everywhere, archives that build, metadata, and workflows and pages that fit them"
import datetime, email, json, re, sys, tarfile, tomllib, zipfile
from configparser import ConfigParser
from email import policy
import pytest, yaml
from conftest import root

config = ConfigParser(delimiters=['='])
config.read(root/'settings.ini', encoding='utf-8')
settings = config['DEFAULT']
version, pythons = settings['version'], ['3.11', '3.12', '3.13', '3.14']

def text_of(name): return (root/name).read_text(encoding='utf-8')

def test_one_version_stands_everywhere():
    released = re.findall(r'^## (\d\S*)(?: \((\S+)\))?$', text_of('CHANGELOG.md'), re.M)
    citation = yaml.safe_load(text_of('CITATION.cff'))
    assert f'__version__ = "{version}"\n' in text_of('v2flow_nbdev/__init__.py')
    assert released[0] == (version, citation['date-released'].isoformat()) and citation['version'] == version
    assert datetime.date.fromisoformat(released[0][1]) >= datetime.date(2026, 11, 28)
    assert text_of('CHANGELOG.md').index('\n## Unreleased\n') < text_of('CHANGELOG.md').index(f'\n## {version} ')
    assert citation['title'] == settings['title'] and citation['license'] == 'Apache-2.0'
    assert citation['repository-code'] == settings['git_url']

@pytest.fixture(scope='module')
def wheel(dist): return zipfile.ZipFile(next(dist.glob('*.whl')))

@pytest.fixture(scope='module')
def metadata(wheel):
    text = wheel.read(f'v2flow_nbdev-{version}.dist-info/METADATA').decode('utf-8')
    return email.message_from_string(text, policy=policy.EmailPolicy(utf8=True))

def test_the_wheel_is_small_and_holds_the_library_alone(dist, wheel):
    path, = dist.glob('*.whl')
    assert path.name == f'v2flow_nbdev-{version}-py3-none-any.whl' and path.stat().st_size < 2**20
    inside = {n for n in wheel.namelist() if '.dist-info/' not in n}
    assert inside == {p.relative_to(root).as_posix() for p in (root/'v2flow_nbdev').rglob('*.py')} | {'v2flow_nbdev/data.json'}
    licences = {n.rsplit('/', 1)[1] for n in wheel.namelist() if '/licenses/' in n}
    assert licences == {'LICENSE', 'NOTICE'}

def test_the_source_archive_holds_what_a_wheel_is_made_of(dist):
    "The wheel of the fixture is built out of it, as `python -m build` does"
    path, = dist.glob('*.tar.gz')
    with tarfile.open(path) as archive: inside = {n.partition('/')[2] for n in archive.getnames()}
    assert path.stat().st_size < 2**20
    assert {'settings.ini', 'setup.py', 'pyproject.toml', 'README.md', 'CHANGELOG.md', 'CITATION.cff', 'LICENSE', 'NOTICE'} <= inside
    assert not [n for n in inside if n.startswith(('data/', 'tests/', 'nbs/'))]

def test_metadata_are_complete(metadata):
    for name in ('Summary', 'Keywords', 'Author', 'Author-email', 'Requires-Python'): assert metadata[name], name
    assert metadata['License-Expression'] == 'Apache-2.0' and metadata['Requires-Python'] == f">={settings['min_python']}"
    assert metadata['Description-Content-Type'] == 'text/markdown'
    kinds = metadata.get_all('Classifier')
    assert {f'Programming Language :: Python :: {v}' for v in pythons} <= set(kinds)
    urls = dict(u.split(', ', 1) for u in metadata.get_all('Project-URL'))
    assert {'Homepage', 'Documentation', 'Source', 'Issues', 'Changelog', 'Paper'} <= set(urls)
    assert all(u.startswith('https://') for u in urls.values())

def test_links_of_the_description_lead_out_of_the_index(metadata):
    "An index shows the README without the files beside it: every link names a host, and an image its bytes"
    found = re.findall(r'(!?)\[[^]]*\]\(([^)\s]+)\)', metadata.get_content())
    assert len(found) > 50 and all(target.startswith(('https://', '#')) for _, target in found)
    images = [target for image, target in found if image]
    assert images and all(t.startswith('https://raw.') and f'/v{version}/' in t for t in images)
    for target in (t for _, t in found if f'/v{version}/' in t): assert (root/target.split(f'/v{version}/')[1]).exists(), target

def test_missing_data_say_where_they_are_to_be_had(tmp_path, monkeypatch):
    "Inside a clone: what it has in place of a name mistyped; elsewhere, with the network off: the address of a clone"
    from v2flow_nbdev.base import files
    with pytest.raises(FileNotFoundError, match='is not in this clone; data/checkpoints has digits, emoji'):
        files.find_data('checkpoints/emojis')
    assert files.repository == settings['git_url']
    monkeypatch.chdir(tmp_path); monkeypatch.setattr(files, '__file__', str(tmp_path/'files.py'))
    with pytest.raises(FileNotFoundError, match=f"git clone {re.escape(settings['git_url'])}` and run inside that clone"):
        files.find_data('emoji', cache_dir=tmp_path/'cache', local_files_only=True)
    with pytest.raises(FileNotFoundError, match='^data/checkpoints/emojis: neither here nor among the data of this project; there are digits, emoji'):
        files.find_data('checkpoints/emojis')

@pytest.mark.skipif(not (root/'.git').exists(), reason='not a clone')
def test_the_list_of_data_is_that_of_this_clone():
    "What the package carries: `make manifest`, whenever data, configs or numbers of benchmarks change"
    sys.path.insert(0, str(root/'data'))
    try: import manifest
    finally: sys.path.pop(0)
    listed = json.loads(text_of('v2flow_nbdev/data.json'))
    now = manifest.manifest()
    assert not {n for n in listed.keys() | now.keys() if listed.get(n) != now.get(n)}, 'run `make manifest`'

def test_workflows_run_every_python_on_every_system():
    "Each version of the metadata, everywhere; the whole suite on Linux. actionlint reads the files in the workflow itself"
    jobs = yaml.safe_load(text_of('.github/workflows/test.yaml'))['jobs']
    grid = jobs['installed']['strategy']['matrix']
    assert jobs['everything']['strategy']['matrix']['python'] == grid['python'] == settings['pythons'].split() == pythons
    assert [name.split('-')[0] for name in grid['os']] == ['ubuntu', 'macos', 'windows']
    steps = '\n'.join(str(s.get('run')) for s in jobs['installed']['steps'])
    named = re.findall(r'tests/\w+\.py', steps)
    assert 'tests/try_installed.py' in named and len(named) > 3 and all((root/n).is_file() for n in named)
    for name in named:  # Windows has none of these
        assert not re.search(r'os\.fork|SIGKILL|symlink_to|fsencode', text_of(name)), name

def test_issues_have_forms():
    folder = root/'.github/ISSUE_TEMPLATE'
    for path in folder.glob('*.yaml'):
        form = yaml.safe_load(path.read_text(encoding='utf-8'))
        assert form['name'] and form['description'] and any(f.get('validations', {}).get('required') for f in form['body']), path
        assert len({f['id'] for f in form['body']}) == len(form['body']), path
    links = yaml.safe_load((folder/'config.yml').read_text(encoding='utf-8'))['contact_links']
    ours = [l['url'].partition('/blob/main/')[2] for l in links if l['url'].startswith(settings['git_url'])]
    assert ours and all((root/name).is_file() for name in ours)
