"Kill a real training and resume it: the result is the same as if nothing had happened"
import json, shutil, signal, subprocess, sys, time
from pathlib import Path
import pytest, torch
from conftest import root, v2flow
from v2flow_nbdev.base.files import read_tensors

@pytest.fixture(scope='module')
def text(tmp_path_factory):
    out = tmp_path_factory.mktemp('text')
    done = v2flow('pretrain-llm', '--config', 'configs/digits-text.yaml', '--out', out, 'training.steps=10')
    assert done.returncode == 0, done.stderr
    return out/'model'

def test_more_text_than_captions(tmp_path):
    "A file of lines beside the captions, packed; the lines that are held out are measured apart"
    sys.path.insert(0, str(root/'data/emoji'))
    try: from corpus import sentences
    finally: sys.path.pop(0)
    prose = list(sentences('The quick brown fox jumps over the lazy dog again.\n\nshape: (B, C, H, W)\n\n>>> '
                           'f(x)\n\nToo short.'))
    assert prose == ['The quick brown fox jumps over the lazy dog again.']
    (tmp_path/'prose.txt').write_text('\n'.join(f'{prose[0]} Number {i}.' for i in range(120)))
    done = v2flow('pretrain-llm', '--config', 'configs/digits-text.yaml', '--out', tmp_path/'run', 'training.steps=4',
                  'training.batch_size=16', f'text.file={tmp_path}/prose.txt', 'text.pack=48', 'text.caption_weight=2',
                  'llm.hidden_size=32', 'llm.num_hidden_layers=1')
    assert done.returncode == 0, done.stderr
    last = json.loads((tmp_path/'run/log.jsonl').read_text().splitlines()[-1])
    assert last['text_perplexity_held_out'] > 1 and last['text_perplexity'] > 1

def lines(folder):
    "The log, without what a clock says"
    return [{k: v for k,v in json.loads(l).items() if k not in ('seconds', 'examples_per_s', 'data_wait', 'tokens_per_s')}
            for l in (folder/'log.jsonl').read_text().splitlines()]

def test_killed_and_resumed_is_the_same_run(text, tmp_path):
    "SIGKILL at random moments, also while a checkpoint is being written; the long version: python -m benchmarks.kills"
    from benchmarks.kills import session
    found = session(kills=2, steps=24, seed=1, folder=tmp_path, text=text, every=2)
    assert found['kills'] >= 2 and found['half_written'] and found[
        'weights_equal'] and found['losses_equal'] and found['lines'] == 24, found
    assert {p.name for p in (tmp_path/'killed').iterdir()} == {'checkpoints', 'log.jsonl', 'model',
                                                               'images'} and not list(
                                                                   (tmp_path/'killed/checkpoints').glob('.*'))

def test_sigterm_saves_and_a_damaged_checkpoint_is_passed_over(text, tmp_path):
    args = ['train-tokenizer', '--config', 'configs/digits-tokenizer.yaml', 'training.steps=100',
            'training.batch_size=16', 'training.evaluate_every=0', 'training.checkpoint_every=10',
            'training.log_every=1', 'data.copies=0',
            'data.sizes=[[8, 8], [12, 4]]', f'vocabulary={text}', '--out', tmp_path]
    process = subprocess.Popen([Path(sys.executable).with_name('v2flow'), *args], cwd=root, stderr=subprocess.PIPE,
                               text=True)
    while not (tmp_path/'checkpoints/step-00000010').exists(): assert process.poll() is None; time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=900)
    saved = max(tmp_path.glob('checkpoints/step-*'))
    assert process.returncode == 128 + signal.SIGTERM and err.strip(
        ).splitlines(
            )[-1] == f'v2flow: SIGTERM after step {int(saved.name[5:])}, which is saved: continue with --resume', err
    content = bytearray((saved/'optimizer.safetensors').read_bytes())
    content[-1] ^= 1; (saved/'optimizer.safetensors').write_bytes(content)
    done = v2flow(*args, '--resume')
    assert (done.returncode == 0 and f'{saved.name}/optimizer.safetensors: missing or damaged; going back to the '
                                     f'checkpoint before it' in done.stderr), done.stderr
    assert [l['step'] for l in lines(tmp_path)] == list(range(1, 101)) and (tmp_path/'trackers').is_dir()

def test_a_full_disk_ends_the_run_and_keeps_what_there_was(tmp_path, monkeypatch):
    import errno
    from types import SimpleNamespace
    from v2flow_nbdev.training import checkpoints
    from v2flow_nbdev.training.config import TrainConfig
    from v2flow_nbdev.training.loop import train
    class Flat(torch.nn.Module):
        def __init__(self): super().__init__(); self.w = torch.nn.Parameter(torch.ones(3))
        def forward(self, x): return SimpleNamespace(loss=(self.w*x[:, None]).square().mean())
    write, calls = checkpoints.write_tensors, []
    def full(path, tensors):
        calls.append(path)
        if len(calls) == 8: path.write_bytes(b'half'); raise OSError(errno.ENOSPC, 'No space left on device')
        write(path, tensors)
    monkeypatch.setattr(checkpoints, 'write_tensors', full)
    config = TrainConfig(steps=20, batch_size=2, checkpoint_every=5, trackers=[], mixed_precision='no')
    data = [dict(x=torch.tensor(float(i))) for i in range(5)]
    with pytest.raises(OSError, match='the disk is full; the last whole one: step-00000010'):
        train(Flat(), data, config, out=tmp_path, progress=False)
    assert [p.name for p in sorted((tmp_path/'checkpoints').iterdir())] == ['step-00000005', 'step-00000010']
    resumed = train(Flat(), data, config, out=tmp_path, resume=True, progress=False)
    assert torch.equal(resumed.w, train(Flat(), data, config, progress=False).w)

def test_compiled_and_checkpointed_steps_are_the_same(tmp_path):
    from v2flow_nbdev.data.sources import digits
    from v2flow_nbdev.base.images import to_tensor
    from v2flow_nbdev.models.tokenizer import V2Flow, V2FlowConfig
    from v2flow_nbdev.models.tokenizer_training import TokenizerTraining
    from v2flow_nbdev.training.config import TrainConfig
    from v2flow_nbdev.training.loop import train
    from v2flow_nbdev.models.vocabulary import Vocabulary
    x = to_tensor([r['image'] for r in digits('train')[:64]], 1)
    def run(**how):
        torch.manual_seed(0)
        tok = TokenizerTraining(V2Flow(V2FlowConfig(codebook_size=16, dim=32, depth=1, velocity_width=32),
                                       Vocabulary([f'w{i}' for i in range(40)], torch.randn(40, 16))))
        return train(tok, [dict(images=i) for i in x], TrainConfig(steps=20, batch_size=16, mixed_precision='no',
            **how), progress=False)
    plain, twice = run(), run(activation_checkpointing=True)
    for (n, a), b in zip(plain.state_dict().items(), twice.state_dict().values()):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4, msg=n)

def test_torch_compile_trains(tmp_path):
    import shutil
    from types import SimpleNamespace
    from v2flow_nbdev.training.config import TrainConfig
    from v2flow_nbdev.training.loop import train
    if not shutil.which('g++'): pytest.skip('torch.compile needs a C++ compiler')
    class Line(torch.nn.Module):
        def __init__(self): super().__init__(); self.net = torch.nn.Linear(1, 1)
        def forward(self, x, y): return SimpleNamespace(loss=(self.net(x) - y).square().mean())
    torch.manual_seed(0); x = torch.randn(32, 1)
    def run(**how):
        torch.manual_seed(0)
        return train(Line(), [dict(x=a, y=3*a + 1) for a in x], TrainConfig(steps=60, batch_size=32, lr=0.1,
            ema_decay=0.5, mixed_precision='no', **how), progress=False).net
    plain, compiled = run(), run(compile=True)
    assert abs(plain.weight.item() - 3) < 0.3
    torch.testing.assert_close(plain.weight, compiled.weight, atol=1e-4, rtol=1e-4)

@pytest.mark.long
def test_the_paper_recipe_is_the_base_preset_and_is_planned_without_building():
    import yaml
    from v2flow_nbdev.models.tokenizer import V2FlowConfig
    from v2flow_nbdev.models.tokenizer_training import TokenizerTrainingConfig
    from v2flow_nbdev.evaluation.costs import costs
    from v2flow_nbdev.training.config import TrainConfig
    from v2flow_nbdev.base.folders import config_from_dict
    recipe = yaml.safe_load((root/'configs/imagenet-llama2.yaml').read_text())
    shape, training = config_from_dict(V2FlowConfig, recipe['tokenizer']), config_from_dict(TrainConfig,
        recipe['training'])
    assert shape == V2FlowConfig.base() and (shape.vocab_size, shape.vocab_dim, shape.codebook_size) == (32_000, 4096,
        16_384)
    assert training.batch_size*shape.grid[0]*shape.grid[1] >= shape.codebook_size  # enough vectors for its k-means
    done = v2flow('train-tokenizer', '--config', 'configs/imagenet-llama2.yaml', '--dry-run')
    assert done.returncode == 0 and not done.stderr, done.stderr
    tuning = config_from_dict(TokenizerTrainingConfig, recipe['tokenizer_training'])
    weights = sum(costs(shape, training=tuning)['parameters'].values())/1e6
    for part in ('16×16 tokens of 16,384 codes, among 32,000 tokens of width 4,096', f'{weights:,.2f} M parameters',
                 '1,000,000 steps'):
        assert part in done.stdout, done.stdout

@pytest.mark.long
def test_pooled_tokens_on_mixed_mosaics(text, tmp_path):
    "A quarter of the tokens, two shapes of images in one training, and both directions on a third shape"
    from v2flow_nbdev.data.sources import mosaics
    from v2flow_nbdev.base.images import to_tensor
    from v2flow_nbdev.models.tokenizer import V2Flow
    done = v2flow('train-tokenizer', '--config', 'configs/mosaics-tokenizer.yaml', '--out', tmp_path,
                  f'vocabulary={text}', 'data.n=40', 'data.tiles=[3, 3]', 'data.sizes=[[16, 16], [24, 8]]',
                  'tokenizer.image_size=[16, 16]', 'tokenizer.pool=2', 'tokenizer.codebook_size=16',
                  'training.steps=16', 'training.batch_size=8', 'training.evaluate_every=0')
    assert done.returncode == 0, done.stderr
    tok = V2Flow.from_pretrained(tmp_path/'model')
    images = to_tensor([r['image'] for r in mosaics('test', 3, (2, 3))], 1)
    ids = tok.encode(images)
    # 24 ids for 8×12 latents, one revealed at a time
    assert ids.shape == (3, 4*6) and tok.decode(ids, grid=(4, 6), n_iter=96).shape == images.shape
    with pytest.raises(ValueError, match='need'): tok.decode(ids)  # its own grid is 4×4

@pytest.mark.long
def test_one_image_many_times_is_learned():
    "Overfit four images: the first thing to try with any change of the model"
    from v2flow_nbdev.data.sources import digits
    from v2flow_nbdev.evaluation.judges import pixels
    from v2flow_nbdev.evaluation.metrics import psnr
    from v2flow_nbdev.models.tokenizer import V2Flow, V2FlowConfig
    from v2flow_nbdev.models.tokenizer_training import TokenizerTraining
    from v2flow_nbdev.training.config import TrainConfig
    from v2flow_nbdev.training.loop import train
    from v2flow_nbdev.models.vocabulary import Vocabulary
    torch.manual_seed(0)
    x = pixels(digits('train')[:4])
    config = V2FlowConfig(codebook_size=32, dim=48, depth=1, velocity_width=64, latent_shift=x.mean().item(),
                          latent_scale=1/x.std().item())
    tok = V2Flow(config, Vocabulary([f'w{i}' for i in range(40)], torch.randn(40, 32)))
    tok = train(TokenizerTraining(tok), [dict(images=i) for i in x], TrainConfig(steps=250, batch_size=32, lr=3e-3,
        ema_decay=0.9), progress=False).tok.cpu()
    back = tok.decode(tok.encode(x), temperature=0.5, generator=torch.Generator().manual_seed(0))
    assert psnr(back, x).mean() > 18 and len(tok.encode(x).unique()) >= 24

def test_image_folder_can_be_trained_on(text, tmp_path):
    "A user's own images, in colour, not square"
    from PIL import Image
    images = tmp_path/'images'; images.mkdir()
    for i in range(12):
        Image.effect_noise((40, 30), 10 + 5*i).convert('RGB').save(images/f'noise_{i}.png')
        (images/f'noise_{i}.txt').write_text('a white digit on a black ground\n')
    (images/'torn.png').write_text('broken')
    done = v2flow('train-tokenizer', '--config', 'configs/digits-tokenizer.yaml', '--out', tmp_path/'run',
                  f'vocabulary={text}', 'data.name=image_folder', f'data.folder={images}', 'data.copies=0',
                  'tokenizer.image_size=[8, 12]', 'tokenizer.image_channels=3', 'tokenizer.codebook_size=16',
                  'training.steps=12', 'training.batch_size=8', 'training.evaluate_every=0')
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path/'run/data.json').read_text())['left_out'] == {'torn.png': 'not an image that Pillow '
        'can read'} and '1 left out (1 × not an image that Pillow can read)' in done.stderr
    done = v2flow('encode', images/'noise_0.png', '--model', tmp_path/'run/model')
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)) == 24

def test_on_an_autoencoder_and_from_a_cache(text, tmp_path):
    """A small autoencoder on a drawn world, a tokenizer on its latents, from images and from the cache; the model
    carries its autoencoder along"""
    from v2flow_nbdev.data.shapes import shapes
    data = ['data.name=shapes', 'data.n=80', 'data.size=32', 'data.copies=0']
    done = v2flow('train-autoencoder', '--config', 'configs/emoji-autoencoder.yaml', '--out', tmp_path/'ae', *data,
                 'autoencoder.width=8', 'autoencoder.channels=4', 'autoencoder.halvings=3', 'autoencoder.local=false',
                 'training.steps=20', 'training.batch_size=8', 'training.evaluate_every=0')
    assert done.returncode == 0, done.stderr
    runs = []
    for name, cache in (('images', []), ('cached', [f'data.cache={tmp_path}/latents'])):
        done = v2flow('train-tokenizer', '--config', 'configs/digits-tokenizer.yaml', '--out', tmp_path/name,
                     f'vocabulary={text}', 'tokens=all', *data, *cache, f'tokenizer.autoencoder={tmp_path}/ae/model',
                     'tokenizer.patch_size=8',
                      'tokenizer.latent_channels=4', 'tokenizer.image_channels=3', 'tokenizer.image_size=[32, 32]',
                      'tokenizer.codebook_size=16', 'training.steps=20', 'training.batch_size=8',
                      'training.evaluate_every=0', 'training.log_every=1')
        assert done.returncode == 0, done.stderr
        runs.append(lines(tmp_path/name))
    for a, b in zip(*runs):
        for k in ('loss', 'flow_loss', 'aux_loss'): assert abs(a[k] - b[k]) < 1e-4, (a, b)
    (tmp_path/'cached/model').rename(tmp_path/'moved'); shutil.rmtree(tmp_path/'ae')
    from v2flow_nbdev.base.images import to_tensor
    from v2flow_nbdev.models.tokenizer import V2Flow
    tok, images = V2Flow.from_pretrained(tmp_path/'moved'), to_tensor([r['image'] for r in shapes('test', 3, 32)[:3]])
    ids = tok.encode(images)
    assert ids.shape == (3, 16) and tok.decode(ids).shape == images.shape and torch.equal(ids,
        tok.encode(latents=tok.to_latents(images)))
    config = tmp_path/'decoder.yaml'
    config.write_text(f'data: {{name: shapes, n: 80, size: 32}}\nimage_tokenizer: {tmp_path}/moved\ndecoder: {{ssim: '
                      f'0.1, flow: true}}\ntraining: {{steps: 4, batch_size: 4, evaluate_every: 0.5, lr: 1.0e-2}}\n')
    done = v2flow('train-decoder', '--config', config, '--out', tmp_path/'decoder')
    assert done.returncode == 0, done.stderr
    assert [l['ssim'] for l in lines(tmp_path/'decoder') if 'ssim' in l]
    learned, seed = V2Flow.from_pretrained(tmp_path/'decoder/model'), lambda: torch.Generator().manual_seed(0)
    assert torch.equal(learned.encode(images), ids) and learned.codebook_checksum == tok.codebook_checksum
    assert (learned.decode(ids, generator=seed()) - tok.decode(ids, generator=seed())).abs().mean() > 1e-3
    from safetensors.torch import load_file
    # what is kept is the EMA
    ema = load_file(tmp_path/'decoder/checkpoints/step-00000004/ema.safetensors')
    for part, m in dict(decoder=learned.latents.model.decoder, masked=learned.masked,
                        velocity=learned.velocity).items():
        for n, p in m.named_parameters(): assert torch.equal(p, ema[f'{part}.{n}']), (part, n)
    assert any(not torch.equal(a, b) for a, b in zip(learned.velocity.parameters(), tok.velocity.parameters()))
    done = v2flow('train-decoder', '--config', config, '--out', tmp_path/'half', 'decoder.save_dtype=float16',
                 'training.evaluate_every=0')
    assert done.returncode == 0, done.stderr
    def size(run):
        return sum(p.stat().st_size for p in (tmp_path/run/'model').rglob('*.safetensors')
                   if p.name != 'vocabulary.safetensors')
    assert size('half') < 0.6*size('decoder')
    done = v2flow('train-decoder', '--config', config, '--out', tmp_path/'none',
                 'image_tokenizer=data/checkpoints/digits')
    assert done.returncode == 2 and 'no decoder to train' in done.stderr
