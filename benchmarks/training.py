"""A training step by the library's loop beside the one that one would write first: a group of `bench`.

    python -m benchmarks.bench training      rows of results.json and of the table in README.md

The LLaMA has the size of the shipped one of emoji (6.8 M parameters), sequences of 280 tokens, 4 of them a step on a CPU and 64 on CUDA;
on CUDA there is one of the size of SmolLM2-135M besides, and rows of the arithmetic reached"""
import hashlib
from pathlib import Path
import torch
from benchmarks import bench, plain_training
from v2flow_nbdev.training.config import TrainConfig
from v2flow_nbdev.training.loop import Trainer
from v2flow_nbdev.training.optimizers import EMAModel

small = dict(hidden_size=256, intermediate_size=688, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=8,
             vocab_size=8192 + 2048)
smollm2 = dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
               vocab_size=49_152 + 2048)

def baseline():
    "The hash of the plain form's file, so that nobody slows it down"
    return {'plain_training.py': hashlib.sha256(Path(plain_training.__file__).read_bytes()).hexdigest()[:16]}

class OurSteps:
    "The library's step and average; the losses are read every ten steps, as in `train`"
    def __init__(self, model):
        import copy
        from accelerate import Accelerator
        config = TrainConfig(steps=10_000, lr=1e-3, weight_decay=0.05, mixed_precision='bf16' if bench.cuda else 'no')
        self.trainer, self.done = Trainer(model.train(), config, Accelerator(cpu=not bench.cuda)), 0
        self.ema = EMAModel(model, copy.deepcopy(model))

    def step(self, batch):
        taken = self.trainer.step(self.done, [batch])
        self.ema.update(0.999, taken)
        self.done += 1
        if len(self.trainer.unread) == 10: self.trainer.read()

def llm_case(side, size=small, sequences=4, length=280, steps=1, compiled=False):
    "Steps of a LLaMA on random tokens"
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, max_position_embeddings=512, **size)).to(bench.device)
    ids = torch.randint(size['vocab_size'], (sequences, length), device=bench.device)
    batch = dict(input_ids=ids, labels=ids, attention_mask=torch.ones_like(ids))
    if compiled: model.compile()
    form = (plain_training.PlainSteps if side == 'plain' else OurSteps)(model)
    def run(n=steps):
        for _ in range(n): form.step(batch)
    # 6 operations for a parameter and token, and attention's products; embeddings are looked up, but the head is multiplied
    flops = 6*sum(p.numel() for p in model.parameters())*ids.numel() + 6*size['num_hidden_layers']*size['hidden_size']*ids.numel()*length
    return bench.Case(run, lambda: run(1), more=dict(flops=lambda: flops, rate=bench.matmul_rate))

def training():
    "Rows: time, and on CUDA the arithmetic reached"
    cases = [('step of a 6.8M LLaMA', dict())]
    if bench.cuda:
        cases = [('ten steps of a 6.8M LLaMA, bf16', dict(sequences=64, steps=10)),
                 ('ten steps of a 6.8M LLaMA, bf16, compiled', dict(sequences=64, steps=10, compiled=True)),
                 ('ten steps of a 135M LLaMA, bf16', dict(size=smollm2, sequences=32, steps=10)),
                 ('ten steps of a 135M LLaMA, bf16, compiled', dict(size=smollm2, sequences=32, steps=10, compiled=True))]
    for name, options in cases:
        with bench.Pair(llm_case, **options) as pair:
            times, memory = pair.turns(7)
            for r in bench.rows(f'training, {name}', times, memory): yield r | dict(baseline=baseline())
            if bench.cuda:
                flops, rate = options['steps']*pair.ask('ours', 'flops'), pair.ask('ours', 'rate')
                yield bench.row(f'training, {name}', 'arithmetic reached', *(flops/times[s]/rate for s in bench.sides)) | dict(
                    baseline=baseline())
