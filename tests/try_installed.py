"""Does an installed package work in an empty folder? Run there with the Python it is installed for; exits with 1 if something fails.

    python CLONE/tests/try_installed.py    imports, the command without data, the command on a model of the clone, a toy that computes"""
import importlib, json, os, pkgutil, re, shutil, subprocess, sys, time
from pathlib import Path

clone = Path(__file__).resolve().parent.parent
sys.path.pop(0)                                      # the folder of this file
import v2flow_nbdev

def command(*args, code=0, **variables):
    "stdout, stderr and seconds of the command that was installed; fails unless its exit code is `code`"
    began = time.perf_counter()
    program = shutil.which('v2flow', path=str(Path(sys.executable).parent)) or shutil.which('v2flow')
    done = subprocess.run([program, *map(str, args)], capture_output=True, text=True, encoding='utf-8', errors='replace',
                          env={**os.environ, **variables})
    assert done.returncode == code, (args, done.returncode, done.stdout[-500:], done.stderr[-2000:])
    return done.stdout, done.stderr, time.perf_counter() - began

def modules():
    "Each module, and each name of the front door"
    assert clone not in Path(v2flow_nbdev.__file__).resolve().parents, f'{v2flow_nbdev.__file__} is the clone, not what is installed'
    found = [importlib.import_module(m.name) for m in pkgutil.walk_packages(v2flow_nbdev.__path__, 'v2flow_nbdev.')]
    for name in v2flow_nbdev.__all__: getattr(v2flow_nbdev, name)
    assert len(found) > 70
    return f'{len(found)} modules of {v2flow_nbdev.__version__}'

def help_is_quick():
    "The best of three: the first one may read from a cold disk"
    return f"v2flow --help in {min(command('--help')[2] for _ in range(3)):.2f} s"

def without_data():
    "With the network off, and nothing in the cache of the Hub: a sentence that says how to get them"
    for args in (['generate', 'a cat'], ['demo'], ['evaluate'], ['train-tokenizer', '--config', 'configs/none.yaml', '--out', 'run']):
        out, said, _ = command(*args, code=1, HF_HUB_OFFLINE='1', HF_HUB_CACHE=str(Path.cwd()/'none'))
        assert not out and said.count('\n') == 1 and 'clone' in said, said
    assert not list(Path.cwd().iterdir()), 'something was written'
    return said.strip()

def with_a_model():
    "Image → ids → image, caption → image and image → caption, on the model of the clone"
    model = ['--model', clone/'data/checkpoints/digits']
    command('generate', 'a handwritten seven', '--out', 'seven.png', *model)
    ids, *_ = command('encode', 'seven.png', *model)
    Path('ids.json').write_text(ids, encoding='utf-8')
    command('decode', 'ids.json', '--out', 'back.png', *model)
    caption, *_ = command('caption', 'back.png', *model)
    assert len(json.loads(ids)) == 16 and re.search('seven|7', caption), caption
    return f'caption → image → ids → image → caption: {caption.strip()}'

def toy():
    "The example of the page that says how to add a system"
    page = (clone/'docs/adding_a_system.md').read_text(encoding='utf-8')
    exec(compile(re.search(r'```python\n(.*?)```', page, re.S).group(1), 'toy.py', 'exec'), names := {'__name__': 'toy'})
    return f"a toy system over {len(names['train']):,} digits"

if __name__ == '__main__':
    assert not list(Path.cwd().iterdir()), 'run this in an empty folder'
    sys.stdout.reconfigure(errors='backslashreplace')  # a console of Windows lacks arrows
    for check in (modules, help_is_quick, without_data, with_a_model, toy): print('ok:', check(), flush=True)
