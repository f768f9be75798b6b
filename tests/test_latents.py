"Autoencoders in the format of `diffusers`, and latents on disk: killed and resumed, stale, damaged, trained from"
import json, logging, os, shutil, signal, subprocess, sys, time
from pathlib import Path
import pytest, torch
from torch.nn.functional import mse_loss
from v2flow_nbdev.data.sources import mosaics
from v2flow_nbdev.base.images import to_tensor
from v2flow_nbdev.models.latents import AutoencoderLatents, PixelLatents
from v2flow_nbdev.models.autoencoder import AutoencoderTraining, load_autoencoder, small_autoencoder
from v2flow_nbdev.data.cache import CachedLatents, cache_latents, fingerprint, shard_names

kinds = ('AutoencoderDC', 'AutoencoderKL')
weights = 'diffusion_pytorch_model.safetensors'

@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    "Small autoencoders of both classes, f4, written by diffusers itself: {class: folder}"
    from diffusers import AutoencoderDC, AutoencoderKL
    torch.manual_seed(0)
    widths, none, folder = (16, 32, 32), ((),)*3, tmp_path_factory.mktemp('autoencoders')
    dc = AutoencoderDC(latent_channels=8, encoder_block_out_channels=widths, decoder_block_out_channels=widths,
                       encoder_layers_per_block=(1, 1, 1),
                       decoder_layers_per_block=(1, 1, 1), encoder_qkv_multiscales=none, decoder_qkv_multiscales=none,
                       scaling_factor=0.41407)
    kl = AutoencoderKL(block_out_channels=widths, down_block_types=('DownEncoderBlock2D',)*3,
                       up_block_types=('UpDecoderBlock2D',)*3, norm_num_groups=8,
                       latent_channels=6, scaling_factor=0.2325, shift_factor=0.06)
    for model in (dc, kl): model.save_pretrained(folder/type(model).__name__)
    return {kind: folder/kind for kind in kinds}

@pytest.fixture
def copy(saved, tmp_path):
    "A copy of the DC autoencoder, to be damaged"
    return Path(shutil.copytree(saved['AutoencoderDC'], tmp_path/'copy'))

def random_images(b=2, h=32, w=48): return torch.rand(b, 3, h, w, generator=torch.Generator().manual_seed(1))*2 - 1

@pytest.mark.parametrize('kind', kinds)
def test_shapes_scale_and_shift(saved, kind):
    import diffusers
    ours, theirs, x = AutoencoderLatents.from_pretrained(saved[kind]), getattr(diffusers,
        kind).from_pretrained(saved[kind]).eval(), random_images()
    assert (ours.patch_size, ours.image_channels, ours.channels) == (4, 3, theirs.config.latent_channels)
    assert (ours.scale, ours.shift) == ((0.41407, 0.) if kind == 'AutoencoderDC' else (0.2325, 0.06))
    with torch.no_grad():
        out = theirs.encode(x)
        raw = out.latent if kind == 'AutoencoderDC' else out.latent_dist.mean
        z = ours.encode(x)
        assert z.shape == (2, ours.channels, 8, 12) and torch.equal(z, (raw - ours.shift)*ours.scale)
        assert torch.equal(ours.decode(z), theirs.decode(z/ours.scale + ours.shift).sample.clamp(-1,
            1)) and ours.decode(z).shape == x.shape
        other = AutoencoderLatents.from_pretrained(saved[kind], scale=2., shift=-1.)
        assert torch.equal(other.encode(x), (raw + 1)*2)
    torch.testing.assert_close(other.decode(other.encode(x)), ours.decode(z), atol=1e-5, rtol=0)
    assert ours.decode(z*1000).abs().max() <= 1
    for bad in (random_images(h=30), random_images()[:, :1], random_images()[0]):
        with pytest.raises(ValueError, match='need .B, 3, H, W. with sides divisible by 4'): ours.encode(bad)
    with pytest.raises(ValueError, match='need .B, '): ours.decode(z[:, :-1])

@pytest.mark.parametrize('kind', kinds)
def test_frozen_and_deterministic(saved, kind):
    latents, x = AutoencoderLatents.from_pretrained(saved[kind]), random_images()
    z = latents.encode(x)
    outer = torch.nn.Sequential(latents).train()
    assert outer.training and not any(m.training for m in latents.model.modules()) and not any(p.requires_grad
        for p in latents.parameters())
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(latents.encode(x), z) and latents.decode(z).dtype == torch.float32
    assert not latents.encode(x.requires_grad_()).requires_grad
    half = AutoencoderLatents.from_pretrained(saved[kind], dtype=torch.bfloat16)
    # `dtype` is the decoder's
    assert next(half.model.decoder.parameters()).dtype == torch.bfloat16 and torch.equal(half.encode(x), z)

@pytest.mark.parametrize('kind', kinds)
def test_tiles_and_the_whole(saved, kind):
    whole, tiled = (AutoencoderLatents.from_pretrained(saved[kind], tiling=t) for t in (False, True))
    x = random_images(2, 64, 96)
    if kind == 'AutoencoderDC': tiled.model.enable_tiling(48, 48, 32, 32)
    else: tiled.model.tile_sample_min_size, tiled.model.tile_latent_min_size = 48, 12
    assert (tiled.model.use_tiling and tiled.model.use_slicing and not whole.model.use_tiling
            and whole.checksum != tiled.checksum)
    z = whole.encode(x)
    assert tiled.encode(x).shape == z.shape
    for a, b in ((whole.decode(z), tiled.decode(z)), (z, tiled.encode(x))):
        assert a.shape == b.shape and not torch.equal(a, b)
        if kind == 'AutoencoderDC': assert mse_loss(a, b) < 0.05*a.var()       # tiles do not see beyond their border
        else: assert mse_loss(a, b) < a.var()  # and the group norms of a KL autoencoder take each tile's own statistics
    small = random_images(2, 32, 48)
    # one tile is enough: nothing but the batch differs
    torch.testing.assert_close(tiled.encode(small), whole.encode(small), atol=1e-5, rtol=1e-5)

def damage(folder, how):
    path = folder/weights
    if how == 'config': (folder/'config.json').write_text('{oops')
    elif how == 'no config': (folder/'config.json').unlink()
    elif how == 'class': (folder/'config.json').write_text('{"_class_name": "VQModel"}')
    elif how == 'truncated': path.write_bytes(path.read_bytes()[:-1000])
    elif how == 'no weights': path.unlink()
    elif how == 'pickled': path.rename(path.with_suffix('.bin'))
    else:
        from safetensors.torch import load_file, save_file
        tensors = load_file(path)
        tensors['decoder.conv_in.bias'] = torch.zeros(3)
        if how == 'incomplete': tensors.pop('decoder.conv_in.bias')
        save_file(tensors, path)

said = {'config': 'config.json: cannot be read', 'no config': 'config.json: missing',
        'class': 'holds a VQModel; use an AutoencoderDC or an AutoencoderKL', 'truncated': 'cannot be loaded',
        'no weights': 'cannot be loaded', 'pickled': 'cannot be loaded',
        'incomplete': '1 weights are missing, such as decoder.conv_in.bias', 'shape': 'decoder.conv_in.bias'}

@pytest.mark.parametrize('how', said)
def test_errors_are_one_line_that_names_the_folder(copy, how, capfd):
    damage(copy, how)
    before = logging.getLogger('diffusers').level
    with pytest.raises(OSError) as e: AutoencoderLatents.from_pretrained(copy)
    assert said[how] in str(e.value) and str(copy) in str(e.value) and '\n' not in str(e.value)
    assert capfd.readouterr().err == '' and logging.getLogger('diffusers').level == before

def test_folders_that_are_not_there(saved, monkeypatch):
    import huggingface_hub
    with pytest.raises(FileNotFoundError, match='no such autoencoder folder; give a folder or a Hub id'):
        load_autoencoder('/nowhere/at/all')
    with pytest.raises(FileNotFoundError, match='no such folder in the model'):
        load_autoencoder(saved['AutoencoderDC'], subfolder='vae')
    asked = {}
    def offline(name, **how): asked.update(how, name=name); raise ConnectionError('a long\nstory')
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', offline)
    with pytest.raises(FileNotFoundError) as e: load_autoencoder('org/model', 'vae', 'v1')
    assert (str(e.value) == 'org/model: no such folder, and no such autoencoder could be fetched from the Hub '
                            '(ConnectionError)')
    assert asked['revision'] == 'v1' and all(p.startswith('vae/') for p in asked['allow_patterns'])
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', lambda name, **how: saved['AutoencoderDC'].parent)
    assert load_autoencoder('org/model', 'AutoencoderDC').config.latent_channels == 8

def test_only_what_is_read_is_fetched(saved, tmp_path, monkeypatch):
    import fnmatch, huggingface_hub
    from diffusers import AutoencoderDC
    there, here = tmp_path/'hub', tmp_path/'cache/snapshots/0123abc'
    AutoencoderDC.from_pretrained(saved['AutoencoderDC']).half().save_pretrained(there/'vae', variant='fp16')
    for other in ('unet/diffusion_pytorch_model.safetensors', 'vae/diffusion_pytorch_model.bin', 'README.md',
                  'vae/diffusion_pytorch_model.fp16.bin'):
        (there/other).parent.mkdir(exist_ok=True); (there/other).touch()
    fetched = set()
    def download(name, revision, allow_patterns):
        assert (name, revision) == ('org/model', 'v1')
        for path in (p for p in there.rglob('*') if p.is_file() and any(fnmatch.fnmatch(str(p.relative_to(there)), a)
            for a in allow_patterns)):
            (here/path.relative_to(there)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, here/path.relative_to(there)); fetched.add(str(path.relative_to(there)))
        return here
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', download)
    assert AutoencoderLatents.from_pretrained('org/model', subfolder='vae', revision='v1').revision == '0123abc'
    # half precision, as there is nothing else
    assert fetched == {'vae/config.json', 'vae/diffusion_pytorch_model.fp16.safetensors'}
    fetched.clear(); shutil.rmtree(here)
    shutil.copy(saved['AutoencoderDC']/weights, there/'vae')
    load_autoencoder('org/model', 'vae', 'v1')
    assert fetched == {'vae/config.json', f'vae/{weights}'}

def test_fit_save_and_load(saved, tmp_path):
    x = random_images(8)
    fitted = AutoencoderLatents.fit(load_autoencoder(saved['AutoencoderDC']), x, batch_size=3)
    z = fitted.encode(x)
    assert abs(z.mean()) < 1e-4 and abs(z.std() - 1) < 1e-4
    fitted.save_pretrained(tmp_path/'fitted')
    again = AutoencoderLatents.from_pretrained(tmp_path/'fitted')
    assert torch.equal(again.encode(x), z) and again.checksum == fitted.checksum
    config = json.loads((tmp_path/'fitted/config.json').read_text())
    assert (config['scaling_factor'], config['shift_factor']) == (fitted.scale, fitted.shift)

def test_checksum_tells_weights_and_scales_apart(saved):
    load = lambda **how: AutoencoderLatents.from_pretrained(saved['AutoencoderDC'], **how)
    first, *others = [load(), load(scale=1.), load(shift=1.), load(tiling=True),
                      AutoencoderLatents.from_pretrained(saved['AutoencoderKL'])]
    assert first.checksum == load().checksum == load(dtype=torch.bfloat16).checksum and len({l.checksum
        for l in [first, *others]}) == 5
    before = first.checksum
    next(first.parameters()).add_(1e-3)
    assert first.checksum != before  # the weights' digest is kept, but not beyond a change of weights
    assert PixelLatents(3, 2).checksum != PixelLatents(1, 2).checksum != PixelLatents(1, 2,
        0.1).checksum == PixelLatents(1, 2, 0.1).checksum

def test_small_autoencoder_learns_with_the_projects_engine():
    from v2flow_nbdev.training.config import TrainConfig
    from v2flow_nbdev.training.loop import train
    x = to_tensor([r['image'] for r in mosaics('train', 64, (2, 2))], 3, (32, 32))
    state = torch.get_rng_state()
    model = small_autoencoder(8, width=16)
    assert torch.equal(state, torch.get_rng_state()) and torch.equal(next(model.parameters()),
        next(small_autoencoder(8, width=16).parameters()))
    before = AutoencoderTraining(model)(x).loss
    trained = train(AutoencoderTraining(model), [dict(images=one) for one in x], TrainConfig(steps=30, batch_size=16,
        lr=2e-3, mixed_precision='no'), progress=False)
    with torch.no_grad(): assert trained(x).loss < 0.8*before
    latents = AutoencoderLatents.fit(trained.model, x)
    assert latents.patch_size == 8 and latents.encode(x).shape == (64, 8, 4, 4)
    for wrong in (dict(channels=7), dict(image_channels=2)):
        with pytest.raises(ValueError, match=next(iter(wrong))): small_autoencoder(**wrong)

examples = mosaics('train', 23, (2, 3))

def contents(folder): return {p.name: p.read_bytes() for p in Path(folder).iterdir()}

killed = '''
import os, signal, sys
from v2flow_nbdev.data.sources import mosaics
from v2flow_nbdev.models.latents import PixelLatents
from v2flow_nbdev.data.cache import cache_latents
class Killed(PixelLatents):
    calls = 0
    def encode(self, images):
        self.calls += 1
        if self.calls == 6: os.kill(os.getpid(), signal.SIGKILL)        # in the midst of the third shard
        return super().encode(images)
cache_latents(mosaics('train', 23, (2, 3)), Killed(1, 2), sys.argv[1], batch_size=2, shard_size=4, progress=False)
'''

def test_killed_and_resumed_is_bit_equal(tmp_path):
    run = subprocess.run([sys.executable, '-c', killed, tmp_path/'killed'])
    assert run.returncode == -signal.SIGKILL and (tmp_path/'killed/.lock').exists()
    assert len(json.loads((tmp_path/'killed/index.json').read_text())['shards']) == 2
    with pytest.raises(OSError, match='holds 8 of 23 examples; go on with `cache_latents`'):
        CachedLatents(tmp_path/'killed')
    (tmp_path/'killed/.abcdefgh.safetensors').write_bytes(b'what a kill in the midst of writing leaves')
    kept = {n: (tmp_path/'killed'/n).stat().st_mtime_ns for n in shard_names(0)}
    whole = cache_latents(examples, PixelLatents(1, 2), tmp_path/'whole', batch_size=2, shard_size=4, progress=False)
    # goes on as it was begun
    resumed = cache_latents(examples, PixelLatents(1, 2), tmp_path/'killed', batch_size=64, shard_size=4096,
                            progress=False)
    assert contents(tmp_path/'killed') == contents(tmp_path/'whole') and len(resumed) == len(whole) == 23
    assert kept == {n: (tmp_path/'killed'/n).stat().st_mtime_ns for n in kept}  # and not from the beginning

def test_a_finished_cache_encodes_nothing(tmp_path):
    latents = PixelLatents(1, 2)
    cache_latents(examples, latents, tmp_path, progress=False)
    latents.encode = None
    assert len(cache_latents(examples, latents, tmp_path, progress=False)) == 23

@pytest.mark.parametrize('what, change', [('images or captions', dict(examples=examples[::-1])),
                                          ('autoencoder', dict(latents=PixelLatents(1, 2, 0.5))),
                                          ('size of images', dict(size=(8, 8))),
                                          ('dtype', dict(dtype=torch.float16))])
def test_stale_cache_is_refused(tmp_path, what, change):
    before = dict(examples=examples, latents=PixelLatents(1, 2), folder=tmp_path, progress=False)
    cache_latents(**before)
    files = contents(tmp_path)
    with pytest.raises(ValueError, match=f'other {what}.*give another folder, or remove this one'):
        cache_latents(**{**before, **change})
    assert contents(tmp_path) == files
    if what == 'autoencoder':
        with pytest.raises(ValueError, match='other autoencoder'): CachedLatents(tmp_path, change['latents'])
        CachedLatents(tmp_path, before['latents'])

@pytest.mark.parametrize('name', shard_names(1) + ('index.json',))
@pytest.mark.parametrize('how', ['changed', 'missing'])
def test_damage_is_found_and_named(tmp_path, name, how):
    make = lambda: cache_latents(examples, PixelLatents(1, 2), tmp_path, shard_size=8, progress=False)
    make()
    files, path = contents(tmp_path), tmp_path/name
    if how == 'missing': path.unlink()
    elif name == 'index.json': path.write_bytes(path.read_bytes()[:-9])
    else: path.write_bytes(path.read_bytes()[:-9] + b'X' + path.read_bytes()[-8:])
    with pytest.raises(OSError, match=name) as e:
        cached = CachedLatents(tmp_path)
        assert len(cached[0]['captions']) == 1                 # the shard before it can be read
        cached[9]
    assert '\n' not in str(e.value)
    if name != 'index.json':
        path.unlink(missing_ok=True)                           # the cure that the message names
        make()
        assert contents(tmp_path) == files

def test_fingerprint_is_of_pixels_captions_and_order():
    changed = [{**examples[0], 'captions': ['another']}, *examples[1:]]
    redrawn = [{**examples[0], 'image': examples[1]['image']}, *examples[1:]]
    assert len({fingerprint(r) for r in (examples, examples[::-1], examples[1:], changed,
                                         redrawn)}) == 5 and fingerprint(examples) == fingerprint(mosaics('train', 23,
                                             (2, 3)))
    class Named(list): fingerprint = 'v1'
    assert fingerprint(Named(examples)) == 'v1'

def test_sizes_and_dtypes(tmp_path):
    odd = [*examples, *mosaics('train', 2, (3, 3))]
    with pytest.raises(ValueError, match='images of 24×16 and 24×24 pixels; give the size'):
        cache_latents(odd, PixelLatents(1, 2), tmp_path/'a', progress=False)
    cached = cache_latents(odd, PixelLatents(1, 2), tmp_path/'b', size=(16, 16), dtype=torch.bfloat16, progress=False)
    assert cached.shape == (4, 8,
        8) and cached[-1]['latents'].dtype == torch.float32 and cached[
            24]['captions'] == odd[24]['captions'] == cached.captions[24]
    for i in (25, -26):
        with pytest.raises(IndexError): cached[i]
    with pytest.raises(ValueError, match='0 examples'): cache_latents([], PixelLatents(1, 2), tmp_path/'c')

def test_training_from_the_cache_gives_the_same_numbers(tmp_path):
    "The tokenizer itself, through the loader of the project's engine, with and without worker processes"
    from v2flow_nbdev.models.tokenizer import V2Flow, V2FlowConfig
    from v2flow_nbdev.models.tokenizer_training import TokenizerTraining
    from v2flow_nbdev.training.config import TrainConfig
    from v2flow_nbdev.training.loop import train
    from v2flow_nbdev.models.vocabulary import Vocabulary
    latents = PixelLatents(1, 2, -0.4, 1.7)
    cached = cache_latents(examples, latents, tmp_path, batch_size=5, shard_size=6, progress=False)
    vocabulary = Vocabulary([str(i) for i in range(40)],
                            torch.randn(40, 16, generator=torch.Generator().manual_seed(0)))
    config = V2FlowConfig(codebook_size=16, dim=32, depth=1, velocity_width=32, velocity_depth=1, resampler_width=32,
                          latent_shift=-0.4, latent_scale=1.7, image_size=(16, 24))
    x = to_tensor([r['image'] for r in examples], 1)
    def losses(data, collate=None, **how):
        torch.manual_seed(0)
        out = tmp_path/f'run{len(list(tmp_path.iterdir()))}'
        train(TokenizerTraining(V2Flow(config, vocabulary)), data, TrainConfig(steps=6, batch_size=4, evaluate_every=1,
            mixed_precision='no', **how), collate, out=out, progress=False)
        return torch.tensor([json.loads(line)['loss'] for line in (out/'log.jsonl').read_text().splitlines()])
    stack = lambda batch: dict(latents=torch.stack([r['latents'] for r in batch]))
    plain = losses([dict(images=one) for one in x])
    torch.testing.assert_close(losses(cached, stack), plain)
    torch.testing.assert_close(losses(cached, stack, num_workers=1), plain)

def share(folder):
    "What each of several processes runs"
    import torch.distributed as dist
    dist.init_process_group('gloo')
    how = dict(batch_size=2, shard_size=4, progress=False)
    assert len(cache_latents(examples, PixelLatents(1, 2), Path(folder)/'plain', **how)) == 23
    class Fails(PixelLatents):
        def encode(self, images):
            if dist.get_rank(): raise MemoryError('too large')
            return super().encode(images)
    # an error in one ends both
    with pytest.raises((MemoryError, OSError)) as e:
        cache_latents(Broken(examples, odd), Fails(1, 2), Path(folder)/'broken', **how)
    assert str(e.value) == ('too large' if dist.get_rank() else 'process 1 of 2 failed (MemoryError: too large)')
    assert cache_latents(Broken(examples, odd), PixelLatents(1, 2), Path(folder)/'broken',
                         **how).report.left_out == named
    from v2flow_nbdev.training.failures import leave
    leave(0)                                                                     # as the command does

def free_port():
    import socket
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); return s.getsockname()[1]

def test_two_processes_share_the_work(tmp_path):
    env = {**os.environ, 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(free_port()), 'WORLD_SIZE': '2',
           'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}
    code = (f'import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from test_latents import share; '
            f'share(sys.argv[1])')
    running = [subprocess.Popen([sys.executable, '-c', code, tmp_path/'two'], env={**env, 'RANK': str(i)},
                                stderr=subprocess.PIPE, text=True) for i in range(2)]
    for p in running:
        _, err = p.communicate(timeout=120)
        assert p.returncode == 0, err
    for name, data in (('plain', examples), ('broken', Broken(examples, odd))):
        cache_latents(data, PixelLatents(1, 2), tmp_path/'one'/name, batch_size=2, shard_size=4, progress=False)
        assert contents(tmp_path/'one'/name) == contents(tmp_path/'two'/name)

# --- the same image, the same latents, wherever it runs

casts = dict(half=lambda m: m.half(), bfloat16=lambda m: m.to(torch.bfloat16), double=lambda m: m.double(),
             twice=lambda m: m.half().float(),
             channels_last=lambda m: m.to(memory_format=torch.channels_last),
             held=lambda m: torch.nn.ModuleList([m]).bfloat16()[0])

@pytest.mark.parametrize('kind', kinds)
def test_latents_are_equal_after_any_cast_and_in_any_surroundings(saved, kind, tmp_path):
    import copy
    latents, x = AutoencoderLatents.from_pretrained(saved[kind]), random_images()
    z, sums = latents.encode(x), (latents.checksum, latents.encoder_checksum)
    for how, cast in casts.items():
        other = cast(copy.deepcopy(latents))
        assert torch.equal(other.encode(x), z) and (other.checksum, other.encoder_checksum) == sums, how
        assert all(p.dtype == torch.float32 for p in other.model.encoder.parameters()), how
        back = other.decode(z)
        assert back.dtype == torch.float32 and mse_loss(back, latents.decode(z)) < 1e-3
        decoder = next(other.model.decoder.parameters()).dtype
        assert decoder == dict(half=torch.half, double=torch.double, bfloat16=torch.bfloat16,
                               held=torch.bfloat16).get(how, torch.float32)
        other.save_pretrained(tmp_path/how)                                   # after a cast, too
        again = AutoencoderLatents.from_pretrained(tmp_path/how)
        assert torch.equal(again.encode(x), z) and (again.checksum, again.encoder_checksum) == sums, how
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision('medium')
        torch.backends.mkldnn.conv.fp32_precision = 'bf16'
        with torch.autocast('cpu', torch.bfloat16), torch.inference_mode(): assert torch.equal(latents.encode(x), z)
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.mkldnn.conv.fp32_precision = 'none'
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        given = x.to(dtype)
        assert torch.equal(latents.encode(given),
                           latents.encode(given.float())) and latents.encode(given).dtype == torch.float32
    assert torch.equal(latents.encode(x.to(memory_format=torch.channels_last)), z)
    torch.testing.assert_close(torch.cat([latents.encode(one) for one in x.split(1)]), z, atol=1e-5, rtol=1e-5)
    with torch.inference_mode(): assert AutoencoderLatents.from_pretrained(saved[kind]).encoder_checksum == sums[1]
    latents.model.half()                                                      # behind its back: the values are lost
    with pytest.raises(ValueError, match='encoder .*torch.float16.*load it again'): latents.encode(x)

@pytest.mark.parametrize('kind', kinds)
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_saved_in_half_precision_the_latents_are_equal(saved, kind, dtype, tmp_path):
    from safetensors.torch import load_file
    latents, x = AutoencoderLatents.from_pretrained(saved[kind]), random_images()
    exact = latents.model.encoder.conv_in.weight
    exact.copy_(exact.to(dtype))  # loses nothing in this dtype, so it is stored in it
    z, was = latents.encode(x), latents.model.dtype
    latents.save_pretrained(tmp_path, dtype)
    again, stored = AutoencoderLatents.from_pretrained(tmp_path), load_file(tmp_path/weights)
    assert torch.equal(again.encode(x),
        z) and again.checksum == latents.checksum and latents.model.dtype == was == torch.float32
    assert stored['encoder.conv_in.weight'].dtype == dtype and stored['encoder.conv_out.weight'].dtype == torch.float32
    assert all(t.dtype == dtype for n,t in stored.items() if n.startswith(('decoder.', 'post_quant_conv.')))
    for n, t in latents.model.encoder.state_dict().items():
        assert torch.equal(t, again.model.encoder.state_dict()[n]), n
    with pytest.raises(ValueError, match='torch.int8: need a dtype of floats'):
        latents.save_pretrained(tmp_path, torch.int8)

@pytest.mark.parametrize('latents', ['pixel', *kinds])
def test_what_is_no_image_and_no_latent_is_refused(saved, latents):
    latents = PixelLatents(3, 4) if latents == 'pixel' else AutoencoderLatents.from_pretrained(saved[latents])
    x = random_images()
    for bad, said in ((x.mul(127).byte(), 'uint8: need floats'), (x.long(), 'int64: need floats'),
                      (x*300, r'need \[-1, 1\]'), (x[:0], 'the batch is empty'), (list(x), 'a list, need one tensor'),
                      (x.masked_fill(x > 0.9, torch.nan), 'all finite'), (x/0, 'all finite'),
                      (x[..., :0], 'sides divisible by 4'), (x[:, :2], 'need .B, 3'),
                      (x[..., 1:], 'sides divisible by 4')):
        with pytest.raises(ValueError, match=said) as e: latents.encode(bad)
        assert '\n' not in str(e.value)
    z = latents.encode(x)
    for bad, said in ((z.long(), 'int64: need floats'), (z[:0], 'empty'),
                      (z[:, 1:], f'need .B, {latents.channels}, h, w'), (z[0], 'need .B, '), (z[..., :0], 'need .B, '),
                      ([z], 'a list, need one tensor')):
        with pytest.raises(ValueError, match=said): latents.decode(bad)
    assert latents.decode(z.double()).dtype == latents.decode(z.half()).dtype == torch.float32
    fit = PixelLatents.fit if isinstance(latents,
                                         PixelLatents) else lambda images: AutoencoderLatents.fit(latents.model, images)
    for bad, said in ((x[:0], 'the batch is empty'), (list(x), 'need one tensor'), (x.mul(127).byte(), 'need floats'),
                      (x*torch.nan, 'all finite'), (x[0], 'of shape')):
        with pytest.raises(ValueError, match=said): fit(bad)
    for value in (0., 0.3):
        with pytest.raises(ValueError, match='standard deviation.*cannot be brought to 0 and 1'):
            PixelLatents.fit(torch.full((2, 3, 8, 8), value))
    for wrong in (dict(patch_size=0), dict(scale=0.), dict(scale=torch.inf), dict(shift=torch.nan)):
        with pytest.raises(ValueError, match=next(iter(wrong))): PixelLatents(3, **wrong)

def test_the_encoders_checksum_is_of_its_values_alone(saved):
    load = lambda kind='AutoencoderDC', **how: AutoencoderLatents.from_pretrained(saved[kind], **how)
    one = load()
    assert len(one.encoder_checksum) == 16 and one.encoder_checksum == load(scale=3., shift=1., tiling=True,
        dtype=torch.bfloat16).encoder_checksum != load('AutoencoderKL').encoder_checksum
    assert PixelLatents(1, 2).encoder_checksum == ''
    before = one.checksum, one.encoder_checksum
    one.model.decoder.conv_in.weight.add_(1)                   # a fine-tuned decoder has the same latents
    assert (one.checksum, one.encoder_checksum) == before
    one.model.encoder.conv_out.bias.add_(1e-4)
    assert one.checksum != before[0] and one.encoder_checksum != before[1]
    kl = load('AutoencoderKL')
    before = kl.encoder_checksum
    kl.model.post_quant_conv.bias.add_(1); assert kl.encoder_checksum == before
    kl.model.quant_conv.bias.add_(1); assert kl.encoder_checksum != before

def test_names_revisions_and_changed_decoders(saved, tmp_path, monkeypatch):
    import huggingface_hub
    commit = tmp_path/'models--org--model/snapshots/0123abc'
    shutil.copytree(saved['AutoencoderKL'], commit/'vae')
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', lambda name, **how: str(commit))
    hub = AutoencoderLatents.from_pretrained('org/model', subfolder='vae', revision='main')
    assert (hub.name, hub.subfolder, hub.revision) == ('org/model', 'vae', '0123abc')
    # a cast is no training
    assert not hub.decoder_changed() and not hub.bfloat16().decoder_changed() and not hub.float().decoder_changed()
    hub.model.decoder.conv_out.bias.add_(1e-3)
    assert hub.decoder_changed() and hub.half().decoder_changed()
    half = AutoencoderLatents.from_pretrained('org/model', subfolder='vae', dtype=torch.float16)
    assert not half.decoder_changed() and half.revision == '0123abc'
    half.model.post_quant_conv.bias.add_(1)
    assert half.decoder_changed()
    local, memory = AutoencoderLatents.from_pretrained(
        saved['AutoencoderDC']), AutoencoderLatents(load_autoencoder(saved['AutoencoderDC']))
    assert (local.name, local.subfolder, local.revision) == (str(saved['AutoencoderDC']), '', '') and (memory.name,
        memory.subfolder, memory.revision) == ('', '', '')
    assert local.decoder_changed() and memory.decoder_changed()

def test_what_is_saved_replaces_what_was_there(saved, tmp_path):
    index = tmp_path/f'{weights}.index.json'
    one, other = AutoencoderLatents.from_pretrained(
        saved['AutoencoderKL']), AutoencoderLatents.from_pretrained(saved['AutoencoderDC'])
    one.save_pretrained(tmp_path, max_shard_size='50KB')
    assert index.exists() and len(list(tmp_path.glob(
        '*.safetensors'))) > 1 and AutoencoderLatents.from_pretrained(tmp_path).checksum == one.checksum
    (tmp_path/'README.md').write_text('mine')
    other.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['README.md', 'config.json',
                                                          weights] and AutoencoderLatents.from_pretrained(
                                                              tmp_path).checksum == other.checksum
    one.save_pretrained(tmp_path, max_shard_size='50KB')
    assert not (tmp_path/weights).exists() and AutoencoderLatents.from_pretrained(tmp_path).checksum == one.checksum
    # where it once lay is nobody's business
    assert '_name_or_path' not in json.loads((tmp_path/'config.json').read_text())

def test_an_index_beside_a_single_file_is_read_as_diffusers_reads_it(saved, copy):
    from diffusers import AutoencoderDC
    sharded = AutoencoderLatents.from_pretrained(copy)
    sharded.model.encoder.conv_out.bias.add_(1)
    single = (copy/weights).read_bytes()
    sharded.save_pretrained(copy, max_shard_size='50KB')
    (copy/weights).write_bytes(single)                          # both
    ours = AutoencoderLatents.from_pretrained(copy)
    assert ours.encoder_checksum == AutoencoderLatents(
        AutoencoderDC.from_pretrained(copy)).encoder_checksum == sharded.encoder_checksum
    for shard in copy.glob('*-of-*'): shard.unlink()
    with pytest.raises(OSError, match='cannot be loaded') as e: AutoencoderLatents.from_pretrained(copy)
    assert '\n' not in str(e.value)

def test_variants_and_odd_configs(saved, copy):
    from diffusers import AutoencoderDC
    AutoencoderDC.from_pretrained(copy).half().save_pretrained(copy, variant='fp16')
    (copy/weights).unlink()
    only = AutoencoderLatents.from_pretrained(copy)
    assert next(only.model.encoder.parameters()).dtype == torch.float32 and mse_loss(only.encode(random_images()),
        AutoencoderLatents.from_pretrained(saved['AutoencoderDC']).encode(random_images())) < 1e-4
    shutil.copy(copy/weights.replace('model', 'model.fp16'), copy/weights.replace('model', 'model.ema'))
    with pytest.raises(OSError, match='ema, fp16'): AutoencoderLatents.from_pretrained(copy)
    (copy/weights.replace('model', 'model.ema')).rename(copy/weights)
    config = json.loads((copy/'config.json').read_text())
    for odd in (None, 'x', 0, -1, float('nan')):
        (copy/'config.json').write_text(json.dumps(config | dict(scaling_factor=odd)))
        with pytest.raises(ValueError, match='scal') as e: AutoencoderLatents.from_pretrained(copy)
        assert '\n' not in str(e.value)
        assert AutoencoderLatents.from_pretrained(copy, scale=2., shift=0.).scale == 2
    (copy/'config.json').write_text(json.dumps({k: v for k,v in config.items() if k != 'scaling_factor'}
                                               | dict(shift_factor=None)))
    # what `diffusers` takes
    assert (AutoencoderLatents.from_pretrained(copy).scale, AutoencoderLatents.from_pretrained(copy).shift) == (1, 0)

@pytest.mark.parametrize('kind', ['small', 'attention', 'local'])
def test_checkpointed_activations_give_the_same_gradients(kind):
    import copy
    from diffusers import AutoencoderDC
    blocks = ('ResBlock', 'EfficientViTBlock')
    def make():
        if kind != 'attention': return small_autoencoder(4, 16, halvings=2, local=kind == 'local')
        torch.manual_seed(0)
        return AutoencoderDC(latent_channels=4, attention_head_dim=8, encoder_block_types=blocks,
                             decoder_block_types=blocks, encoder_block_out_channels=(16, 16),
                             decoder_block_out_channels=(16, 16),
                             encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1),
                             encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)))
    plain, saving = AutoencoderTraining(make()).train(), AutoencoderTraining(make()).train()
    saving.gradient_checkpointing_enable()
    def kept(training):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            loss = training(random_images()).loss
        loss.backward()
        return sum(sizes)
    assert kept(saving) < 0.7*kept(plain)                       # numbers that wait for the way back
    for (n, p), (m, q) in zip(plain.named_parameters(), saving.named_parameters()):
        assert n == m and torch.equal(p.grad, q.grad), n
    twin = copy.deepcopy(saving)                                # averaged weights are a copy
    with torch.no_grad():
        for p in twin.parameters(): p.zero_()
        assert saving(random_images()).loss.equal(plain(
            random_images()).loss) and not twin(random_images()).loss.equal(plain(random_images()).loss)
    with pytest.raises(ValueError, match='Linear.*checkpointing'):
        AutoencoderTraining(torch.nn.Linear(1, 1)).gradient_checkpointing_enable()

# --- one odd thing does not end everything

class Broken(list):
    "Examples of which some raise, in many ways"
    def __init__(self, examples, how): super().__init__(examples); self.how = how

    def __getitem__(self, k):
        if k in self.how: raise self.how[k]
        return super().__getitem__(k)

odd = {3: OSError('sea/a: b.png: the image is damaged'), 7: ValueError('a strange\nimage'),
       8: FileNotFoundError(2, 'No such file or directory', 'gone.png'), 22: OSError('image file is truncated')}
named = {'sea/a': 'b.png: the image is damaged', 'example 7': 'ValueError: a strange image',
         'gone.png': 'No such file or directory', 'example 22': 'OSError: image file is truncated'}
instead = [*examples[:3], examples[4], *examples[4:7], examples[9], examples[9], *examples[9:22], examples[0]]

@pytest.mark.parametrize('batch_size, shard_size', [(64, 4096), (2, 4), (1, 1)])
def test_broken_rows_are_replaced_and_named(tmp_path, batch_size, shard_size):
    how = dict(batch_size=batch_size, shard_size=shard_size, progress=False)
    cached, good = cache_latents(Broken(examples, odd), PixelLatents(1, 2), tmp_path/'broken',
                                 **how), cache_latents(instead, PixelLatents(1, 2), tmp_path/'good', **how)
    for name in contents(tmp_path/'good').keys() - {'index.json'}:
        assert contents(tmp_path/'broken')[name] == contents(tmp_path/'good')[name], name
    assert cached.captions == [r['captions']
                               for r in instead] and cached.report.left_out == named and CachedLatents(
                                   tmp_path/'broken').report.left_out == named
    assert good.report.left_out == {} and 'left_out' not in (tmp_path/'good/index.json').read_text()
    assert '4 left out' in str(cached.report)

def test_broken_images_sizes_and_all_broken(tmp_path):
    import io
    from PIL import Image
    file = io.BytesIO(); examples[1]['image'].resize((240, 160)).save(file, 'png')
    truncated = [dict(image=Image.open(io.BytesIO(file.getvalue()[:300])), captions=['cut']), *examples,
                 dict(captions=['none']), dict(image=None), 5]
    # the first example gives no size, either
    cached = cache_latents(truncated, PixelLatents(1, 2), tmp_path/'a', progress=False)
    assert cached.shape == (4, 8, 12) and list(cached.report.left_out) == ['example 0', 'example 24', 'example 25',
        'example 26'] and cached[0]['captions'] == examples[0]['captions'] == cached[26]['captions']
    every = Broken(examples, {k: OSError(f'{k}.png: gone') for k in range(23)})
    assert isinstance(fingerprint(every), str)
    for size in (None, (8, 8)):
        with pytest.raises(OSError, match='not one of 23 examples can be used; the first: 0.png: gone'):
            cache_latents(every, PixelLatents(1, 2), tmp_path/'b', size, progress=False)
    for size in (8, (8,), (0, 8), (8., 8), 'ab'):
        with pytest.raises(ValueError, match='height, width'):
            cache_latents(examples, PixelLatents(1, 2), tmp_path/'b', size, progress=False)
    assert not (tmp_path/'b').exists() or not list((tmp_path/'b').glob('[!.]*'))
    twice = Broken(examples, {1: OSError('x.png: a'), 2: OSError('x.png: b')})
    assert cache_latents(twice, PixelLatents(1, 2), tmp_path/'c', progress=False).report.left_out == {'x.png': 'a',
        'x.png (example 2)': 'b'}

def test_strict_ends_at_the_first(tmp_path):
    broken = Broken(examples, odd)
    with pytest.raises(OSError, match='sea/a: b.png: the image is damaged; strict reading ends here'):
        cache_latents(broken, PixelLatents(1, 2), tmp_path, progress=False, strict=True)
    assert not list(tmp_path.glob('[!.]*')) and not (tmp_path/'.lock').exists()
    cache_latents(broken, PixelLatents(1, 2), tmp_path, progress=False)
    # done already, and less strictly
    with pytest.raises(OSError, match='strict reading ends here'):
        cache_latents(broken, PixelLatents(1, 2), tmp_path, progress=False, strict=True)

def test_a_mended_row_is_other_data():
    from PIL import Image
    prints = [fingerprint(Broken(examples, odd)), fingerprint(Broken(examples, {k: odd[k] for k in (3, 7, 8)})),
              fingerprint(examples)]
    assert len(set(prints)) == 3 and fingerprint(Broken(examples, odd)) == prints[0]
    first, second = Broken(examples, {0: OSError('x')}), Broken([examples[1], examples[0], *examples[2:]],
                                                                {1: OSError('x')})
    assert fingerprint(first) != fingerprint(second)  # the same good examples, the bad one elsewhere: other latents
    class Unreadable:
        def __len__(self): return 1
        def __getitem__(self, k): return [dict(image=examples[0]['image'], captions=[object()])][k]
    with pytest.raises(TypeError): fingerprint(Unreadable())  # a fault of the program is no broken example

def test_broken_rows_after_a_kill_are_those_of_a_whole_run(tmp_path):
    class GivesUp(PixelLatents):
        calls = 0
        def encode(self, images):
            self.calls += 1
            if self.calls == 4: raise InterruptedError('killed')
            return super().encode(images)
    how = dict(batch_size=2, shard_size=4, progress=False)
    with pytest.raises(InterruptedError): cache_latents(Broken(examples, odd), GivesUp(1, 2), tmp_path/'killed', **how)
    assert len(json.loads((tmp_path/'killed/index.json').read_text(
        ))['shards']) == 1 and not (tmp_path/'killed/.lock').exists()
    for name in ('killed', 'whole'): cache_latents(Broken(examples, odd), PixelLatents(1, 2), tmp_path/name, **how)
    assert contents(tmp_path/'killed') == contents(tmp_path/'whole')

class Counting(PixelLatents):
    "Counts the images that are encoded"
    images = 0
    def encode(self, images): self.images += len(images); return super().encode(images)

@pytest.mark.parametrize('how', ['zeros', 'half', 'gone', 'empty'])
def test_a_damaged_shard_alone_is_computed_again(tmp_path, how):
    make = lambda: cache_latents(examples, latents, tmp_path, shard_size=8, progress=False)
    latents = Counting(1, 2)
    make(); files = contents(tmp_path)
    for name in shard_names(1):
        path, whole = tmp_path/name, files[name]
        if how == 'gone': path.unlink()
        else: path.write_bytes(dict(zeros=bytes(len(whole)), half=whole[:len(whole)//2], empty=b'')[how])
        latents.images = 0
        cached = make()
        assert contents(tmp_path) == files and latents.images == 8 and cached[9]['captions'] == examples[9]['captions']

@pytest.mark.parametrize('content', [bytes(700), b'', b'[]', b'{"version": 1}',
                                     b'{"version": 1, "key": {}, "examples": 23, "batch_size": 8, "shard_size": 8, '
                                     b'"shards": [3]}', b'\xff\xfe'])
def test_an_index_that_is_none_is_named(tmp_path, content):
    (tmp_path/'index.json').write_bytes(content)
    for use in (lambda: cache_latents(examples, PixelLatents(1, 2), tmp_path, progress=False),
                lambda: CachedLatents(tmp_path)):
        with pytest.raises(OSError, match=r'index\.json: ') as e: use()
        assert '\n' not in str(e.value)

def test_captions_and_names_with_half_characters(tmp_path):
    strange = Broken([{**examples[0], 'captions': ['caf\udce9', 'häuser 🐤']}, *examples[1:]],
                     {2: OSError('caf\udce9.png: gone')})
    cached = cache_latents(strange, PixelLatents(1, 2), tmp_path, progress=False)
    assert cached[0]['captions'] == ['caf\udce9',
                                     'häuser 🐤'] and CachedLatents(
                                         tmp_path).report.left_out == {'caf\udce9.png': 'gone'}

def test_a_finished_cache_is_read_where_nothing_can_be_written(tmp_path, monkeypatch):
    cache_latents(examples, PixelLatents(1, 2), tmp_path, progress=False)
    def no(*_, **__): raise AssertionError('writes')
    for name in ('open', 'rename', 'replace', 'utime', 'unlink', 'mkdir'): monkeypatch.setattr(os, name, no)
    assert len(cache_latents(examples, PixelLatents(1, 2), tmp_path, progress=False)) == 23

def test_other_rows_under_the_same_name(tmp_path):
    class Named(list): fingerprint = 'v1'
    cache_latents(Named(examples), PixelLatents(1, 2), tmp_path, progress=False)
    with pytest.raises(ValueError, match='other images or captions .23 examples there, 22 here'):
        cache_latents(Named(examples[1:]), PixelLatents(1, 2), tmp_path, progress=False)

def test_a_fingerprint_that_meets_a_missing_file(tmp_path):
    class Dated(list):
        @property
        def fingerprint(self): raise FileNotFoundError(2, 'No such file', 'a.png')
    assert fingerprint(Dated(examples)) == fingerprint(examples)

class Stack:
    def __call__(self, batch): return torch.stack([r['latents'] for r in batch])

@pytest.mark.long
def test_loaders_with_workers_that_are_spawned(tmp_path):
    import pickle
    cached = cache_latents(examples, PixelLatents(1, 2), tmp_path, shard_size=8, progress=False)
    cached[0]                                                                 # an open file stays behind
    assert torch.equal(pickle.loads(pickle.dumps(cached))[22]['latents'], cached[22]['latents'])
    found = torch.cat(list(torch.utils.data.DataLoader(cached, 6, collate_fn=Stack(), num_workers=1,
                                                       multiprocessing_context='spawn')))
    assert torch.equal(found, torch.stack([r['latents'] for r in cached]))

# --- runs that do not know of each other

apart = '''
import sys, time
from pathlib import Path
from v2flow_nbdev.data.sources import mosaics
from v2flow_nbdev.models.latents import PixelLatents
from v2flow_nbdev.data.cache import cache_latents
class Counts(PixelLatents):
    def encode(self, images):
        while not any('waiting for process' in Path(p).read_text() for p in sys.argv[3:]): time.sleep(0.01)      # the other one shall come in between
        with open(sys.argv[2], 'a') as f: f.write('x'*len(images))
        return super().encode(images)
cached = cache_latents(mosaics('train', 23, (2, 3)), Counts(1, 2), sys.argv[1], batch_size=2, shard_size=4)
print(sum(r['latents'].sum().item() for r in cached))
'''

def test_of_two_runs_one_computes_and_both_read(tmp_path):
    # as a launcher sets it, before there is a group
    env, said = {**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': '', 'WORLD_SIZE': '2'}, [tmp_path/'a',
        tmp_path/'b']
    for path in said: path.touch()
    running = [subprocess.Popen([sys.executable, '-c', apart, tmp_path/'cache', tmp_path/'counted', *said],
                                env={**env, 'RANK': str(i)}, stdout=subprocess.PIPE, stderr=path.open('w'), text=True)
               for i, path in enumerate(said)]
    sums = [p.communicate(timeout=120)[0] for p in running]
    assert [p.returncode for p in running] == [0, 0], [path.read_text() for path in said]
    assert (tmp_path/'counted').read_text() == 'x'*23 and sums[0] == sums[1]  # each image once
    assert sum('waiting for process' in path.read_text() for path in said) == 1
    cache_latents(examples, PixelLatents(1, 2), tmp_path/'one', batch_size=2, shard_size=4, progress=False)
    assert contents(tmp_path/'one') == contents(tmp_path/'cache')

def test_locks_of_the_dead_are_taken_over_and_those_of_the_living_are_not(tmp_path, monkeypatch, capfd):
    import platform
    from v2flow_nbdev.base import locks as module
    from v2flow_nbdev.base.locks import FolderLock
    make = lambda: cache_latents(examples, PixelLatents(1, 2), tmp_path)
    ended = subprocess.Popen([sys.executable, '-c', '']); ended.wait()
    (tmp_path/'.lock').write_text(f'{ended.pid} {platform.node()} token')
    # at once
    assert len(make()) == 23 and not (tmp_path/'.lock').exists(
        ) and f'{ended.pid} on {platform.node()} left a lock and is gone' in capfd.readouterr().err
    # elsewhere, half-written, a number given anew: silence tells
    for owner in ('1 another-machine token', '', f'{os.getppid()} {platform.node()} token', 'x'):
        shutil.rmtree(tmp_path); tmp_path.mkdir()
        monkeypatch.setattr(module, 'lock_silence', 0.3)
        (tmp_path/'.lock').write_text(owner)
        assert len(make()) == 23 and not (tmp_path/'.lock').exists(
            ) and 'gave no sign of life for' in capfd.readouterr().err
    living, other = FolderLock(tmp_path), FolderLock(tmp_path)
    assert living.take()
    date = lambda: (tmp_path/'.lock').stat().st_mtime_ns
    before, late = date(), time.monotonic() + 60
    while date() == before: assert time.monotonic() < late; time.sleep(0.01)  # it gives signs of life
    monkeypatch.setattr(module, 'lock_silence', 1000.)
    other.take(); other.since -= 2000
    os.utime(tmp_path/'.lock', ns=(1, 1))  # and is left alone for them, by whatever clock
    assert not other.take() and not other.take() and (tmp_path/'.lock').read_text() == living.mine
    other.release(); assert (tmp_path/'.lock').exists()  # nobody opens the lock of another
    living.release(); assert other.take()
    other.release(); assert not list(tmp_path.glob('.lock*'))

def test_no_file_of_a_run_that_is_at_work_is_removed(tmp_path):
    "The temporary files of another run are left alone until it is done"
    from v2flow_nbdev.base.locks import FolderLock
    import threading
    lock, theirs = FolderLock(tmp_path), tmp_path/'.abcdefgh.safetensors'
    assert lock.take(); theirs.write_bytes(b'being written')
    run = threading.Thread(target=lambda: cache_latents(examples, PixelLatents(1, 2), tmp_path, progress=False))
    run.start()
    run.join(1); assert run.is_alive() and theirs.exists() and not (tmp_path/'index.json').exists()
    lock.release(); run.join(60)
    assert not run.is_alive() and not theirs.exists() and len(CachedLatents(tmp_path)) == 23
