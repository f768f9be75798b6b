"""The emoji tokenizer's codes once more, without the vocabulary: the resampler's mixture of token embeddings becomes a plain linear layer of the same
width, and all else stays: data, quantizer, losses, steps. It ends when the codes are frozen, for afterwards they do not change. With these
codes `54_emoji` compares its visual vocabulary.

    python -m benchmarks.without_vocabulary [--config configs/emoji-tokenizer.yaml] [--out runs/emoji-without-vocabulary] [training.batch_size=…]
    python -m benchmarks.without_vocabulary --config configs/smollm2-tokenizer-64.yaml --out runs/plain-64 --whole

With `--whole` the decoder is trained to the end, and its scores are those that `v2flow train-tokenizer` writes with the same config: what the
vocabulary costs in dB. What it costs in seconds is in both logs, `examples_per_s` of the steps before the codes are frozen."""
import argparse, json, sys
from dataclasses import replace
from pathlib import Path
import torch
from torch import nn
from transformers import AutoTokenizer
from v2flow_nbdev.apps.commands import read_recipe
from v2flow_nbdev.data.batches import ImageBatches
from v2flow_nbdev.evaluation.metrics import tokenizer_scores
from v2flow_nbdev.models.resampler import VocabularyResampler
from v2flow_nbdev.models.tokenizer import V2Flow
from v2flow_nbdev.models.tokenizer_training import TokenizerTraining
from v2flow_nbdev.training.failures import RunFailed
from v2flow_nbdev.training.loop import train
from v2flow_nbdev.training.recipes import all_captions, load_data, usable_sample as some
from v2flow_nbdev.training.tokenizer_recipes import TokenizerRecipe, continue_decoder, load_tokenizer, open_latents, tokenizer_data
from v2flow_nbdev.models.vocabulary import Vocabulary
from v2flow_nbdev.base.files import write_tensors

class WithoutWords(VocabularyResampler):
    "The same features, read out into the space of the embeddings, but not through them"
    def __init__(self, channels, dim, width, depth, pool):
        super().__init__(channels, 1, width, depth, pool)
        self.readout = nn.Linear(width, dim)

    def forward(self, latents, vocab, tau=1., noise=0., seed=0, allowed=None, part=0):
        return self.readout(self.tokens(latents))

class Frozen(Exception): "The codes are final"

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--config', type=Path, default=Path('configs/emoji-tokenizer.yaml'))
    parser.add_argument('--out', type=Path, default=Path('runs/emoji-without-vocabulary'))
    parser.add_argument('--whole', action='store_true', help='train the decoder too, to the end')
    parser.add_argument('overrides', nargs='*')
    args = parser.parse_args()
    try: recipe = read_recipe(args.config, args.overrides, TokenizerRecipe)
    except (RunFailed, ValueError) as e: sys.exit(f'benchmarks.without_vocabulary: {e}')
    training, shape, source = recipe.training, recipe.tokenizer, recipe.data
    examples, held_out = load_data(source)
    view = ImageBatches(some(examples, 1500), shape.image_channels, [shape.image_size])
    images, unseen = (view.at([r['image'] for r in r_], shape.image_size) for r_ in (some(examples, 1500),
        some(held_out, 300)))
    latents, shape = open_latents(shape, images)
    data, collate = tokenizer_data(source, shape, latents, examples)
    torch.manual_seed(training.seed)
    words = Vocabulary.from_pretrained(recipe.vocabulary)
    if recipe.tokens == 'captions':
        words = words.seen_in(all_captions(examples), AutoTokenizer.from_pretrained(recipe.vocabulary))
    model = V2Flow(shape, words, latents if shape.autoencoder else None)
    model.resampler = WithoutWords(shape.channels, model.config.vocab_dim, shape.resampler_width, shape.resampler_depth,
                                   shape.pool)
    lesson = TokenizerTraining(model, recipe.tokenizer_training)
    if recipe.decoder: continue_decoder(model, load_tokenizer(recipe.decoder))
    if source.cache: lesson.examples = data
    def scored(m): return {k: v for k,v in tokenizer_scores(m.tok, unseen, images).items() if isinstance(v, float)}
    def frozen(m):
        write_tensors(args.out/'codes.safetensors', dict(codes=m.tok.quantizer.codebook.half()))
        print(json.dumps(scored(m)), args.out/'codes.safetensors', flush=True)
        raise Frozen
    if args.whole: return print(json.dumps(scored(train(lesson, data, training, collate, scored, args.out, resume=True))))
    try:
        train(lesson, data, replace(training, evaluate_every=recipe.tokenizer_training.freeze_codes_at), collate,
              frozen, args.out, resume=True)
    except Frozen: pass

if __name__ == '__main__': main()
