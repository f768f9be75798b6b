"""Writes the list of the project's data into the package, `v2flow_nbdev/data.json`: path → [size, SHA-256]. What is installed
without a clone takes these files from the Hub and holds them to it (`find_data`, nbs/base/02_files.ipynb).

    python data/manifest.py           after data, configs or numbers of benchmarks changed: `make manifest`
    python data/manifest.py --push    and upload them under the revision that the list names; needs a token of the Hub"""
import argparse, json, subprocess, sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(root))
from v2flow_nbdev.base.files import hub_repository, known_data, sha256, write_atomically

def tracked():
    "Paths of what git knows of data, configs and benchmarks"
    listed = subprocess.run(['git', 'ls-files', '-z', 'data', 'configs', 'benchmarks'], capture_output=True, text=True, cwd=root, check=True)
    return sorted(n for n in listed.stdout.split('\0') if n and (root/n).is_file())

def manifest():
    "Of the files that code reads: path → [size, SHA-256]"
    kinds = ('.json', '.jsonl', '.parquet', '.safetensors', '.txt', '.yaml')
    return {n: [(root/n).stat().st_size, sha256(root/n)] for n in tracked() if n.endswith(kinds)}

def write(path=root/'v2flow_nbdev/data.json'):
    lines = ',\n'.join(f' {json.dumps(n)}: {json.dumps(told)}' for n, told in manifest().items())
    with write_atomically(path) as tmp: tmp.write_text(f'{{\n{lines}\n}}\n', encoding='utf-8', newline='\n')

def push(api=None):
    "A commit with all of them, and their READMEs and licences; the tag is the revision that the list names"
    from huggingface_hub import CommitOperationAdd, HfApi
    api, revision = api or HfApi(), known_data()[1]
    api.create_repo(hub_repository, exist_ok=True)
    names = [*tracked(), 'LICENSE', 'NOTICE']
    api.create_commit(hub_repository, [CommitOperationAdd(n, root/n) for n in names], commit_message=revision)
    api.create_tag(hub_repository, tag=revision, exist_ok=True)
    return revision

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--push', action='store_true', help='upload to the Hub')
    asked = parser.parse_args()
    write(); known_data.cache_clear()
    print(f'{len(known_data()[0])} files, revision {known_data()[1]}')
    if asked.push: print(f'{hub_repository} has {push()}')
