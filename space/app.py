"The page of `v2flow app` as a Space of the Hub; README.md says how it gets there and which model it shows"
import os
from pathlib import Path

def model():
    "A Hub id or a folder from the variable MODEL, else the folder `model` beside this file, else a clone's digits"
    beside = Path(__file__).parent/'model'
    if os.environ.get('MODEL'): return os.environ['MODEL']
    if beside.is_dir(): return beside
    from v2flow_nbdev.base.files import find_data
    return find_data('checkpoints/digits')

def main():
    import torch
    from v2flow_nbdev.apps.app import serve
    where = dict(device='cuda', dtype=None) if torch.cuda.is_available() else {}
    # a Space is reached through the port 7860 of all its addresses
    serve(model(), os.environ.get('GRADIO_SERVER_NAME', '0.0.0.0'), int(os.environ.get('GRADIO_SERVER_PORT', 7860)), **where)

if __name__ == '__main__': main()
