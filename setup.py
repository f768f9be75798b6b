"Reads `settings.ini`, which nbdev shares."
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=['='])
config.read(here/'settings.ini', encoding='utf-8')
s = config['DEFAULT']
needed, extra, page, dev = (s[k].split() for k in ('requirements', 'extra_requirements', 'app_requirements', 'dev_requirements'))

setup(
    name=s['lib_name'], version=s['version'], description=s['description'], author=s['author'], author_email=s['author_email'],
    long_description=(here/'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    license='Apache-2.0', keywords=s['keywords'], url=s['git_url'], python_requires='>=' + s['min_python'],
    packages=find_packages(include=[s['lib_name'], s['lib_name'] + '.*']), install_requires=needed + extra, extras_require=dict(app=page, dev=page + dev),
    entry_points=dict(console_scripts=s['console_scripts'].split()), zip_safe=False)
