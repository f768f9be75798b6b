"Two processes with half a batch each learn the codebook that one process learns from the whole"
import os, subprocess, sys
import torch
from v2flow_nbdev.quantizer import VectorQuantizer

def learn(part, parts, folder, steps=12):
    "k-means, and `steps` updates on this part of each batch with and without revival; every process has random numbers of its own"
    torch.manual_seed(part)
    found = VectorQuantizer(4, 8); found(torch.randn(8, 6, 8)); found.init_codebook()
    learned = dict(kmeans=found.codebook)
    start = torch.nn.functional.normalize(torch.randn(24, 8, generator=torch.Generator().manual_seed(99)), dim=-1)
    for dead_below in (0., 0.8):
        vq = VectorQuantizer(24, 8, dead_below=dead_below, initialised=True)
        vq.codebook.copy_(start); vq.sums.copy_(start)
        for i in range(steps): vq(torch.randn(8, 6, 8, generator=torch.Generator().manual_seed(i)).chunk(parts)[part]); vq.update()
        learned.update({f'{n} {dead_below}': b for n,b in vq.named_buffers()})
    torch.save(learned, f'{folder}/{parts}-{part}.pt')

def launch(parts, folder):
    environment = {**os.environ, 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': '29511', 'WORLD_SIZE': str(parts), 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}
    code = (f'import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})\nimport torch.distributed as dist\nfrom test_processes import learn\nfrom v2flow_nbdev.quantizer import VectorQuantizer\n'
            "dist.init_process_group('gloo')\nlearn(dist.get_rank(), dist.get_world_size(), sys.argv[1])\ndist.destroy_process_group()")
    running = [subprocess.Popen([sys.executable, '-c', code, str(folder)], env={**environment, 'RANK': str(i)}, stderr=subprocess.PIPE, text=True) for i in range(parts)]
    for p in running:
        _, err = p.communicate(timeout=120)
        assert p.returncode == 0, err

def test_two_processes_learn_one_codebook(tmp_path):
    learn(0, 1, tmp_path); launch(2, tmp_path)
    whole, first, second = (torch.load(tmp_path/f'{n}.pt', weights_only=True) for n in ('1-0', '2-0', '2-1'))
    for name in first: assert torch.equal(first[name], second[name]), name          # to the last bit: revived codes and k-means too, though each process saw other vectors
    for name in ('codebook 0.0', 'counts 0.0', 'sums 0.0'): torch.testing.assert_close(first[name], whole[name], atol=1e-5, rtol=1e-5)
    assert not torch.equal(first['codebook 0.8'], first['codebook 0.0'])            # something was revived
