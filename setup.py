"Reads `settings.ini`, which nbdev shares."
import re
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=['='])
config.read(here/'settings.ini', encoding='utf-8')
s = config['DEFAULT']
needed, extra, page, notebooks, dev = (s[f'{k}requirements'].split() for k in ('', 'extra_', 'app_', 'notebook_', 'dev_'))
# an index shows the README without the files beside it: links lead to this version's in the repository
files = f"{s['git_url']}/blob/v{s['version']}/"
raw = files.replace('//github.com/', '//raw.githubusercontent.com/').replace('/blob/', '/')
readme = (here/'README.md').read_text(encoding='utf-8')
readme = re.sub(r'(!?)\[([^]]*)\]\((?!https?:|#)', lambda m: f"{m[1]}[{m[2]}]({raw if m[1] else files}", readme)
status = {'1': '1 - Planning', '2': '2 - Pre-Alpha', '3': '3 - Alpha', '4': '4 - Beta', '5': '5 - Production/Stable'}[s['status']]

setup(
    name=s['lib_name'], version=s['version'], description=s['description'], author=s['author'], author_email=s['author_email'],
    long_description=readme, long_description_content_type='text/markdown',
    license_expression='Apache-2.0', license_files=['LICENSE', 'NOTICE'], keywords=s['keywords'].split(),
    project_urls=dict(
        Homepage=s['git_url'], Documentation=s['doc_host'] + s['doc_baseurl'], Source=s['git_url'], Issues=s['git_url'] + '/issues',
        Changelog=files + 'CHANGELOG.md', Paper='https://arxiv.org/abs/2503.07493'),
    classifiers=[
        f'Development Status :: {status}', f"Intended Audience :: {s['audience']}", 'Intended Audience :: Education',
        'Intended Audience :: Science/Research', f"Natural Language :: {s['language']}", 'Operating System :: OS Independent',
        'Programming Language :: Python :: 3 :: Only', *[f'Programming Language :: Python :: {v}' for v in s['pythons'].split()],
        'Topic :: Multimedia :: Graphics', 'Topic :: Scientific/Engineering :: Artificial Intelligence'],
    python_requires='>=' + s['min_python'], packages=find_packages(include=[s['lib_name'], s['lib_name'] + '.*']),
    package_data={s['lib_name']: ['data.json']},
    install_requires=needed + extra, extras_require=dict(app=page, notebooks=page + notebooks, dev=page + notebooks + dev),
    entry_points=dict(console_scripts=s['console_scripts'].split()), zip_safe=False)
