"""Kill the real command with SIGKILL at random moments, some of them while a checkpoint is being written, resume it each time, and compare
losses and weights with those of a run that was left alone.

    python -m benchmarks.kills [--kills 20] [--steps 200] [--seed 0]      writes benchmarks/kills.json"""
import argparse, json, os, random, shutil, signal, subprocess, sys, tempfile, time
from pathlib import Path
import torch
from v2flow_nbdev.base.files import read_tensors

root = Path(__file__).parent.parent

def command(out, text, steps):
    return [sys.executable, '-m', 'v2flow_nbdev.apps.cli', 'train-tokenizer', '--config',
            'configs/digits-tokenizer.yaml', '--out', str(out), '--resume', f'vocabulary={text}', 'data.copies=0',
            'tokenizer.codebook_size=64',
            f'training.steps={steps}', 'training.batch_size=16', 'training.evaluate_every=0.5',
            'training.checkpoint_every=2', 'training.log_every=1', 'training.trackers=[]']

def steps_done(out):
    "By the newest checkpoint that bears its name"
    return max((int(p.name[5:]) for p in (out/'checkpoints').glob('step-*')), default=0)

def writing(out): return any((out/'checkpoints').glob('.step-*.tmp'))

def kill_once(out, text, steps, r, while_writing):
    """Start or resume, and kill within the next steps; gives the step of the last checkpoint, or None where the run
    ended first"""
    process = subprocess.Popen(command(out, text, steps), cwd=root, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    wanted, pause = steps_done(out) + r.randint(1, max(2, steps//25)), r.random()*0.2
    while process.poll() is None and steps_done(out) < wanted: time.sleep(0.002)
    if while_writing:
        while process.poll() is None and not writing(out): pass
    else: time.sleep(pause)
    if process.poll() is not None:
        if process.returncode: raise RuntimeError(f'the run failed by itself after step {steps_done(out)}')
        return None
    process.send_signal(signal.SIGKILL); process.wait()
    return steps_done(out), writing(out)

def session(kills, steps, seed, folder, text, every=3):
    "The whole story, with every third (or other) kill while a checkpoint is being written; a dict of what happened"
    r, whole, killed = random.Random(seed), folder/'whole', folder/'killed'
    subprocess.run(command(whole, text, steps), cwd=root, check=True, stdout=subprocess.DEVNULL,
                   stderr=subprocess.DEVNULL)
    at, torn, early = [], 0, 0
    while len(at) < kills or not torn and len(at) < kills + 20:  # some kills come too late for a half-written one
        done = kill_once(killed, text, steps, r, while_writing=len(at) % every == every - 1 or len(at) >= kills)
        if done is None:  # we were late, and the run ended first: it begins anew
            early += 1; shutil.rmtree(killed)
            if early > 20: raise RuntimeError('the run always ends before it can be killed; use more steps')
            continue
        at.append(done[0]); torn += done[1]
        print(f'kill {len(at)}: last checkpoint {done[0]}' + (', one half-written' if done[1] else ''), flush=True)
    subprocess.run(command(killed, text, steps), cwd=root, check=True, stdout=subprocess.DEVNULL,
                   stderr=subprocess.DEVNULL)
    a, b = (read_tensors(f/'model/model.safetensors') for f in (whole, killed))
    logs = [[{k: v for k,v in json.loads(l).items() if k not in ('seconds', 'examples_per_s', 'data_wait', 'tokens_per_s')}
             for l in (f/'log.jsonl').read_text().splitlines()] for f in (whole, killed)]
    return dict(steps=steps, kills=len(at), half_written=torn, last_checkpoints=at,
                weights_equal=all(torch.equal(a[n], b[n]) for n in a), losses_equal=logs[0] == logs[1],
                lines=len(logs[0]))

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in dict(kills=20, steps=200, seed=0).items():
        parser.add_argument(f'--{name}', type=int, default=value)
    args = parser.parse_args()
    os.environ['CUDA_VISIBLE_DEVICES'] = ''
    with tempfile.TemporaryDirectory() as tmp:
        text = Path(tmp)/'text'
        subprocess.run([sys.executable, '-m', 'v2flow_nbdev.apps.cli', 'pretrain-llm', '--config',
                        'configs/digits-text.yaml', '--out', text, 'training.steps=20'], cwd=root, check=True,
                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        found = session(args.kills, args.steps, args.seed, Path(tmp), text/'model')
    print(json.dumps(found))
    Path(__file__).with_name('kills.json').write_text(json.dumps(found) + '\n')
