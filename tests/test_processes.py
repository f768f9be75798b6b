"Two processes with half a batch each do what one process does with the whole"
import json, os, subprocess, sys
from pathlib import Path
import pytest, torch
from conftest import root
from v2flow_nbdev.models.quantizer import VectorQuantizer

def learn(part, parts, folder, steps=12):
    """k-means, and `steps` updates on this part of each batch with and without revival; every process has random
    numbers of its own"""
    torch.manual_seed(part)
    found = VectorQuantizer(4, 8); found(torch.randn(8, 6, 8)); found.init_codebook()
    learned = dict(kmeans=found.codebook)
    start = torch.nn.functional.normalize(torch.randn(24, 8, generator=torch.Generator().manual_seed(99)), dim=-1)
    for threshold_dead_code in (0., 0.8):
        vq = VectorQuantizer(24, 8, threshold_dead_code=threshold_dead_code, initialised=True)
        vq.codebook.copy_(start); vq.sums.copy_(start)
        for i in range(steps):
            vq(torch.randn(8, 6, 8, generator=torch.Generator().manual_seed(i)).chunk(parts)[part]); vq.update()
        learned.update({f'{n} {threshold_dead_code}': b for n,b in vq.named_buffers()})
    torch.save(learned, f'{folder}/{parts}-{part}.pt')

def launch(parts, folder):
    environment = {**os.environ, 'WORLD_SIZE': str(parts), 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}
    code = (f'import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})\nimport torch.distributed as dist\nfrom '
            f'test_processes import learn\nfrom v2flow_nbdev.models.quantizer import VectorQuantizer\n'
            "import os; dist.init_process_group('gloo', init_method='file://' + sys.argv[1] + '/meeting', "
            "rank=int(os.environ['RANK']), world_size=int(os.environ['WORLD_SIZE']))\nlearn(dist.get_rank(), "
            "dist.get_world_size(), sys.argv[1])\nfrom v2flow_nbdev.training.failures import leave; leave(0)")
    running = [subprocess.Popen([sys.executable, '-c', code, str(folder)], env={**environment, 'RANK': str(i)},
                                stderr=subprocess.PIPE, text=True) for i in range(parts)]
    for p in running:
        _, err = p.communicate(timeout=900)
        assert p.returncode == 0, err

def test_two_processes_learn_one_codebook(tmp_path):
    learn(0, 1, tmp_path); launch(2, tmp_path)
    whole, first, second = (torch.load(tmp_path/f'{n}.pt', weights_only=True) for n in ('1-0', '2-0', '2-1'))
    # to the last bit: revived codes and k-means too, though each process saw other vectors
    for name in first: assert torch.equal(first[name], second[name]), name
    for name in ('codebook 0.0', 'counts 0.0', 'sums 0.0'):
        torch.testing.assert_close(first[name], whole[name], atol=1e-5, rtol=1e-5)
    assert not torch.equal(first['codebook 0.8'], first['codebook 0.0'])            # something was revived

def train_here(out, batch_size, fsdp):
    "Ten steps of an image tokenizer in float64, with everything random switched on"
    from v2flow_nbdev.data.sources import digits
    from v2flow_nbdev.base.images import to_tensor
    from v2flow_nbdev.models.tokenizer import V2Flow, V2FlowConfig
    from v2flow_nbdev.models.tokenizer_training import TokenizerTraining, TokenizerTrainingConfig
    from v2flow_nbdev.training.config import TrainConfig
    from v2flow_nbdev.training.loop import train
    from v2flow_nbdev.models.vocabulary import Vocabulary
    x = to_tensor([r['image'] for r in digits('train')[:200]], 1).double()
    torch.manual_seed(0)
    config = V2FlowConfig(codebook_size=24, dim=32, depth=1, velocity_width=32, resampler_width=32,
                          latent_shift=x.mean().item(), latent_scale=1/x.std().item(), threshold_dead_code=0.5)
    tok = TokenizerTraining(V2Flow(config, Vocabulary([f'w{i}' for i in range(700)], torch.randn(700, 16))),
                            TokenizerTrainingConfig(quantize_from=0.2, freeze_codes_at=0.7)).double()
    settings = TrainConfig(steps=10, batch_size=batch_size, lr=1e-2, mixed_precision='no', log_every=1, trackers=[],
                           fsdp=fsdp)
    tok = train(tok, [dict(images=i) for i in x], settings, out=out, progress=False)
    if int(os.environ.get('RANK', 0)) == 0: torch.save(tok.state_dict(), f'{out}/model.pt')

def start(processes, *args):
    "Under torchrun where there are several"
    code = [str(Path(__file__)), *map(str, args)]
    command = [sys.executable, *code] if processes == 1 else [sys.executable, '-m', 'torch.distributed.run',
                                                              '--standalone', '--nproc-per-node', str(processes), *code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900,
                          env={**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': '',
                               'PYTHONPATH': os.pathsep.join([*sys.path[:2], str(Path(__file__).parent)])})
    assert done.returncode == 0, done.stderr[-3000:]

@pytest.fixture(scope='module')
def alone(tmp_path_factory):
    out = tmp_path_factory.mktemp('alone'); start(1, out, 32, 0)
    return out

@pytest.mark.parametrize('fsdp', [pytest.param(False, marks=pytest.mark.long), True], ids=['copies', 'shards'])
def test_two_processes_train_the_model_that_one_trains(alone, tmp_path, fsdp):
    start(2, tmp_path, 16, int(fsdp))
    logs = [[json.loads(l) for l in (f/'log.jsonl').read_text().splitlines()] for f in (alone, tmp_path)]
    apart = max(abs(a[k] - b[k]) for a,b in zip(*logs) for k in ('loss', 'flow_loss', 'aux_loss', 'commitment_loss',
        'grad_norm'))
    print(f'largest difference of a loss or gradient norm: {apart:.1e}')
    assert len(logs[0]) == 10 and any(l['commitment_loss'] > 0 for l in logs[0]) and apart < 1e-12
    one, two = (torch.load(f/'model.pt', weights_only=True) for f in (alone, tmp_path))
    assert one['tok.quantizer.initialised']
    for name in one: torch.testing.assert_close(one[name], two[name], atol=1e-9, rtol=1e-9, msg=name)

def test_a_launcher_that_starts_fewer_than_asked_is_found_out(tmp_path):
    "On a machine without CUDA `accelerate launch` starts one process, whatever it was told"
    command = [Path(sys.executable).with_name('accelerate'), 'launch', '--cpu', '--num_processes', '2', '-m',
               'v2flow_nbdev.apps.cli', 'pretrain-llm', '--config', 'configs/digits-text.yaml', '--out',
               str(tmp_path/'run'), 'training.steps=20']
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=900,
                          env={**os.environ, 'CUDA_VISIBLE_DEVICES': ''})
    assert (done.returncode != 0 and '2 processes were asked for, but this one finds itself among 1' in done.stderr
            and not (tmp_path/'run/model').exists()), done.stderr

def test_the_real_command_in_two_processes_shards_the_model_and_weighs_words(tmp_path):
    """A language model's batches differ in words; torchrun of two with half a batch each, the tied model sharded
    between them, gives the weights of one"""
    from v2flow_nbdev.base.files import read_tensors
    def run(out, processes, batch_size):
        launch = [sys.executable, '-m'] if processes == 1 else [sys.executable, '-m', 'torch.distributed.run',
                                                                '--standalone', '--nproc-per-node', str(processes),
                                                                '-m']
        args = ['v2flow_nbdev.apps.cli', 'pretrain-llm', '--config', 'configs/digits-text.yaml', '--out', str(out),
                'training.steps=20', f'training.batch_size={batch_size}', 'training.mixed_precision=no',
                f'training.processes={processes}', f'training.fsdp={"true" if processes > 1 else "false"}',
                'llm.hidden_size=32', 'llm.num_hidden_layers=1', 'llm.intermediate_size=64', 'training.trackers=[]']
        done = subprocess.run(launch + args, capture_output=True, text=True, cwd=root, timeout=900,
                              env={**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''})
        assert done.returncode == 0, done.stderr[-3000:]
        return read_tensors(out/'model/model.safetensors'), [json.loads(l)['loss']
                                                             for l in (out/'log.jsonl').read_text().splitlines()]
    (one, losses), (two, same) = run(tmp_path/'one', 1, 16), run(tmp_path/'two', 2, 8)
    assert max(abs(a - b) for a,b in zip(losses, same)) < 1e-4 and len(losses) == 20
    for name in one: torch.testing.assert_close(one[name], two[name], atol=1e-3, rtol=1e-2, msg=name)

def test_a_data_set_is_encoded_by_two_processes_and_a_language_model_learns_from_it_in_two(tmp_path):
    """The same files of ids as from one; then DDP over gloo from ids alone: the losses and the weights of one
    process with the whole batch"""
    from v2flow_nbdev.data.cache import EncodedImages, encode_dataset
    from v2flow_nbdev.data.sources import digits
    from v2flow_nbdev.models.tokenizer import V2Flow
    from v2flow_nbdev.base.files import read_tensors
    from test_bad_input import own_llm
    own_llm(tmp_path/'text')
    tok = V2Flow.from_pretrained(root/'data/checkpoints/digits/image_tokenizer')
    shared = ['--config', 'configs/digits-llm.yaml', f'image_tokenizer={root}/data/checkpoints/digits/image_tokenizer',
              'data.copies=0']
    def command(processes, *args):
        launch = [sys.executable, '-m'] if processes == 1 else [sys.executable, '-m', 'torch.distributed.run',
                                                                '--standalone', '--nproc-per-node', str(processes),
                                                                '-m']
        done = subprocess.run([*launch, 'v2flow_nbdev.apps.cli', *map(str, args)], capture_output=True, text=True,
                              cwd=root, timeout=900, env={**os.environ, 'OMP_NUM_THREADS': '1',
                                                          'CUDA_VISIBLE_DEVICES': ''})
        assert done.returncode == 0, done.stderr[-3000:]
    command(2, 'encode-dataset', '--out', tmp_path/'ids', *shared)
    alone = encode_dataset(digits('train'), tok, tmp_path/'alone', progress=False)
    there = EncodedImages(tmp_path/'ids/8x8', tok)
    assert len(there) == 1500 and there.shards == alone.shards and torch.equal(there[1499]['ids'], alone[1499]['ids'])
    def run(out, processes, batch_size):
        command(processes, 'train-llm', '--out', out, *shared, 'data.name=ids', f'data.folder={tmp_path}/ids',
                f'llm.pretrained={tmp_path}/text', 'llm.text_share=0.2', 'llm.visual_softmax=true', 'llm.text_weight=3',
                'llm.save_dtype=float32', 'training.steps=8', 'training.evaluate_every=0',
                f'training.batch_size={batch_size}', f'training.processes={processes}', 'training.mixed_precision=no',
                'training.trackers=[]')
        return [json.loads(l)['loss']
            for l in (out/'log.jsonl').read_text().splitlines()], read_tensors(out/'model/llm/model.safetensors')
    (losses, one), (same, two) = run(tmp_path/'one', 1, 16), run(tmp_path/'two', 2, 8)
    assert len(losses) == 8 and max(abs(a - b) for a,b in zip(losses, same)) < 1e-4
    for name in one: torch.testing.assert_close(one[name], two[name], atol=1e-3, rtol=1e-2, msg=name)

if __name__ == '__main__':
    from v2flow_nbdev.training.failures import leave
    train_here(sys.argv[1], int(sys.argv[2]), bool(int(sys.argv[3])))
    leave(0)  # as the command does: gloo's threads are still there
