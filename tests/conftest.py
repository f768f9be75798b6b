import atexit, functools, json, os, subprocess, sys, tempfile
from pathlib import Path
import pytest

root = Path(__file__).parent.parent
shipped = root/'data/checkpoints/digits'

def fresh_v2flow(*args, cwd=root):
    "Run the real command in a process of its own, on the CPU"
    command = Path(sys.executable).with_name('v2flow')
    return subprocess.run([command, *map(str, args)], capture_output=True, text=True, cwd=cwd, timeout=900,
                          env={**os.environ, 'CUDA_VISIBLE_DEVICES': '', 'OMP_NUM_THREADS': '1'})

class Shell:
    "The same command in a fork of a process that has done the imports: for many short calls. One call at a time"
    code = """
import gc, json, os, sys
import accelerate, torch, transformers, PIL.Image
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
import v2flow_nbdev.apps.cli, v2flow_nbdev.evaluation.metrics, v2flow_nbdev.language.pipeline, v2flow_nbdev.data.shapes, v2flow_nbdev.training.loop
gc.freeze()
for line in sys.stdin:
    call = json.loads(line)
    if not (child := os.fork()):
        os.chdir(call['cwd'])
        for fd, name in enumerate(('in', 'out', 'err')):
            os.dup2(os.open(call[name], os.O_RDONLY if fd == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
        sys.argv = ['v2flow', *call['args']]
        try: v2flow_nbdev.apps.cli.main()
        except SystemExit as e: sys.stdout.flush(); sys.stderr.flush(); os._exit(e.code or 0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
    def __init__(self):
        self.server = subprocess.Popen([sys.executable, '-c', self.code], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                       text=True, env={**os.environ, 'CUDA_VISIBLE_DEVICES': '',
                                                       'OMP_NUM_THREADS': '1'})

    def __call__(self, *args, cwd=root):
        with tempfile.TemporaryDirectory() as folder:
            out, err = (Path(folder)/n for n in ('out', 'err'))
            self.server.stdin.write(json.dumps(dict(args=[str(a) for a in args], cwd=str(cwd), out=str(out),
                                                    err=str(err), **{'in': os.devnull})) + '\n')
            self.server.stdin.flush()
            code = int(self.server.stdout.readline())
            return subprocess.CompletedProcess(args, code, out.read_text(), err.read_text())

    def close(self): self.server.stdin.close(); self.server.wait(60)

@functools.cache
def shared_shell():
    "One for all tests of a worker"
    shell = Shell()
    atexit.register(shell.close)
    return shell

def v2flow(*args, cwd=root):
    "As quick as the system allows: Windows cannot fork"
    return (shared_shell() if hasattr(os, 'fork') else fresh_v2flow)(*args, cwd=cwd)

@pytest.fixture(scope='session')
def dist(tmp_path_factory):
    "A folder with the source archive of this clone, and the wheel that is built out of it"
    place = tmp_path_factory.mktemp('dist')
    build = [sys.executable, '-m', 'build', '--no-isolation', '--outdir', place, root]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
    return place

@pytest.fixture(scope='session')
def installed(dist, tmp_path_factory):
    "The Python of a fresh environment that holds the wheel, and sees the packages that are installed here, but not this clone"
    from run_anywhere import environment
    return environment(tmp_path_factory.mktemp('wheel')/'env', next(dist.glob('*.whl')))

@pytest.fixture(scope='session')
def small_pretrained(tmp_path_factory):
    "A folder with a LLaMA of random parameters, `llm`, and an image tokenizer over its table, `tok`; its files are never changed"
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from v2flow_nbdev.data.sources import digits
    from v2flow_nbdev.language.text_models import toy_v2flow, train_text_tokenizer
    home = tmp_path_factory.mktemp('small')
    tokenizer = train_text_tokenizer([c for r in digits('test')[:30] for c in r['captions']]); torch.manual_seed(0)
    llm = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=128, tie_word_embeddings=True, bos_token_id=0, eos_token_id=1, pad_token_id=2))
    toy_v2flow(llm, tokenizer).save_pretrained(home/'tok')
    llm.save_pretrained(home/'llm'); tokenizer.save_pretrained(home/'llm')
    return home

@pytest.fixture(scope='session')
def pipe():
    from v2flow_nbdev.language.pipeline import V2FlowPipeline
    return V2FlowPipeline.from_pretrained(shipped)

slow = ['test_training', 'test_bad_input', 'test_processes', 'test_latents', 'test_checkpoint']

def pytest_collection_modifyitems(items):
    import torch
    # the longest first: two workers then end together
    items.sort(key=lambda i: slow.index(i.path.stem) if i.path.stem in slow else len(slow))
    if not torch.cuda.is_available():
        for item in items:
            if 'cuda' in item.keywords: item.add_marker(pytest.mark.skip(reason='needs a CUDA device'))
