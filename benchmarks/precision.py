"""What fewer bits cost: the same captions and the same random numbers in float32, in bfloat16, and with the language model's layers in
int8, judged image by image.

    python -m benchmarks.precision            500 images of each split of the emoji, 1,000 digits: precision.json, half an hour
    python -m benchmarks.precision --n 50

Each image is right or wrong, as in `v2flow evaluate`: an emoji if among 50 random images and all of the same base its own is the
nearest, a digit if the classifier reads it as what the caption says. Printed is the fraction that is right, and the mean of the paired
differences to float32 with its 95 % interval: 1.96 standard errors of the mean on each side"""
import argparse, copy, json
from pathlib import Path
import torch
from v2flow_nbdev.base.files import find_data, write_atomically
from v2flow_nbdev.base.images import to_tensor
from v2flow_nbdev.data.sources import digit_captions
from v2flow_nbdev.evaluation.emoji import emoji_examples, emoji_judge, generate_split, retrieval_scores
from v2flow_nbdev.evaluation.judges import digit_classifier
from v2flow_nbdev.language.pipeline import V2FlowPipeline

here = Path(__file__).resolve().parent

def forms(name):
    "Name → callable (captions, generator=) → images, of one shipped model"
    dtypes = dict(float32=torch.float32, bfloat16=torch.bfloat16, int8=torch.int8)
    return {k: V2FlowPipeline.from_pretrained(find_data(f'checkpoints/{name}'), dtype=d) for k, d in dtypes.items()}

def emoji(pipe, split, n):
    "(n,) bool: which images are right"
    examples = emoji_examples()
    images, _, numbers = generate_split(pipe, split, n)
    return retrieval_scores(images, numbers, examples, to_tensor([r['image'] for r in examples], 3), emoji_judge())['features']

def digits(pipe, split, n):
    captions = [(d, c) for d in range(10) for c in digit_captions(d)]
    captions = (captions*(-(-n//len(captions))))[:n]
    images = [image for i in range(0, n, 100)
              for image in pipe([c for _, c in captions[i:i + 100]], generator=torch.Generator().manual_seed(i)).images]
    read = digit_classifier().predict(to_tensor(images, 1).flatten(1).numpy())
    return torch.tensor([int(a) == d for a, (d, _) in zip(read, captions)])

def paired(right, reference):
    "(mean of the differences, half of its 95 % interval)"
    difference = right.double() - reference.double()
    return difference.mean().item(), 1.96*(difference.var()/len(difference)).sqrt().item()

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--n', type=int, default=500); p.add_argument('--out', type=Path, default=here/'precision.json')
    args, found = p.parse_args(), []
    for name, judge, split, n in (('digits', digits, 'all', 2*args.n), ('emoji', emoji, 'train', args.n),
                                  ('emoji', emoji, 'held_out_compositions', args.n)):
        reference = None
        for form, pipe in forms(name).items():
            right = judge(pipe, split, n)
            if reference is None: reference = right
            mean, half = paired(right, reference)
            found.append(dict(data=name, split=split, n=n, form=form, accuracy=right.double().mean().item(),
                              difference=mean, interval=half, costs=mean + half < 0))
            print(f"{name}, {split}, {form}: {found[-1]['accuracy']:.1%}, {mean:+.2%} ± {half:.2%}", flush=True)
    with write_atomically(args.out) as tmp: tmp.write_text(json.dumps(found, indent=1) + '\n', encoding='utf-8')

if __name__ == '__main__': main()
