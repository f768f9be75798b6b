"""Runs notebooks as a reader has them who opened one in Colab: nothing but the installed wheel, each notebook alone in an empty
folder, all its cells one after another, its data from the Hub, which is a stand-in on the loopback address. Nothing of the clone
can be opened. Exits with 1 if one fails.

    python tests/run_anywhere.py                   all of them (half an hour on one core)
    python tests/run_anywhere.py FILE.ipynb …      these"""
import os, shutil, subprocess, sys, tempfile, time, traceback
from pathlib import Path

here = Path(__file__).resolve().parent
root = here.parent
sys.path[:0] = [str(here)]
import run_notebooks

def environment(place, wheel):
    "The Python of a fresh environment that holds the wheel, and sees the packages installed here, but not this clone"
    import site
    subprocess.run([sys.executable, '-m', 'venv', '--without-pip', place], check=True)
    python = place/('Scripts' if os.name == 'nt' else 'bin')/'python'
    own = Path(subprocess.run([python, '-c', 'import site; print(site.getsitepackages()[0])'], capture_output=True,
                              text=True, check=True).stdout.strip())
    alone = {k: v for k,v in os.environ.items() if k != 'PYTHONPATH'}  # else pip may see the clone as installed already
    subprocess.run([sys.executable, '-m', 'pip', '--python', python, 'install', '--quiet', '--no-deps', wheel], check=True,
                   capture_output=True, env=alone)
    (own/'others.pth').write_text('\n'.join(site.getsitepackages()) + '\n')  # its own packages come first
    return python

def serve(hub):
    "The project's data under the revision that the package asks for"
    from v2flow_nbdev.base.files import hub_repository, known_data
    files, revision = known_data()
    hub.add(hub_repository, {n: (root/n).read_bytes() for n in files})
    hub.repos[hub_repository]['refs'][revision] = hub.repos[hub_repository]['refs']['main']

def anywhere(paths, place, wheel, hub, python=None):
    "The finished process that has run notebooks in folders of their own below `place`"
    python = python or environment(place/'env', wheel)
    copies = []
    for path in paths:
        folder = place/'notebooks'/path.stem; folder.mkdir(parents=True)
        copies.append(shutil.copy(path, folder))
    said = dict(HF_ENDPOINT=hub.url, HF_HOME=str(place/'hub'), HF_HUB_DISABLE_XET='1', HF_HUB_DISABLE_PROGRESS_BARS='1',
                CUDA_VISIBLE_DEVICES='', MPLBACKEND='agg', WITHOUT=str(root), PYTHONDONTWRITEBYTECODE='1')
    kept = {k: v for k,v in os.environ.items() if k not in ('PYTHONPATH', 'VIRTUAL_ENV', 'HF_HUB_OFFLINE', 'HF_HUB_CACHE')}
    tools = place/'tools'; tools.mkdir()
    for name in ('run_anywhere.py', 'run_notebooks.py', 'check_notebooks.py'): shutil.copy(here/name, tools)
    return subprocess.Popen([python, '-P', tools/'run_anywhere.py', '--here', *copies], cwd=place, env=kept | said,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

# ---- from here on without the clone

def forbid(clone):
    "An error wherever this process, or one that it forks, opens or lists anything of the clone but its packages"
    def look(event, args):
        if event in ('open', 'os.listdir', 'os.scandir', 'os.chdir') and args and isinstance(args[0], (str, bytes, os.PathLike)):
            path = os.path.abspath(os.fsdecode(args[0]))
            if path.startswith(f'{clone}/') and not path.startswith(f'{clone}/.venv/'): raise AssertionError(f'{path} is of the clone')
    sys.addaudithook(look)

def run(path):
    "One notebook as `Run all` does it: every cell, in its folder"
    from execnb.nbio import read_nb
    from execnb.shell import CaptureShell
    began, shell = time.perf_counter(), CaptureShell(path)
    os.chdir(path.parent)
    try: shell.run_all(read_nb(path), exc_stop=True)
    except BaseException: sys.exit(f'{path.name}\n{shell.prettytb(fname=path)}' if shell.exc else traceback.format_exc())
    left = sorted(p.name for p in path.parent.iterdir() if p != path)
    print(f'{path.stem}: {time.perf_counter() - began:.0f} s' + (f'; left behind: {", ".join(left)}' if left else ''), flush=True)

def main_here(paths):
    began = time.perf_counter()
    import v2flow_nbdev
    assert not Path(v2flow_nbdev.__file__).is_relative_to(os.environ['WITHOUT'])
    if len(paths) > 1: run_notebooks.imports()
    forbid(os.environ['WITHOUT'])
    run_notebooks.run, run_notebooks.workers = run, int(os.environ.get('WORKERS', 1))
    failed = sorted(run_notebooks.failures(paths))
    print(f'{len(paths) - len(failed)} of {len(paths)} notebooks ran in {time.perf_counter() - began:.0f} s'
          + (f'; failed: {", ".join(failed)}' if failed else ''))
    sys.exit(bool(failed))

if __name__ == '__main__':
    if sys.argv[1:2] == ['--here']: main_here([Path(p) for p in sys.argv[2:]])
    from hub_stand_in import Hub
    sys.path.insert(0, str(root))
    place = {name: i for i, name in enumerate(run_notebooks.longest)}
    paths = [Path(p) for p in sys.argv[1:]] or sorted(run_notebooks.notebooks(), key=lambda p: place.get(p.stem, len(place)))
    with tempfile.TemporaryDirectory() as folder, Hub() as hub:
        folder = Path(folder)
        subprocess.run([sys.executable, '-m', 'build', '--no-isolation', '--outdir', folder/'dist', root], check=True, capture_output=True)
        serve(hub)
        process = anywhere(paths, folder, next((folder/'dist').glob('*.whl')), hub)
        for line in process.stdout: print(line, end='', flush=True)
        print(f'{len(hub.got())} files were sent, {sum(len(hub.files(r)[n]) for r in hub.repos for n in hub.got(r))/1e6:.0f} MB')
        sys.exit(process.wait())
