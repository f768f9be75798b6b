"Kill a real training and resume it: the result is the same as if nothing had happened"
import json, os, signal, subprocess, sys, time
from pathlib import Path
import pytest, torch
from conftest import root, v2flow
from v2flow_nbdev.vocabulary import read_tensors

@pytest.fixture(scope='module')
def text(tmp_path_factory):
    out = tmp_path_factory.mktemp('text')
    done = v2flow('pretrain-llm', '--config', 'configs/digits-text.yaml', '--out', out, 'training.steps=10')
    assert done.returncode == 0, done.stderr
    return out/'llm'

def test_killed_and_resumed_is_the_same_run(text, tmp_path):
    args = ['train-tokenizer', '--config', 'configs/digits-tokenizer.yaml', 'training.steps=24', 'training.evaluations=8', 'training.batch_size=16', 'data.copies=0', 'data.sizes=[[8, 8], [12, 4]]', f'vocabulary={text}']
    whole = v2flow(*args, '--out', tmp_path/'whole'); assert whole.returncode == 0, whole.stderr
    command = Path(sys.executable).with_name('v2flow')
    process = subprocess.Popen([command, *args, '--out', tmp_path/'killed'], cwd=root, stderr=subprocess.DEVNULL)
    state = tmp_path/'killed/checkpoint/state.json'
    def steps_done():
        try: return json.loads(state.read_text())['step']
        except FileNotFoundError: return 0                       # not yet, or just between two renames
    while steps_done() < 9:
        assert process.poll() is None, 'ended before it could be killed'
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL); process.wait()
    assert not (tmp_path/'killed/image_tokenizer').exists()
    resumed = v2flow(*args, '--out', tmp_path/'killed', '--resume'); assert resumed.returncode == 0, resumed.stderr
    a, b = (read_tensors(tmp_path/n/'image_tokenizer/model.safetensors') for n in ('whole', 'killed'))
    for name in a: assert torch.equal(a[name], b[name]), name
    logs = [[{k: v for k,v in json.loads(l).items() if k != 'seconds'} for l in (tmp_path/n/'log.jsonl').read_text().splitlines()] for n in ('whole', 'killed')]
    assert logs[0] == logs[1]

def test_the_paper_recipe_is_the_base_preset_and_is_planned_without_building():
    import yaml
    from v2flow_nbdev.tokenizer import V2FlowConfig, costs
    from v2flow_nbdev.training import TrainConfig
    from v2flow_nbdev.vocabulary import config_from_dict
    recipe = yaml.safe_load((root/'configs/imagenet-llama2.yaml').read_text())
    shape, training = config_from_dict(V2FlowConfig, recipe['model']), config_from_dict(TrainConfig, recipe['training'])
    assert shape == V2FlowConfig.base() and (shape.vocab_size, shape.vocab_dim, shape.codebook_size) == (32_000, 4096, 16_384)
    assert training.batch_size*shape.grid[0]*shape.grid[1] >= shape.codebook_size                  # enough vectors for its k-means
    done = v2flow('train-tokenizer', '--config', 'configs/imagenet-llama2.yaml', '--dry-run')
    assert done.returncode == 0 and not done.stderr, done.stderr
    weights = sum(costs(shape)['parameters'].values())/1e6
    for part in ('16×16 tokens of 16,384 codes, among 32,000 words of width 4,096', f'{weights:,.2f} M weights', '1,000,000 steps'): assert part in done.stdout, done.stdout

def test_pooled_tokens_on_mixed_mosaics(text, tmp_path):
    "A quarter of the tokens, two shapes of pictures in one training, and both directions on a third shape"
    from v2flow_nbdev.data import mosaics, to_tensor
    from v2flow_nbdev.tokenizer import V2Flow
    done = v2flow('train-tokenizer', '--config', 'configs/mosaics-tokenizer.yaml', '--out', tmp_path, f'vocabulary={text}', 'data.n=40', 'data.tiles=[3, 3]', 'data.sizes=[[16, 16], [24, 8]]',
                  'model.image_size=[16, 16]', 'model.pool=2', 'model.codebook_size=16', 'training.steps=16', 'training.batch_size=8', 'training.evaluations=1')
    assert done.returncode == 0, done.stderr
    tok = V2Flow.from_pretrained(tmp_path, subfolder='image_tokenizer')
    images = to_tensor([r['image'] for r in mosaics('test', 3, (2, 3))], 1)
    ids = tok.encode(images)
    assert ids.shape == (3, 4*6) and tok.decode(ids, grid=(4, 6), n_iter=96).shape == images.shape      # 24 ids for 8×12 latents, one revealed at a time
    with pytest.raises(ValueError, match='need'): tok.decode(ids)                                      # its own grid is 4×4

def test_one_picture_many_times_is_learned():
    "Overfit four pictures: the first thing to try with any change of the model"
    from v2flow_nbdev.data import digits
    from v2flow_nbdev.metrics import pixels, psnr
    from v2flow_nbdev.tokenizer import V2Flow, V2FlowConfig
    from v2flow_nbdev.training import TrainConfig, train
    from v2flow_nbdev.vocabulary import Vocabulary
    torch.manual_seed(0)
    x = pixels(digits('train')[:4])
    config = V2FlowConfig(codebook_size=32, dim=48, depth=1, velocity_width=64, latent_shift=x.mean().item(), latent_scale=1/x.std().item())
    tok = V2Flow(config, Vocabulary([f'w{i}' for i in range(40)], torch.randn(40, 32)))
    tok = train(tok, [dict(images=i) for i in x], TrainConfig(steps=250, batch_size=32, lr=3e-3, ema_decay=0.9), progress=False).cpu()
    back = tok.decode(tok.encode(x), temperature=0.5, generator=torch.Generator().manual_seed(0))
    assert psnr(back, x).mean() > 18 and len(tok.encode(x).unique()) >= 24

def test_image_folder_can_be_trained_on(text, tmp_path):
    "A user's own pictures, in colour, not square"
    from PIL import Image
    pictures = tmp_path/'pictures'; pictures.mkdir()
    for i in range(12): Image.effect_noise((40, 30), 10 + 5*i).convert('RGB').save(pictures/f'noise_{i}.png'); (pictures/f'noise_{i}.txt').write_text('a white digit on a black ground\n')
    done = v2flow('train-tokenizer', '--config', 'configs/digits-tokenizer.yaml', '--out', tmp_path/'run', f'vocabulary={text}', 'data.name=image_folder', f'data.folder={pictures}', 'data.copies=0',
                  'model.image_size=[8, 12]', 'model.image_channels=3', 'model.codebook_size=16', 'training.steps=12', 'training.batch_size=8', 'training.evaluations=1')
    assert done.returncode == 0, done.stderr
    done = v2flow('encode', pictures/'noise_0.png', '--model', tmp_path/'run'); assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)) == 24
