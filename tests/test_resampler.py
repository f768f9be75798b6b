"The kernel that draws noise on a GPU, run by Triton's interpreter on the CPU"
import os, subprocess, sys
import pytest
from conftest import root

code = """
import math, torch, torch.nn.functional as F
from v2flow_nbdev.models import resampler

def by_kernel(logits, scale, seed, start, first):
    key = (seed*0x9E3779B97F4A7C15 + first) % 2**63
    rows, columns = logits.shape
    resampler.gumbel_kernel[rows, -(-columns//1024)](logits, logits.stride(0), columns, scale, key, start, size=1024)
resampler.add_noise = by_kernel

# the law: Gumbel's mean and variance, no row and no seed like another
noise = torch.zeros(2, 24, 1500)
for seed in (0, 1): by_kernel(noise[seed], 1., 7 + seed, 0, 0)
assert abs(noise.mean() - 0.5772) < 0.02 and abs(noise.var() - math.pi**2/6) < 0.04
assert noise.flatten(0, 1).corrcoef().fill_diagonal_(0).abs().max() < 0.15
# the place alone decides: whatever the block, and the process
part = torch.zeros(8, 300); by_kernel(part, 2., 7, 1024, 10)
assert torch.equal(part, 2*noise[0, 10:18, 1024:1324])

# resample, its output and gradients, against the plain form with the same noise
torch.manual_seed(0)
inputs = [t.requires_grad_() for t in (torch.randn(9, 16), torch.randn(1500, 16)/4, torch.randn(1500)/3)]
table, g, noise = torch.randn(1500, 20), torch.randn(9, 20), torch.zeros(9, 1500)
by_kernel(noise, 1., 3, 0, 5)
def gradients(f): out = f(*inputs); return out, *torch.autograd.grad(out, inputs, g)
plain = gradients(lambda x, w, b: ((F.linear(x, w, b) + noise)/0.7).softmax(-1) @ table)
for block in (512, 1024):
    ours = gradients(lambda x, w, b: resampler.resample(x, w, b, table, 0.7, 1., 3, first=5, block=block))
    for a, b in zip(ours, plain): torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
"""

def test_the_noise_kernel_by_the_interpreter():
    "Its law; a function of seed, row and column alone; and the resampler equals the plain form with it"
    pytest.importorskip('triton', reason='Triton is not made for this system')
    env = {**os.environ, 'TRITON_INTERPRET': '1', 'CUDA_VISIBLE_DEVICES': ''}
    done = subprocess.run([sys.executable, '-c', code], cwd=root, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
