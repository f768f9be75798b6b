"""Runs notebooks like `nbdev_test`, each in a fork of one process that has done the imports; exits with 1 if one fails

    python tests/run_notebooks.py                  all of them
    python tests/run_notebooks.py FILE.ipynb …     these
    python tests/run_anywhere.py …                 the same away from the clone"""
import gc, os, sys
from multiprocessing import connection, get_context
from pathlib import Path
from check_notebooks import notebooks, root

workers = 2
# most of a minute each: they begin first, so that both workers end together
longest = ['54_emoji', '82_app', '85_cli', '26_adapters', '12_latents', '19_tokenizer_training', '14_resampler',
           '46_tokenizer_recipes', '55_alignment', '36_judge', '58_costs']

def imports():
    "What most notebooks import: seconds, once. Nothing is computed here, for threads do not survive a fork"
    import accelerate, matplotlib.pyplot, PIL.Image, sklearn.datasets, torch, transformers          # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM                   # noqa: F401
    import v2flow_nbdev.apps.cli, v2flow_nbdev.evaluation.metrics, v2flow_nbdev.training.loop        # noqa: F401
    import v2flow_nbdev.language.pipeline                                                            # noqa: F401
    gc.freeze()

def run(path):
    "One notebook, in a process of its own; nbdev says on stderr in which cell it failed"
    from nbdev.config import get_config
    from nbdev.test import test_nb
    passed, _ = test_nb(path, skip_flags=get_config().tst_flags.split(), basepath=root)
    sys.exit(not passed)

def failures(paths):
    "Names of the notebooks that fail, of all these; `workers` run side by side"
    fork, waiting, running = get_context('fork'), list(paths), {}
    while waiting or running:
        while waiting and len(running) < workers:
            process = fork.Process(target=run, args=(waiting[0],))
            process.start()
            running[process.sentinel] = process, waiting.pop(0)
        for ended in connection.wait(list(running)):
            process, path = running.pop(ended)
            process.join()
            if process.exitcode: yield path.name

if __name__ == '__main__':
    given = [Path(p).absolute() for p in sys.argv[1:]]
    place = {name: i for i, name in enumerate(longest)}
    paths = given or sorted(notebooks(), key=lambda p: place.get(p.stem, len(place)))
    os.chdir(root)
    import nbdev.test
    if not given: imports()
    failed = sorted(failures(paths))
    gc.unfreeze()
    print(f'failed: {", ".join(failed)}' if failed else f'{len(paths)} notebooks ran')
    sys.exit(bool(failed))
