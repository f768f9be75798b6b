"""Train in two processes, many times, on one busy core, and count how the processes end: all should end with exit code 0, and none be
aborted when its model is saved already. `--forked` runs the same command in forks of a process that has done the imports: many more of them.
With `--late`, these forks give gloo's threads only what time the machine has left, from the last step on: what happens once in hundreds of runs
happens often. `--tiny` forks do no training: a few collectives, the group held as a mesh holds it, and the command's end.

    python -m benchmarks.exits [--runs 450] [--forked [--late] | --tiny] [--trackers]      writes benchmarks/exits.json"""
import argparse, json, os, random, subprocess, sys, tempfile, time
from collections import Counter
from pathlib import Path

root = Path(__file__).parent.parent
server = """
import gc, json, os, sys
import accelerate, torch, transformers, sklearn.datasets, torch.distributed.fsdp, torch.utils.tensorboard
from transformers import AutoTokenizer, LlamaForCausalLM
import v2flow_nbdev.apps.cli, v2flow_nbdev.evaluation.metrics, v2flow_nbdev.training.loop
gc.freeze()
def tiny():
    import torch.distributed as dist
    dist.init_process_group('gloo')
    sys.mesh = dist.group.WORLD
    late([], 1, print)
    for _ in range(3): dist.all_gather_object([None]*2, dist.get_rank()); dist.all_reduce(torch.ones(4))
    v2flow_nbdev.training.failures.leave(0)
def late(*args, report=v2flow_nbdev.training.loop.report_unusable):
    for task in os.listdir('/proc/self/task'):
        with open(f'/proc/self/task/{task}/comm') as f:
            if 'gloo' in f.read(): os.sched_setscheduler(int(task), os.SCHED_IDLE, os.sched_param(0))
    return report(*args)
for line in sys.stdin:
    call, children = json.loads(line), []
    for rank, core in enumerate(call['cores']):
        if not (child := os.fork()):
            os.sched_setaffinity(0, core)
            os.environ.update(call['env'], RANK=str(rank), LOCAL_RANK=str(rank))
            for fd, path in enumerate((os.devnull, os.devnull, f"{call['err']}-{rank}")): os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), fd)
            sys.argv = ['v2flow', *call['args']]
            if call['late']: v2flow_nbdev.training.loop.report_unusable = late
            if call['tiny']: tiny()
            v2flow_nbdev.apps.cli.main()                                                # its SystemExit goes all the way
        children.append(child)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(c, 0)[1]) for c in children]), flush=True)
"""

def arguments(out, trackers):
    "The smallest training that shards a model over two processes"
    return ['pretrain-llm', '--config', 'configs/digits-text.yaml', '--out', str(out), 'training.steps=6',
            'training.batch_size=4', 'training.mixed_precision=no', 'training.processes=2', 'training.fsdp=true',
            'llm.hidden_size=32', 'llm.num_hidden_layers=1', 'llm.intermediate_size=64',
            f'training.trackers=[{"tensorboard"*trackers}]']

def launched(out, cores, trackers, environment):
    "Exit codes of one run under torchrun (its own, which is 1 if that of any process is not 0), and what it printed"
    command = ['taskset', '-c', ','.join(map(str, sorted(set().union(*cores)))), sys.executable, '-m',
               'torch.distributed.run', '--standalone', '--nproc-per-node', '2', '-m', 'v2flow_nbdev.apps.cli',
               *arguments(out, trackers)]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    return [done.returncode], done.stderr

def session(runs, forked, late, tiny, trackers, seed, folder, say=print):
    "How many processes ended how, and what those that did not end well had to say"
    import torch.distributed as dist
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}
    ours, r, codes, said, began = sorted(os.sched_getaffinity(0)), random.Random(seed), Counter(), [], time.time()
    beside = [subprocess.Popen(['taskset', '-c', str(core), sys.executable, '-c', 'while True: pass'],
                               preexec_fn=lambda: os.nice(5)) for core in ours]
    forks = (forked or tiny) and subprocess.Popen([sys.executable, '-c', server], cwd=root, env=environment,
                                                  stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        for i in range(runs):
            cores, out = [[r.choice(ours)] if r.random() < 0.7 else ours for _ in range(2)], folder/f'run-{i}'
            if not forks: found, text = launched(out, cores, trackers, environment)
            else:
                store = dist.TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False)  # as torchrun keeps one
                env = dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(store.port), WORLD_SIZE='2', LOCAL_WORLD_SIZE='2',
                           TORCHELASTIC_USE_AGENT_STORE='True', TORCHELASTIC_RUN_ID='x')
                forks.stdin.write(json.dumps(dict(args=arguments(out, trackers), late=late, tiny=tiny,
                                                  err=str(folder/f'err-{i}'), cores=cores, env=env)) + '\n')
                forks.stdin.flush()
                found = json.loads(forks.stdout.readline())
                text = '\n'.join((folder/f'err-{i}-{rank}').read_text() for rank in range(2))
                del store
            codes.update(found)
            if any(found): said.append(text[-2000:]); say(f'run {i}: exit codes {found}: {text[-600:]}')
            elif not tiny and not (out/'model').is_dir(): raise RuntimeError(f'run {i} left no model')
            if i % 25 == 24: say(f'{i + 1} runs, {time.time() - began:.0f} s: exit codes {dict(codes)}')
            subprocess.run(['rm', '-rf', str(out)])
    finally:
        for p in beside: p.kill()
        if forks: forks.stdin.close(); forks.wait()
    return dict(runs=runs, forked=forked, late=late, tiny=tiny, exit_codes={str(c): n for c,n in sorted(codes.items())},
                seconds=round(time.time() - began), said=said)

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in dict(runs=450, seed=0).items(): parser.add_argument(f'--{name}', type=int, default=value)
    for name in ('forked', 'late', 'tiny', 'trackers'): parser.add_argument(f'--{name}', action='store_true')
    parser.add_argument('--out', type=Path, default=Path(__file__).with_name('exits.json'))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as tmp:
        found = session(args.runs, args.forked, args.late, args.tiny, args.trackers, args.seed, Path(tmp),
                        lambda *a: print(*a, flush=True))
    print(json.dumps({k: v for k,v in found.items() if k != 'said'}))
    args.out.write_text(json.dumps(found) + '\n')
