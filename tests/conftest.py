import os, subprocess, sys
from pathlib import Path
import pytest

root = Path(__file__).parent.parent
shipped = root/'data/checkpoints/digits'

def v2flow(*args, cwd=root, timeout=300, threads=2):
    "Run the real command in a process of its own, on the CPU"
    command = Path(sys.executable).with_name('v2flow')
    return subprocess.run([command, *map(str, args)], capture_output=True, text=True, cwd=cwd, timeout=timeout, 
                          env={**os.environ, 'CUDA_VISIBLE_DEVICES': '', 'OMP_NUM_THREADS': str(threads)})

@pytest.fixture(scope='session')
def pipe():
    from v2flow_nbdev.pipeline import V2FlowPipeline
    return V2FlowPipeline.from_pretrained(shipped)

slow = ['test_training', 'test_bad_input', 'test_processes', 'test_latents', 'test_checkpoint']

def pytest_collection_modifyitems(items):
    import torch
    items.sort(key=lambda i: slow.index(i.path.stem) if i.path.stem in slow else len(slow))      # the longest first: two workers then end together
    if not torch.cuda.is_available():
        for item in items:
            if 'cuda' in item.keywords: item.add_marker(pytest.mark.skip(reason='needs a CUDA device'))
