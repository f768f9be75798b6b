("What must hold on small machines and other systems: any start method of processes, streams of any encoding, one odd "
 "example or line, the end of a run")
import json, os, signal, subprocess, sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
import pytest, torch
from conftest import root, shipped, v2flow
from v2flow_nbdev.training import checkpoints as saving, optimizers, processes
from v2flow_nbdev.training.checkpoints import checkpoints
from v2flow_nbdev.training.log import RunLog
from v2flow_nbdev.training.config import TrainConfig
from v2flow_nbdev.training.loop import train
from v2flow_nbdev.training.processes import make_loader

config = TrainConfig(steps=4, batch_size=2, trackers=[], mixed_precision='no', lr=0.1)

# ---- loaders under spawn

def digits_folder(folder, n=6):
    from v2flow_nbdev.data.sources import digits
    folder.mkdir()
    for i, r in enumerate(digits('test')[:n]): r['image'].save(folder/f'{r["captions"][0]} {i}.png')
    return folder

class Joined:
    "Several data sets as one, each with its collate: workers are sent all of them, and are started once"
    def __init__(self, parts): self.parts = parts
    def __len__(self): return max(len(examples) for examples,_ in self.parts)
    def __getitem__(self, i): return [examples[i % len(examples)] for examples,_ in self.parts]
    def collate(self, examples):
        return {f'{k} {n}': v for k,(_,collate) in enumerate(self.parts) for n,
                v in collate([r[k] for r in examples]).items()}

def loaders(folder):
    "What the four trainings load: images of a folder; cached latents; ids as sequences, padded and packed; a stream"
    from transformers import AutoTokenizer
    from v2flow_nbdev.training.recipes import DataConfig, load_data
    from v2flow_nbdev.training.tokenizer_recipes import tokenizer_data
    from v2flow_nbdev.data.sources import FewCaptions, Subset
    from v2flow_nbdev.data.batches import ImageStream
    from v2flow_nbdev.models.latents import PixelLatents
    from v2flow_nbdev.data.cache import EncodedImages
    from v2flow_nbdev.language.sequences import ImageTextSequences, pack
    from v2flow_nbdev.language.visual_tokens import VisualTokens
    from v2flow_nbdev.language.text_models import collate
    source = DataConfig('image_folder', folder=str(folder/'images'), captions=1, crop=0.8, flip=True)
    examples, _ = load_data(source)
    shape = SimpleNamespace(image_channels=1, image_size=(8, 8))
    images = tokenizer_data(source, shape, None, examples)
    cached = tokenizer_data(DataConfig('image_folder', folder=str(folder/'images'), cache=str(folder/'latents')),
                            shape, PixelLatents(1, 2), examples)
    visual = VisualTokens(**{k: tuple(map(tuple, v)) if k == 'grids' else v for k,
                            v in json.loads((shipped/'llm/config.json').read_text())['v2flow'].items()
                            if k in VisualTokens.__dataclass_fields__})
    sequences = ImageTextSequences(Subset(EncodedImages(folder/'ids'), [0, 2, 3]),
                                   AutoTokenizer.from_pretrained(shipped/'llm'), visual, id_noise=0.2, write_noise=0.2,
                                   texts=['a'], text_share=0.2)
    stream, _ = load_data(DataConfig('hub', path='parquet', data_files=str(folder/'digits.parquet'), streaming=True,
                                     held_out=2))
    return [Joined([images, cached, (sequences, collate), (sequences, partial(pack, length=200))]),
            ImageStream(stream, 1, [(8, 8)], crop=0.8)]

def all_batches(folder, workers):
    for data in loaders(folder):
        loader, _ = make_loader(data, TrainConfig(steps=3, batch_size=2, num_workers=workers), data.collate)
        yield list(loader)

def test_workers_are_sent_all_that_they_load_under_spawn(tmp_path):
    "Two workers that were spawned, as on macOS and Windows, give the batches that no worker gives"
    from datasets import Dataset, Image
    from v2flow_nbdev.training.recipes import DataConfig, load_data
    from v2flow_nbdev.data.cache import encode_dataset
    from v2flow_nbdev.models.tokenizer import V2Flow
    files = sorted(digits_folder(tmp_path/'images').iterdir())
    Dataset.from_dict(dict(image=[str(f) for f in files], text=[f.stem for f in files])).cast_column('image',
        Image()).to_parquet(tmp_path/'digits.parquet')
    encode_dataset(load_data(DataConfig('image_folder', folder=str(tmp_path/'images')))[0],
                   V2Flow.from_pretrained(shipped/'image_tokenizer'), tmp_path/'ids', progress=False)
    code = (f'import sys, torch; sys.path.insert(0, {str(root/"tests")!r}); from pathlib import Path; from '
            f'test_systems import all_batches\n'
            f"if __name__ == '__main__':\n    torch.multiprocessing.set_start_method('spawn'); "
            f"torch.save([*all_batches(Path({str(tmp_path)!r}), 2)], {str(tmp_path/'spawned.pt')!r})\n")
    (tmp_path/'spawned.py').write_text(code)
    done = subprocess.run([sys.executable, tmp_path/'spawned.py'], capture_output=True, text=True, cwd=root,
                          env={**os.environ, 'PYTHONPATH': str(root), 'OMP_NUM_THREADS': '1',
                               'CUDA_VISIBLE_DEVICES': ''})
    assert done.returncode == 0, done.stderr[-3000:]
    theirs, ours = torch.load(tmp_path/'spawned.pt', weights_only=False), list(all_batches(tmp_path, 0))
    assert [len(b) for b in ours] == [3, 3]
    for one, other in zip(ours, theirs):
        for (batch, lost, *_), (same, *_) in zip(one, other):
            assert not lost and batch.keys() == same.keys() and all(torch.equal(batch[k], same[k])
                if torch.is_tensor(batch[k]) else batch[k] == same[k] for k in batch)

@pytest.mark.filterwarnings('ignore:Got pickle error')
def test_what_cannot_be_sent_is_said_in_a_line():
    before = torch.multiprocessing.get_start_method()
    torch.multiprocessing.set_start_method('spawn', force=True)
    try:
        with pytest.raises(ValueError, match='num_workers=1.*cannot be sent to another process'):
            train(Line(), points(4), TrainConfig(steps=2, batch_size=2, num_workers=1, trackers=[]),
                  collate=lambda examples: examples, progress=False)
    finally: torch.multiprocessing.set_start_method(before, force=True)

# ---- a model before and after

class Line(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.fixed, self.part = torch.nn.Parameter(torch.ones(1)), torch.nn.Parameter(torch.ones(1),
            requires_grad=False), torch.nn.Linear(1, 1)
        self.part.eval()
    def before_step(self, progress): self.part.requires_grad_(progress < 0.5)  # as the tokenizer's codes settle
    def forward(self, x): return SimpleNamespace(loss=(self.w*self.part(x[:, None]) - self.fixed).square().mean())

def points(n): return [dict(x=torch.tensor(float(i))) for i in range(n)]

def state(model): return [m.training for m in model.modules()], {n: p.requires_grad for n,p in model.named_parameters()}

@pytest.mark.parametrize('which', ['returned', 'passed'])
def test_a_model_can_be_trained_again(which):
    torch.manual_seed(0); model = Line(); before = state(model)
    first = train(model, points(6), config, progress=False)
    assert state(model) == before and all(p.grad is None for p in model.parameters())
    assert {n: p.requires_grad for n,p in first.named_parameters()} == before[1] and not any(m.training
        for m in first.modules())
    chosen = dict(returned=first, passed=model)[which]
    fresh = Line(); fresh.load_state_dict(chosen.state_dict())
    again = train(chosen, points(6), config, progress=False)
    assert torch.equal(again.w, train(fresh, points(6), config, progress=False).w) and not torch.equal(again.w,
        fresh.w.detach()*0 + first.w)

def test_a_model_is_left_as_it_was_when_a_run_fails():
    model = Line(); before = state(model)
    with pytest.raises(KeyError): train(model, points(6), config, evaluate=lambda m: {}['no'], progress=False)
    assert state(model) == before

def test_no_rows_are_an_error_in_words():
    with pytest.raises(ValueError, match='empty'): train(Line(), [], config, progress=False)

# ---- activation checkpointing

def test_activation_checkpointing_works_or_is_refused_in_words():
    on = TrainConfig(steps=2, batch_size=2, trackers=[], activation_checkpointing=True)
    with pytest.raises(ValueError, match='activation_checkpointing=True: Line does not offer it'):
        train(Line(), points(4), on, progress=False)
    class Refuses(Line):
        def enable_gradient_checkpointing(self): raise ValueError('no blocks')
    with pytest.raises(ValueError, match='activation_checkpointing=True: Refuses does not offer it .no blocks.'):
        train(Refuses(), points(4), on, progress=False)
    class Inside(torch.nn.Module):  # as `AutoencoderTraining` holds an autoencoder
        def __init__(self):
            super().__init__()
            self.frozen, self.model = Refuses().requires_grad_(False), Line()
            self.model.enable_gradient_checkpointing = partial(setattr, self, 'on', True)
        def forward(self, x): return self.model(x)
    model = Inside(); train(model, points(4), on, progress=False); assert model.on

def test_autoencoders_compute_twice():
    """The same gradients from more forwards than before; an autoencoder of `diffusers` inside a model is found by
    its own name for it"""
    import diffusers
    from v2flow_nbdev.models.autoencoder import AutoencoderTraining, small_autoencoder
    model, images, forwards = AutoencoderTraining(small_autoencoder(4, 8)), torch.randn(2, 3, 16, 16), []
    for m in model.modules():
        if isinstance(m, torch.nn.Conv2d): m.register_forward_hook(lambda *a: forwards.append(1))
    def step():
        forwards.clear(); model.zero_grad(); model(images).loss.backward()
        return len(forwards), [p.grad.clone() for p in model.parameters()]
    once, gradients = step(); processes.enable_activation_checkpointing(model); twice, same = step()
    assert twice > once and all(torch.allclose(a, b, atol=1e-6) for a,b in zip(gradients, same))
    inside = torch.nn.Sequential(diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4,
                                                         layers_per_block=1))
    processes.enable_activation_checkpointing(inside)
    assert any(getattr(m, 'gradient_checkpointing', False) for m in inside.modules())

# ---- launchers

def test_a_launchers_command_line_is_believed_or_named(tmp_path, monkeypatch):
    said = processes.launched_processes
    assert said(['bash', '-c', 'cd accelerate; launch --num_processes two']) == 0 and said([]) == 0
    assert said(['python', '/bin/accelerate', 'launch', '--num_processes', '2', 'x.py']) == said(['accelerate-launch',
        '--num-processes=2', 'x.py']) == said(['python', '-m', 'accelerate.commands.launch', '--num_processes=2']) == 2
    (tmp_path/'a b.yaml').write_text('num_processes: 3')
    (tmp_path/'one.yaml').write_text('mixed_precision: bf16')
    (tmp_path/'torn.yaml').write_text('a: [1'); (tmp_path/'word.yaml').write_text('num_processes: two')
    def of(name): return said(['python', '/bin/accelerate', 'launch', '--config_file', str(tmp_path/name), 'x.py'])
    assert of('a b.yaml') == 3 and of('one.yaml') == 0
    for name, why in (('torn.yaml', 'cannot be read'), ('none.yaml', 'cannot be read'),
                      ('word.yaml', "num_processes='two' is not a number")):
        with pytest.raises(ValueError, match=why): of(name)
    with pytest.raises(ValueError, match="num_processes='two' is not a number"):
        said(['python', '/bin/accelerate', 'launch', '--num_processes', 'two'])
    import psutil
    def denied(*a): raise psutil.AccessDenied()
    monkeypatch.setattr(psutil.Process, 'cmdline', denied)
    assert processes.requested_processes(TrainConfig(processes=3)) == 3
    monkeypatch.setattr(psutil.Process, 'parent', lambda self: None)
    assert processes.requested_processes(TrainConfig()) == 0
    monkeypatch.setitem(sys.modules, 'psutil', None)
    assert processes.requested_processes(TrainConfig(processes=2)) == 2
    monkeypatch.setenv('WORLD_SIZE', 'many')
    with pytest.raises(ValueError, match="WORLD_SIZE='many'"): processes.requested_processes(TrainConfig())

# ---- other systems

def test_a_folder_that_cannot_be_opened_is_not_synced(tmp_path, monkeypatch):
    "Windows opens no folders, and syncs only files that are open for writing"
    opened, real = [], os.open
    def windows(path, flags, *rest):
        if os.path.isdir(path): raise PermissionError(13, 'Permission denied', str(path))
        opened.append(flags & os.O_RDWR); return real(path, flags, *rest)
    (tmp_path/'x').write_text('x')
    monkeypatch.setattr(os, 'open', windows)
    saving.sync(tmp_path); saving.sync(tmp_path/'x'); assert opened == [os.O_RDWR]
    def fails(code):
        def fsync(handle): raise OSError(code, os.strerror(code))
        return fsync
    import errno
    monkeypatch.setattr(os, 'open', real)
    for code in (errno.EINVAL, errno.EBADF): monkeypatch.setattr(os, 'fsync', fails(code)); saving.sync(tmp_path)
    monkeypatch.setattr(os, 'fsync', fails(errno.EIO))
    for path in (tmp_path, tmp_path/'x'):
        with pytest.raises(OSError): saving.sync(path)  # a disk that fails is no matter of systems

def test_torch_without_onednn(monkeypatch):
    monkeypatch.setattr(torch.ops, 'mkldnn', SimpleNamespace(), raising=False)
    assert optimizers.multiplies_bf16('cpu') is False and optimizers.multiplies_bf16('cuda') is True
    assert optimizers.orthogonal(torch.randn(1, 3, 3)).dtype == torch.float32

def typed(*args, encoding=None, code=None, **how):
    "The command in a process of its own, with streams of this encoding"
    env = {**os.environ, 'CUDA_VISIBLE_DEVICES': '', 'PYTHONPATH': str(root),
           **(dict(PYTHONIOENCODING=encoding) if encoding else {})}
    start = ['-c', code] if code else ['-m', 'v2flow_nbdev.apps.cli']
    return subprocess.run([sys.executable, *start, *map(str, args)], capture_output=True, cwd=root, env=env, **how)

@pytest.mark.parametrize('encoding', ['cp1252', 'ascii'])
def test_help_in_any_encoding(encoding):
    for args in (['--help'], ['train-decoder', '--help']):
        done = typed(*args, encoding=encoding)
        assert done.returncode == 0 and b'Usage' in done.stdout and not done.stderr, done.stderr

def test_results_with_names_that_no_encoding_has():
    "A file name that is not UTF-8 is printed with escapes, and JSON stays JSON; both streams"
    code = ("import sys; from v2flow_nbdev.apps import cli; sys.argv[1:] = ['x']; cli.app = lambda **k: "
            "(cli.report(sys.argv[1] == 'j', dict(a='→ \\udce9'), '→ \\udce9'), cli.say('→ \\udce9')) and 0; cli.main()")
    for encoding in ('utf-8', 'ascii', 'cp1252'):
        done = typed(encoding=encoding, code=code)
        assert done.returncode == 0 and b'\\udce9' in done.stdout and b'\\udce9' in done.stderr, done.stderr
    done = typed(encoding='ascii', code=code.replace("['x']", "['j']"))
    assert json.loads(done.stdout) == dict(a='→ \udce9')

def test_a_reader_that_has_enough_ends_the_command_quietly():
    process = subprocess.Popen([sys.executable, '-c',
                                "from v2flow_nbdev.apps import cli; cli.app = lambda **k: [print(i) for i in "
                                "range(10**5)] and 0; cli.main()"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                cwd=root, env={**os.environ, 'PYTHONPATH': str(root)})
    process.stdout.readline(); process.stdout.close()
    assert process.stderr.read() == b'' and process.wait() == 1

# ---- what a dying machine leaves

junk = dict(zeros=b'\0'*300, half=b'{"step": 9, "sec', binary=b'\xff\xfe\x01\n', list=b'[1]\n', number=b'7\n',
            nameless=b'{"loss": 1}\n', deep=b'['*100_000 + b'\n', text=b'{"step": "x", "seconds": 1}\n')

@pytest.mark.parametrize('kind', junk)
@pytest.mark.parametrize('at', ['end', 'middle'])
def test_a_log_with_junk_is_gone_on_with(tmp_path, kind, at):
    good = [json.dumps(dict(step=s, seconds=float(s), loss=0.5)).encode() + b'\n' for s in (1, 2, 3)]
    (tmp_path/'log.jsonl').write_bytes(b''.join(good[:2] + [junk[kind].rstrip(b'\n') + b'\n'] + good[2:]
                                                if at == 'middle' else good + [junk[kind]]))
    said = []
    log = RunLog(tmp_path, 3, say=said.append)
    assert [l['step'] for l in log.lines()] == [1, 2, 3] and log.before == 3.
    assert said == [f"{tmp_path/'log.jsonl'}: 1 line cannot be read as a line of a log, and left out"]
    log.losses = [dict(loss=1.)]; log.write(4); assert [l['step'] for l in RunLog(tmp_path, 4).lines()] == [1, 2, 3, 4]

@pytest.mark.parametrize('name', ['state.json', 'model.safetensors', 'log.jsonl'])
@pytest.mark.parametrize('content', [b'\0'*500, b'', b'[]', b'{"step": "1", "sha256": 3}'])
def test_a_power_cut_costs_one_checkpoint(tmp_path, capsys, name, content):
    whole = train(Line(), points(6), TrainConfig(**{**vars(config), 'checkpoint_every': 1}), out=tmp_path,
                  progress=False)
    newest, before = checkpoints(tmp_path)[:2]
    file = tmp_path/name if name == 'log.jsonl' else newest/name
    file.write_bytes(file.read_bytes() + content if name == 'log.jsonl' else content)
    torch.manual_seed(0)
    again = train(Line(), points(6), config, out=tmp_path, resume=True, progress=False)
    said = capsys.readouterr().err
    assert name in said or name == 'log.jsonl' and not content
    assert 'going back' in said or name == 'log.jsonl'
    assert torch.equal(again.w, whole.w) and [json.loads(l)['step']
                                              for l in (tmp_path/'log.jsonl').read_text().splitlines()] == [1, 2, 3, 4]

class Odd:
    "Examples of which one cannot be used, each for another reason"
    def __init__(self, error, late=False): self.error, self.late, self.report = error, late, Named()
    def __len__(self): return 6
    def __getitem__(self, i):
        if i == 4 and not self.late: raise self.error
        return dict(x=torch.tensor(float(i)))
    def collate(self, examples):
        if self.late and any(r['x'] == 4 for r in examples): raise self.error
        return torch.utils.data.default_collate(examples)

class Named(dict):
    def change(self, name, what): self[name] = what

@pytest.mark.parametrize('late', [False, True], ids=['example', 'collate'])
@pytest.mark.parametrize('error', [OSError('r\udce9.png: torn'), ValueError('an image of 0 pixels'),
                                   ZeroDivisionError('division by zero'), UnicodeDecodeError('utf-8', b'\xff', 0, 1,
                                       'x'), SyntaxError('broken PNG file')], ids=lambda e: type(e).__name__)
def test_a_row_that_cannot_be_used_ends_nothing(tmp_path, capsys, error, late):
    data = Odd(error, late)
    train(Line(), data, TrainConfig(steps=6, batch_size=3, trackers=[]), data.collate, out=tmp_path, progress=False)
    said = capsys.readouterr().err
    assert '1 examples could not be used' in said and ('r\\udce9.png: torn'
                                                   if isinstance(error,
                                                       OSError) else f'example 4: {type(error).__name__}') in said
    assert list(data.report) == (['r\\udce9.png']
                                 if isinstance(error,
                                               OSError) else [
                                                   'example 4']) and json.loads(
                                                       (checkpoints(tmp_path)[0]/'state.json').read_text())['unusable']

@pytest.mark.parametrize('error', [KeyError('x'), TypeError('y'), AttributeError('z')], ids=lambda e: type(e).__name__)
def test_a_mistake_in_the_program_is_no_odd_row(error):
    with pytest.raises(type(error)):
        train(Line(), Odd(error), TrainConfig(steps=6, batch_size=3, trackers=[]), progress=False)

def test_a_collate_that_fails_for_good_rows_is_said():
    def collate(examples): raise ValueError('too few') if len(examples) > 1 else ValueError('never')
    def some(examples): return torch.utils.data.default_collate(examples) if len(examples) == 1 else collate(examples)
    with pytest.raises(ValueError, match='too few'): train(Line(), points(6), config, some, progress=False)

# ---- few and broken images, through the real commands

@pytest.fixture(scope='module')
def own(tmp_path_factory):
    from test_bad_input import own_llm
    folder = tmp_path_factory.mktemp('own'); own_llm(folder)
    return folder

short = ['training.steps=2', 'training.batch_size=4', 'training.evaluate_every=0', 'training.trackers=[]']
digits_tokenizer = ['train-tokenizer', '--config', 'configs/digits-tokenizer.yaml', f'vocabulary={shipped}/llm',
                    'tokens=all', 'tokenizer.codebook_size=16', 'tokenizer_training.quantize_from=0', *short]
commands = dict(
    tokenizer=digits_tokenizer, cached=[*digits_tokenizer, 'data.cache={out}/latents'],
    copies=[*digits_tokenizer, 'data.copies=1'],
    autoencoder=['train-autoencoder', '--config', 'configs/emoji-autoencoder.yaml', 'autoencoder.width=8',
                 'autoencoder.channels=4', 'autoencoder.halvings=1', 'autoencoder.local=false', 'data.size=8', *short],
    text=['pretrain-llm', '--config', 'configs/digits-text.yaml', 'llm.hidden_size=32', 'llm.num_hidden_layers=1',
          *short],
    ids=['encode-dataset', '--config', 'configs/digits-llm.yaml', f'image_tokenizer={shipped}'],
    llm=['train-llm', '--config', 'configs/digits-llm.yaml', f'image_tokenizer={shipped}', 'llm.pretrained={own}',
         'llm.save_dtype=float32', *short])

def typed_with(name, folder, out, own, *more):
    given = ['data.copies=0'] if 'data.copies=1' not in commands[name] else []
    return v2flow(*[str(a).format(out=out, own=own) for a in commands[name]], '--out', out, 'data.name=image_folder',
                 f'data.folder={folder}', *given, *more)

@pytest.mark.parametrize('n', [1, pytest.param(2, marks=pytest.mark.long)])
@pytest.mark.parametrize('name', commands)
def test_a_folder_of_one_image_or_two(own, tmp_path, name, n):
    "The usual first check of a training: to overfit a single image"
    done = typed_with(name, digits_folder(tmp_path/'few', n), tmp_path/'out', own, 'data.held_out=5')
    assert done.returncode == 0, done.stderr

@pytest.mark.parametrize('name', commands)
def test_one_broken_image_that_nobody_looked_for(own, tmp_path, name):
    """With check: false it is met while working: it is named, another takes its place, and the rest goes on;
    strictly it ends everything"""
    folder = digits_folder(tmp_path/'set', 6)
    broken = sorted(folder.iterdir())[:2]  # one to judge on, one to train on
    for path in broken: path.write_bytes(b'gone')
    done = typed_with(name, folder, tmp_path/'out', own, 'data.check=false', 'data.held_out=2')
    assert done.returncode == 0 and 'Traceback' not in done.stderr, done.stderr
    told = json.loads((tmp_path/'out/data.json').read_text())
    # text alone reads no image
    if name != 'text':
        assert broken[1].name in json.dumps(told, ensure_ascii=False) and 'by name in' in done.stderr, (told,
            done.stderr)
    if name in ('tokenizer', 'cached', 'autoencoder'): assert broken[0].name in told['left_out'], told
    done = typed_with(name, folder, tmp_path/'strict', own, 'data.check=false', 'data.strict=true')
    assert done.returncode == 1 and broken[0].name in done.stderr and done.stderr.count(
        '\n') == 1 and not (tmp_path/'strict/model').exists(), done.stderr

def test_images_of_one_colour_are_refused_in_words(own, tmp_path):
    from PIL import Image
    (tmp_path/'black').mkdir(); Image.new('RGB', (8, 8)).save(tmp_path/'black/a.png')
    done = typed_with('tokenizer', tmp_path/'black', tmp_path/'out', own)
    assert done.returncode == 1 and 'one and the same colour' in done.stderr.splitlines()[-1], done.stderr

@pytest.mark.parametrize('n', [1, 2, 3, 10, 11])
@pytest.mark.parametrize('held_out', [0.001, 0.1, 0.9, 1, 5, 10_000])
def test_something_is_always_left_to_train_on_and_to_judge_on(n, held_out):
    from v2flow_nbdev.training.recipes import split_of
    train, judged = map(list, split_of(n, held_out))
    assert train and judged and sorted({*train, *judged}) == list(range(n)) and (n == 1
        or not {*train} & {*judged}) and len(judged) <= (n + 1)//2

def test_some_of_none_and_of_broken_rows():
    from v2flow_nbdev.training.failures import RunFailed
    from v2flow_nbdev.training.recipes import usable_sample as some
    class Torn(list):
        def __getitem__(self, i):
            if list.__getitem__(self, i) is None: raise OSError('torn')
            return list.__getitem__(self, i)
    assert some([], 5) == [] and some(Torn([None, 1, 2, None]), 1) == [1] and len(some(list(range(100)), 7)) == 7
    with pytest.raises(RunFailed, match='not one of 2 examples can be used; the last: torn'): some(Torn([None]*2), 5)

# ---- the end of a command

def test_one_of_several_processes_leaves_at_once_with_its_exit_code(tmp_path):
    """All is written and every exit handler has run, but Python is not taken down around gloo's threads; exit codes
    of failures stay"""
    code = ("import atexit, os, sys, torch.distributed as dist\nfrom v2flow_nbdev.apps import cli\nclass Loud:\n    "
            "def __del__(self, write=os.write): write(2, b'taken down')\n"
            "dist.init_process_group('gloo', init_method='file://' + sys.argv[1], rank=0, world_size=1)\nsys.loud, "
            "sys.mesh = Loud(), dist.group.WORLD\natexit.register(print, 'handlers')\n"
            "def app(standalone_mode):\n    print('done')\n    {}\ncli.app = app\ncli.main()")
    for i, (end, exit_code) in enumerate({'return 0': 0, 'raise ValueError("x")': 2, 'raise OSError("x")': 1,
                                          'raise RuntimeError("x")': 1, 'raise KeyboardInterrupt': 130,
            'from v2flow_nbdev.training.processes import Interrupted; raise Interrupted(15, 3, True)': 143}.items()):
        done = typed(tmp_path/f'store-{i}', code=code.format(end))
        assert done.returncode == exit_code and done.stdout.decode().split() == ['done',
            'handlers'] and b'taken down' not in done.stderr, done
        assert done.stderr.count(b'\n') == bool(exit_code), done.stderr

def test_nothing_of_a_run_outlives_it(tmp_path):
    "Trackers' threads and workers end with the run, also if it fails"
    import multiprocessing, threading
    def wrong(m): raise KeyError('no')
    for evaluate in (None, wrong):
        before = {t for t in threading.enumerate() if t.name != 'tqdm_monitor'}
        try:
            train(Line(), points(4), TrainConfig(steps=2, batch_size=2, num_workers=1), evaluate=evaluate,
                  out=tmp_path/str(bool(evaluate)), progress=False)
        except KeyError as e: kept = e  # its traceback holds on to all that the run knew
        else: assert not evaluate
        # a worker's queue takes a moment to close
        for t in {t for t in threading.enumerate() if t.name != 'tqdm_monitor'} - before:
            t.join(20); assert not t.is_alive(), t
        assert not multiprocessing.active_children()

# ---- notebooks

def test_the_check_names_a_notebook_that_cannot_be_read(tmp_path, monkeypatch):
    import check_notebooks
    (tmp_path/'nbs/.ipynb_checkpoints').mkdir(parents=True)
    for name, text in dict(good='{"cells": []}',
                           conflict='<<<<<<< HEAD\n{"cells": []}\n=======\n{"cells": [1]}\n>>>>>>> other\n', list='[]',
                           empty='').items():
        (tmp_path/f'nbs/{name}.ipynb').write_text(text)
    (tmp_path/'nbs/latin.ipynb').write_bytes(b'\xff')
    (tmp_path/'nbs/.ipynb_checkpoints/good-checkpoint.ipynb').write_text('<<<<<<<')
    monkeypatch.setattr(check_notebooks, 'root', tmp_path)
    found = list(check_notebooks.problems())
    assert len(found) == 4 and found[0] == 'nbs/conflict.ipynb holds a merge conflict: resolve it' and all(
        f'nbs/{n}.ipynb' in f for n, f in zip(('conflict', 'empty', 'latin', 'list'), found)), found
    (tmp_path/'nbs/index.ipynb').write_text('<<<<<<< HEAD\n')
    for call in (lambda: check_notebooks.execute(['conflict']), check_notebooks.readme):
        with pytest.raises(SystemExit, match='(conflict|index).ipynb holds a merge conflict'): call()
