"""How much memory does reading an embedding table take? Peak memory of a process that reads 32,000 rows of width 2,048 out of a file with other
tensors beside them, over the size of the rows in float32: by `Vocabulary.from_pretrained`, and plainly (the whole tensor, then the rows).

    python -m benchmarks.table"""
import json, string, struct, subprocess, sys
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

V, E, rest = 32_000, 2048, [125_000, 2048]  # 131 MB on disk, 262 MB in float32; 512 MB each

def sparse_file(path, **tensors):
    "A valid safetensors file of zeros that takes no room on the disk"
    header, at = {}, 0
    for name, shape in tensors.items():
        size = 2*shape[0]*shape[1]
        header[name.replace('__', '.')] = dict(dtype='BF16', shape=shape, data_offsets=[at, at := at + size])
    front = json.dumps(header).encode()
    with open(path, 'wb') as f: f.write(struct.pack('<Q', len(front)) + front); f.truncate(8 + len(front) + at)
    return {name: path.name for name in header}

def large_tokenizer(size):
    "As many words as a LLaMA has, merged from letters"
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    letters = string.ascii_letters[:32]
    words = [''.join(w) for n in (1, 2, 3) for w in product(letters, repeat=n)][:size - 3]
    bpe = Tokenizer(models.BPE({w: i for i,w in enumerate(['<unk>', '<s>', '</s>'] + words)},
                               [(w[:-1], w[-1]) for w in words if len(w) > 1], unk_token='<unk>'))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token='<unk>', bos_token='<s>', eos_token='</s>')

def large_model(folder):
    "A `transformers` folder with such a table, in the first of two files"
    folder = Path(folder)
    files = {**sparse_file(folder/'one.safetensors', model__embed_tokens__weight=[V, E], model__layers__0__weight=rest),
             **sparse_file(folder/'two.safetensors', model__layers__1__weight=rest, lm_head__weight=[V, E])}
    (folder/'model.safetensors.index.json').write_text(json.dumps(dict(weight_map=files)))
    (folder/'config.json').write_text(json.dumps(dict(model_type='llama', vocab_size=V, hidden_size=E)))
    large_tokenizer(V).save_pretrained(folder)

measure = '''
import sys
from pathlib import Path
from v2flow_nbdev.base.text import load_text_tokenizer, text_token_ids
from v2flow_nbdev.models.vocabulary import Vocabulary
from v2flow_nbdev.base.tables import find_table
from v2flow_nbdev.base.files import read_tensors
def peak():                                                                  # of this process alone: ru_maxrss begins with its parent's
    return 1024*int(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1])
def plain(folder):
    path, name = find_table(Path(folder))
    return read_tensors(path, [name])[name].float()[text_token_ids(load_text_tokenizer(folder))]
small, large = sys.argv[1:]
Vocabulary.from_pretrained(small)                                            # now everything is imported
base = peak()
for name, read in dict(ours=lambda folder: Vocabulary.from_pretrained(folder).embeddings, plain=plain).items():
    rows = read(large); print(f'{name}: {(peak() - base)/(4*rows.numel()):.2f} times the table'); del rows
'''

if __name__ == '__main__':
    with TemporaryDirectory() as folder:
        large_model(folder)
        subprocess.run([sys.executable, '-c', measure, 'data/checkpoints/digits/llm', folder], check=True)
