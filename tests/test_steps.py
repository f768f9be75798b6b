"A training step asks nothing of the device: no value is read, no shape depends on one, and few operations are queued"
from types import SimpleNamespace
import pytest, torch
from torch.utils._python_dispatch import TorchDispatchMode
from v2flow_nbdev.language.adapters import choose_trained
from v2flow_nbdev.language.losses import TargetLoss
from v2flow_nbdev.language.text_models import collate, toy_llama, toy_v2flow
from v2flow_nbdev.language.visual_tokens import add_visual_tokens
from v2flow_nbdev.models.autoencoder import AutoencoderTraining, small_autoencoder
from v2flow_nbdev.models.latents import AutoencoderLatents
from v2flow_nbdev.models.quantizer import VectorQuantizer
from v2flow_nbdev.models.tokenizer import V2Flow, V2FlowConfig
from v2flow_nbdev.models.tokenizer_training import DecoderTraining, TokenizerTraining
from v2flow_nbdev.models.vocabulary import Vocabulary
from v2flow_nbdev.training.config import TrainConfig
from v2flow_nbdev.training.loop import Trainer, train
from v2flow_nbdev.training.optimizers import EMAModel, make_optimizer, step_unless
from v2flow_nbdev.training.processes import start_processes

reads = ('_local_scalar_dense', 'is_nonzero', 'nonzero', 'masked_select', 'bincount', '_unique2', 'unique_dim', 'equal',
         'unique_consecutive', 'repeat_interleave')

class Watch(TorchDispatchMode):
    "Operations of a step; those that would wait for a GPU. One number drawn on the CPU may be read: it never was there"
    def __init__(self): super().__init__(); self.operations, self.waits, self.drawn = 0, [], []
    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        name = f._schema.name.split('::')[1]
        self.operations += 1
        own = name == '_local_scalar_dense' and any(args[0] is t for t in self.drawn)
        masks = [t for t in (args[1] if name in ('index', 'index_put_', 'index_put') else ()) if t is not None
                 and t.dtype in (torch.bool, torch.uint8)]
        if name in reads and not own or masks: self.waits.append(name)
        out = f(*args, **(kwargs or {}))
        if name in ('rand', 'randint') and out.dim() == 0 or name == 'detach' and any(args[0] is t for t in self.drawn):
            self.drawn.append(out)
        return out

def words(): return Vocabulary([f'w{i}' for i in range(700)], torch.randn(700, 16))

def tokenizer():
    return TokenizerTraining(V2Flow(V2FlowConfig(codebook_size=16, dim=32, depth=1, velocity_width=32), words()))

def decoder():
    latents = AutoencoderLatents.fit(small_autoencoder(4, 8, halvings=2), torch.rand(8, 3, 16, 16)*2 - 1)
    tok = V2Flow(V2FlowConfig(image_size=(16, 16), image_channels=3, patch_size=4, latent_channels=4,
        autoencoder='small', codebook_size=16, dim=32, depth=1, n_iter=2, n_steps=2), words(), latents)
    tok.quantizer.initialised.fill_(True)
    return DecoderTraining(tok, flow=True)

def llm(loss=False):
    model, tokenizer_ = toy_llama(['a red square', 'a blue circle']*4)
    visual = add_visual_tokens(model, tokenizer_, toy_v2flow(model, tokenizer_))
    if loss == 'distillation': return TargetLoss(choose_trained(model, 'lora', 2), 2., distillation=True)
    return TargetLoss(model, 2.) if loss else model

images = lambda channels, side: [dict(images=torch.rand(8, channels, side, side)*2 - 1)]
texts = lambda: [collate([([0], [1, 2, 30, 31]), ([0, 3], [4])])]*2
kinds = dict(  # how to make it, its batches, ceilings of operations by step: the first, one with codes, one with frozen codes
    tokenizer=(tokenizer, images(1, 8), {0: 1630, 3: 1370, 8: 1020}), decoder=(decoder, images(3, 16), {1: 1870}),
    autoencoder=(lambda: AutoencoderTraining(small_autoencoder(4, 8, halvings=2), 0.1), images(3, 16), {1: 500}),
    llm=(llm, texts, {1: 1105}), target_loss=(lambda: llm(True), texts, {1: 1170}),
    distillation=(lambda: llm('distillation'), texts, {1: 2400}))

def trainer_of(make, **how):
    torch.manual_seed(0)
    config = TrainConfig(steps=10, mixed_precision='no', **how)
    return Trainer(make().train(), config, start_processes(config))

@pytest.mark.parametrize('kind', kinds)
def test_a_step_waits_for_nothing_and_queues_few_operations(kind, monkeypatch):
    monkeypatch.setattr('v2flow_nbdev.language.losses.may_choose', lambda device: False)  # as on a GPU
    make, batches, ceilings = kinds[kind]
    trainer = trainer_of(make)
    batches = batches() if callable(batches) else batches
    ema, found = EMAModel(trainer.model, make()), {}
    for step in range(max(ceilings) + 1):
        with Watch() as seen: ema.update(0.9, trainer.step(step, batches))
        if step in ceilings: found[step] = seen.operations; assert not seen.waits, (step, seen.waits)
    losses = trainer.read()
    assert [s for s, *_ in losses] == list(range(max(ceilings) + 1)) and all(taken for _,_,taken,_,_ in losses)
    print(kind, found)
    assert all(n <= ceilings[step] for step, n in found.items()), found

def state_of(trainer, ema):
    "Everything that a step may change"
    moments = {f'{i} {k}': v for i, s in enumerate(trainer.optimizer.state.values()) for k, v in s.items()}
    return {k: v.clone() for k, v in {**trainer.model.state_dict(), **moments, **{f'ema {k}': v for k, v in
                                                                                  ema.values.items()}}.items()}

@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_a_step_without_a_finite_gradient_changes_nothing(optimizer):
    trainer = trainer_of(tokenizer, optimizer=optimizer)
    ema, batch = EMAModel(trainer.model, tokenizer()), images(1, 8)[0]['images']
    def step(i, x): ema.update(0.9, trainer.step(i, [dict(images=x)]))
    for i in range(3): step(i, batch)
    before = state_of(trainer, ema)
    assert before['tok.quantizer.initialised']
    step(3, batch.index_fill(0, torch.tensor(1), torch.nan))
    for name, value in state_of(trainer, ema).items(): assert torch.equal(value, before[name]), name
    assert [taken for _,_,taken,_,_ in trainer.read()] == [True]*3 + [False] and trainer.skipped == 1
    step(3, batch)
    assert trainer.read()[0][2] and trainer.skipped == 0
    assert all(not torch.equal(value, before[name]) for name, value in state_of(trainer, ema).items()
               if name in ('tok.quantizer.codebook', 'tok.masked.mask_token', 'ema tok.masked.mask_token'))

def test_ten_steps_without_a_finite_gradient_end_a_run_at_the_tenth_whenever_losses_are_read():
    class Line(torch.nn.Module):
        def __init__(self): super().__init__(); self.w = torch.nn.Parameter(torch.ones(1))
        def forward(self, x): return SimpleNamespace(loss=(self.w*x).square().mean())
    for every in (1, 7, 0):
        config = TrainConfig(steps=40, batch_size=2, log_every=every, mixed_precision='no')
        with pytest.raises(RuntimeError, match='in 10 steps in a row, the last is step 9 .*examples of its batch'):
            train(Line(), [dict(x=torch.tensor([torch.nan]))]*8, config, progress=False)

def test_dead_codes_are_revived_as_by_a_list_of_them():
    "Against the plain form, whose shapes depend on how many are dead"
    torch.manual_seed(0); vq = VectorQuantizer(24, 8, threshold_dead_code=0.5, initialised=True)
    x = torch.nn.functional.normalize(torch.randn(10, 8), dim=-1)                  # fewer vectors than dead codes
    vq.counts.copy_(torch.rand(24)**4)
    codebook, sums, counts, usual = vq.codebook.clone(), vq.sums.clone(), vq.counts.clone(), vq.counts.mean()
    dead = (counts < 0.5*usual).nonzero().flatten()
    new = x[torch.randperm(10, generator=torch.Generator().manual_seed(3))][:len(dead)]
    assert len(dead) > len(new); dead = dead[:10]
    codebook[dead], sums[dead], counts[dead] = new, new*usual, usual
    vq.revive(x, torch.Generator().manual_seed(3))
    for a, b in ((vq.codebook, codebook), (vq.sums, sums), (vq.counts, counts)): assert torch.equal(a, b)

@pytest.mark.parametrize('moment', [0., pytest.param(0.2, marks=pytest.mark.long), pytest.param(
    0.9, marks=pytest.mark.long)], ids=['noise', 'codes', 'frozen'])
def test_the_tokenizer_is_one_graph(moment):
    "`fullgraph=True` raises at the first break"
    losses, batch = [], torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    for compiled in (False, True):
        torch.manual_seed(0); model = tokenizer().train()
        if moment: model.tok.quantizer.initialised.fill_(True)
        model.before_step(moment)
        if compiled: model.compile(fullgraph=True, backend='eager')
        torch.manual_seed(2); loss = model(images=batch).loss; loss.backward()
        losses += [loss, model.tok.masked.mask_token.grad]
    for a, b in zip(losses[:2], losses[2:]): torch.testing.assert_close(a, b)

@pytest.mark.parametrize('target', [False, pytest.param(True, marks=pytest.mark.long)])
def test_the_language_model_is_one_graph(target):
    model, batch, losses = llm(target).train(), texts()[0], []
    for compiled in (False, True):
        if compiled: model.compile(fullgraph=True, backend='eager')
        losses.append(model(**batch).loss)
    torch.testing.assert_close(*losses); losses[1].backward()

def test_a_process_draws_noise_of_its_own_unless_the_model_shares_its_draws():
    class Noisy(torch.nn.Module):
        def __init__(self): super().__init__(); self.w = torch.nn.Parameter(torch.ones(1)); self.seen = []
        def forward(self, x): self.seen.append(torch.rand(3)); return SimpleNamespace(loss=(self.w*x).mean())
    def drawn(rank, shares):
        trainer = trainer_of(Noisy); trainer.model.shares_draws = shares
        place = SimpleNamespace(device=torch.device('cpu'), num_processes=1, process_index=rank, prepare=lambda m: m,
                                no_sync=None)
        again = Trainer(trainer.model, trainer.config, place)
        again.step(3, [dict(x=torch.ones(1))])
        return trainer.model.seen[0]
    assert torch.equal(drawn(0, False), drawn(0, True)) and torch.equal(drawn(1, True), drawn(0, True))
    assert not torch.equal(drawn(1, False), drawn(0, False))

@pytest.mark.cuda
@pytest.mark.parametrize('kind', kinds)
def test_on_a_gpu_a_step_waits_for_nothing(kind):
    "The same by CUDA itself, which raises where a step would wait"
    make, batches, ceilings = kinds[kind]
    trainer = trainer_of(lambda: make().to('cuda'))
    batches = [{k: v.cuda() if torch.is_tensor(v) else v for k, v in batch.items()}
               for batch in (batches() if callable(batches) else batches)]
    ema = EMAModel(trainer.model, make().to('cuda'))
    for step in range(max(ceilings) + 1):
        if step in ceilings and step: torch.cuda.set_sync_debug_mode('error')
        try: ema.update(0.9, trainer.step(step, batches))
        finally: torch.cuda.set_sync_debug_mode('default')
    assert all(taken for _,_,taken,_,_ in trainer.read())
