"Checkpoints in shards: written by each process, read by any number of processes, whole or not there"
import json, os, signal, socket, subprocess, sys, traceback
from pathlib import Path
import pytest, torch
from torch import nn

class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.inner, self.outer = nn.Linear(width, 3*width), nn.Linear(3*width, width)

    def forward(self, x): return x + self.outer(torch.tanh(self.inner(x)))

class Net(nn.Module):
    "Tied tables, a parameter with fewer rows than there are processes, a buffer that counts, a frozen parameter"
    _no_split_modules = ('Block',)
    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.blocks, self.head = nn.Embedding(11, 8), nn.ModuleList(Block(8) for _ in range(2)), nn.Linear(
            8, 11, bias=False)
        self.head.weight, self.gain = self.table.weight, nn.Parameter(torch.ones(1, 8))
        self.fixed = nn.Parameter(torch.randn(5, 8), requires_grad=False)
        self.register_buffer('steps', torch.tensor(0)); self.register_buffer('ready', torch.tensor(False))
        self.to(dtype)

    def forward(self, ids):
        x = self.table(ids)*self.gain + self.fixed[ids % 5]
        for block in self.blocks: x = block(x)
        loss = nn.functional.cross_entropy(self.head(x).flatten(0, 1), ids.roll(-1, 1).flatten())
        return dict_output(loss=loss)

    def after_step(self, taken): self.steps += taken; self.ready.fill_(True)

class dict_output(dict):
    __getattr__ = dict.__getitem__

def train_net(out, processes, fsdp, dtype=torch.float64, resume=False, watch=None):
    """20 steps of 12 sequences each, a checkpoint after 10; `watch` names the file for the whole state when it is
    restored. Nothing may be gathered while a checkpoint is written or read"""
    from torch.distributed.tensor import DTensor
    from v2flow_nbdev.training import loop, shards
    from v2flow_nbdev.training.config import TrainConfig
    from v2flow_nbdev.training.optimizers import full_tensor
    g = torch.Generator().manual_seed(5)
    data = [dict(ids=torch.randint(11, (6,), generator=g)) for _ in range(30)]
    restore, tensors, gather = loop.restore_own, loop.own_tensors, DTensor.full_tensor
    def state(*parts): return {k: full_tensor(t).clone() for k,t in shards.flat(tensors(*parts)).items()}
    def forbidden(self): raise AssertionError('a tensor was gathered')
    def watched_restore(begun, *parts):
        DTensor.full_tensor = forbidden
        restore(begun, *parts)
        DTensor.full_tensor = gather
        if watch: torch.save(state(*parts), f'{out}/{watch}-{os.environ["RANK"]}.pt')
    def watched_tensors(*parts):
        if watch: torch.save(state(*parts), f'{out}/saved-{len(list(out.glob("saved*")))}.pt')
        return tensors(*parts)
    loop.restore_own, loop.own_tensors, save = watched_restore, watched_tensors, loop.save_own
    def watched_save(*args):
        DTensor.full_tensor = forbidden
        try: save(*args)
        finally: DTensor.full_tensor = gather
    loop.save_own = watched_save
    config = TrainConfig(steps=20, batch_size=12//processes, lr=1e-2, mixed_precision='no', log_every=1, fsdp=fsdp,
                         checkpoint_every=10, evaluate_every=0, trackers=(), save_total_limit=9)
    loop.train(Net(dtype), data, config, out=out, resume=resume, progress=False)

def meet(processes, do):
    "Fork that many processes, which find each other as under torchrun; their exit codes"
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    children = []
    for rank in range(processes):
        if (child := os.fork()): children.append(child); continue
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), MASTER_ADDR='127.0.0.1',
                          LOCAL_WORLD_SIZE=str(processes), MASTER_PORT=str(port))
        if processes == 1:
            for name in ('LOCAL_RANK', 'WORLD_SIZE', 'LOCAL_WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT'):
                del os.environ[name]
        code = 1
        try: do(rank); code = 0
        except BaseException: traceback.print_exc()
        finally: sys.stderr.flush(); os._exit(code)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]

def full_disk(rank, out):
    "The second process finds the disk full at its save"
    from torch.distributed.checkpoint import HuggingFaceStorageWriter as Writer
    write, calls = Writer.write_data, []
    def write_data(*args):
        calls.append(1)
        if rank == 1 and len(calls) == 1: raise OSError(28, 'No space left on device')
        return write(*args)
    Writer.write_data = write_data
    try: train_net(out, 2, True, resume=True)
    except OSError as e: (out/f'error-{rank}').write_text(str(e))

def killed(rank, out):
    "The second process is killed in the midst of its save"
    from torch.distributed.checkpoint import HuggingFaceStorageWriter as Writer
    write, calls = Writer.write_data, []
    def write_data(*args):
        calls.append(1)
        if rank == 1 and len(calls) == 1: os.kill(os.getpid(), signal.SIGKILL)
        return write(*args)
    Writer.write_data = write_data
    try: train_net(out, 2, True, resume=True)
    except RuntimeError: pass                                                       # the connection is gone

def layouts(rank, out):
    "What DDP is told, and in which dtypes FSDP holds, multiplies and sums, by the loop's own trainer"
    from v2flow_nbdev.training import loop
    from v2flow_nbdev.training.config import TrainConfig
    from v2flow_nbdev.training.optimizers import full_tensor
    loop.multiplies_bf16 = lambda device: True
    batch = dict(ids=torch.arange(24).view(4, 6) % 11)
    copies, shards = TrainConfig(mixed_precision='bf16', trackers=()), TrainConfig(fsdp=True, trackers=())
    accelerator, seen, model = loop.start_processes(copies), {}, Net(torch.float32)
    ddp = loop.Trainer(Net(torch.float32), copies, accelerator).wrapped
    model.blocks[0].inner.register_forward_hook(lambda m, x, y: seen.update(multiplied=str(m.weight.dtype)))
    trainer = loop.Trainer(model, shards, accelerator)
    loss = trainer.forward_backward([batch])['loss']*accelerator.num_processes     # its share of the mean of both
    p = model.blocks[0].inner.weight
    torch.save(dict(seen, kept=str(p.dtype), summed=str(p.grad.dtype), loss=loss, gradient=full_tensor(p.grad),
                    search=ddp.find_unused_parameters, broadcast=ddp.broadcast_buffers), out/f'layouts-{rank}.pt')

def everything(folder):
    "All runs that the tests look at: one process that imports, and forks of it that train"
    import shutil
    # once for all of them
    import accelerate, psutil, torch._dynamo, torch.distributed.checkpoint, torch.distributed.fsdp
    import torch.distributed.tensor, v2flow_nbdev.training.loop
    torch.set_num_threads(1)
    def half(run, name):
        "A copy of a run as it was after 10 steps"
        shutil.copytree(folder/run, folder/name)
        shutil.rmtree(folder/name/'checkpoints/step-00000020')
        return folder/name
    codes = dict(two=meet(2, lambda rank: train_net(folder/'two', 2, True, watch='begun')),
                 one=meet(1, lambda rank: train_net(folder/'one', 1, False)),
                 single=meet(2, lambda rank: train_net(folder/'single', 2, True, torch.float32)))
    for n, fsdp in ((1, False), (2, True), (3, True)):
        out = half('two', f'resumed-{n}')
        codes[out.name] = meet(n, lambda rank: train_net(out, n, fsdp, resume=True, watch='loaded'))
    out = half('one', 'former'); codes['former'] = meet(2, lambda rank: train_net(out, 2, True, resume=True))
    out = half('single', 'single-resumed')
    codes['single-resumed'] = meet(1, lambda rank: train_net(out, 1, False, torch.float32, True))
    out = half('two', 'full'); codes['full'] = meet(2, lambda rank: full_disk(rank, out))
    out = half('two', 'killed'); codes['killed'] = meet(2, lambda rank: killed(rank, out))
    codes['layouts'] = meet(2, lambda rank: layouts(rank, folder))
    (folder/'codes.json').write_text(json.dumps(codes))

@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp('shards')
    done = subprocess.run([sys.executable, __file__, str(folder)], capture_output=True, text=True, timeout=300,
                          env={**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': '',
                               'PYTHONPATH': os.pathsep.join([*sys.path[:2], str(Path(__file__).parent)])})
    assert done.returncode == 0, done.stderr[-3000:]
    codes = json.loads((folder/'codes.json').read_text())
    assert codes.pop('killed') == [0, -signal.SIGKILL], done.stderr[-3000:]
    assert not any(sum(codes.values(), [])), (codes, done.stderr[-3000:])
    return folder

def losses(folder): return [json.loads(l)['loss'] for l in (folder/'log.jsonl').read_text().splitlines()]

def test_each_process_writes_its_shards_and_nothing_is_a_pickle(runs):
    folder = runs/'two/checkpoints/step-00000010'
    found = sorted(p.name for p in folder.iterdir())
    assert found[-1] == 'state.json' and all(p.endswith('.safetensors') for p in found[:-1])
    assert {p[:11] for p in found[:-1]} == {'shard-00001', 'shard-00002'}
    sizes = [sum(p.stat().st_size for p in folder.glob(f'shard-0000{i}*')) for i in (1, 2)]
    assert max(sizes) < 1.3*min(sizes), sizes

@pytest.mark.parametrize('n', [1, 2, 3])
def test_any_number_of_processes_loads_the_state_to_the_bit(runs, n):
    saved, loaded = (torch.load(runs/f, weights_only=True) for f in ('two/saved-0.pt', f'resumed-{n}/loaded-0.pt'))
    # in one piece a tied table has both names
    assert set(loaded) - set(saved) <= {'model|head.weight'} and len(saved) > 30
    for name, t in saved.items(): assert t.dtype == loaded[name].dtype and torch.equal(t, loaded[name]), name
    same, after = losses(runs/'two'), losses(runs/f'resumed-{n}')
    assert len(same) == len(after) == 20 and same[-1] < same[0]
    assert max(abs(a - b) for a,b in zip(same, after)) < 1e-9 and (n != 2 or same == after)

def test_float32_and_checkpoints_in_one_piece(runs):
    assert max(abs(a - b) for a,b in zip(losses(runs/'single'), losses(runs/'single-resumed'))) < 1e-4
    assert (runs/'former/checkpoints/step-00000010/model.safetensors').exists()
    assert max(abs(a - b) for a,b in zip(losses(runs/'one'), losses(runs/'former'))) < 1e-9

def test_a_full_disk_or_a_death_in_one_process_leaves_the_checkpoint_before(runs):
    for rank in (0, 1):
        assert 'the disk is full; the last whole one: step-00000010' in (runs/f'full/error-{rank}').read_text()
    assert [p.name for p in (runs/'full/checkpoints').iterdir()] == ['step-00000010']
    from v2flow_nbdev.training.checkpoints import last_checkpoint
    from v2flow_nbdev.training.shards import read_either
    folder, state = last_checkpoint(runs/'killed', read=read_either)
    assert state['step'] == 10 and not (runs/'killed/checkpoints/step-00000020').exists()
    path = sorted(folder.glob('shard-00002*'))[0]
    path.write_bytes(path.read_bytes()[:-1] + b'x')
    said = []
    assert last_checkpoint(runs/'killed', said.append, read_either) is None and path.name in said[0]

def test_the_layouts_do_no_more_than_they_must(runs):
    """DDP neither searches for unused parameters nor broadcasts buffers; FSDP in bf16 multiplies in bf16 what it keeps
    in float32, and sums in float32"""
    found, model = torch.load(runs/'layouts-0.pt', weights_only=True), Net(torch.float32)
    model(torch.arange(24).view(4, 6) % 11).loss.backward()
    exact = model.blocks[0].inner.weight.grad
    apart = ((found.pop('gradient') - exact).norm()/exact.norm()).item()
    print(f'gradient in bf16 against float32: {apart:.1e}')
    assert 1e-5 < apart < 2e-2 and abs(found.pop('loss') - model(torch.arange(24).view(4, 6) % 11).loss.item()) < 1e-2
    assert found == dict(multiplied='torch.bfloat16', kept='torch.float32', summed='torch.float32', search=False,
                         broadcast=False)

def test_a_dry_run_counts_what_saving_takes(runs):
    "On disk, without the headers, which weigh in so small a model"
    from v2flow_nbdev.base.files import read_tensors
    from v2flow_nbdev.training.config import TrainConfig
    from v2flow_nbdev.evaluation.costs import checkpoint_sizes, saving_costs
    def found(run): return sum(t.nbytes for p in (runs/run/'checkpoints/step-00000020').glob('*.safetensors')
                               for t in read_tensors(p).values())
    model = Net(torch.float32)
    sizes = checkpoint_sizes(model)
    trained = 1 - model.fixed.numel()/sum(p.numel() for p in model.parameters())
    for run, fsdp in (('single', True), ('single-resumed', False)):
        counted, memory = saving_costs(sizes, TrainConfig(fsdp=fsdp, processes=2 if fsdp else 1), trained)
        assert abs(counted/found(run) - 1) < 0.05 and memory < counted, (run, counted, found(run))

if __name__ == '__main__': everything(Path(sys.argv[1]))
