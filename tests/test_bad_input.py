("Everything a user can get wrong, through the real command: one line on stderr that names the thing, the right exit "
 "code, nothing half-written")
import json, os, shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import pytest
from conftest import Shell, fresh_v2flow, root, shipped

def flip_header_byte(path):
    content = bytearray(path.read_bytes()); content[10] ^= 0xff; path.write_bytes(content)

def copy_model(folder, name):
    return Path(shutil.copytree(shipped, folder/name))

def own_llm(folder):
    "A language model of one block without visual tokens, in whose words the shipped image tokenizer speaks"
    import torch
    from v2flow_nbdev.data.sources import digit_captions
    from v2flow_nbdev.language.text_models import small_llama, train_text_tokenizer
    from v2flow_nbdev.models.vocabulary import Vocabulary
    # as in configs/digits-text.yaml
    words, tokenizer = Vocabulary.load(shipped/'image_tokenizer'), train_text_tokenizer([c for d in range(10)
        for c in digit_captions(d)])
    torch.manual_seed(0)
    model = small_llama(tokenizer, 128, 1, 2, 32)
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids(words.tokens)] = words.embeddings
    model.save_pretrained(folder); tokenizer.save_pretrained(folder)
    return model, tokenizer

def make_files(f):
    "The broken files that the cases below speak of"
    import torch
    from PIL import Image
    from safetensors.torch import load_file, save_file
    from v2flow_nbdev.models.vocabulary import Vocabulary
    good = Image.new('L', (20, 20), 128); good.save(f/'good.png')
    (f/'empty.png').touch(); (f/'text.png').write_text('not an image')
    big = Image.effect_noise((64, 64), 50)
    big.save(f/'cut.png'); (f/'cut.png').write_bytes((f/'cut.png').read_bytes()[:500])
    Image.new('1', (20_000, 20_000)).save(f/'bomb.png')
    ids = list(range(16))
    for name, content in dict(ok=ids, high=[128]+ids[1:], low=[-1]+ids[1:], few=ids[:15], floats=[0.5]+ids[1:],
                              words=['a']*16, huge=[2**70]+ids[1:], dict={'ids': ids}, bools=[True]*16).items():
        (f/f'{name}.json').write_text(json.dumps(content))
    (f/'broken.json').write_text('[1, 2,')
    (f/'binary.json').write_bytes(b'\xff\xfe\x00'); (f/'deep.json').write_text('['*100_000)
    (f/'empty_model').mkdir()
    (copy_model(f, 'no_index')/'model_index.json').unlink()
    (copy_model(f, 'no_weights')/'image_tokenizer/model.safetensors').unlink()
    (copy_model(f, 'no_llm_weights')/'llm/model.safetensors').unlink()
    shutil.rmtree(copy_model(f, 'no_llm')/'llm')
    flip_header_byte(copy_model(f, 'flipped')/'image_tokenizer/model.safetensors')
    flip_header_byte(copy_model(f, 'flipped_llm')/'llm/model.safetensors')
    flip_header_byte(copy_model(f, 'flipped_words')/'image_tokenizer/vocabulary.safetensors')
    other = copy_model(f, 'other_words')
    words = Vocabulary.load(other/'image_tokenizer')
    Vocabulary(words.tokens, words.embeddings + 0.01).save(other/'image_tokenizer')
    (copy_model(f, 'no_text_tokenizer')/'llm/tokenizer.json').unlink()
    (copy_model(f, 'odd_index')/'model_index.json').write_text('[]')
    (copy_model(f, 'odd_words')/'image_tokenizer/vocabulary.json').write_text('{}')
    partial = copy_model(f, 'partial_llm')/'llm/model.safetensors'
    save_file({n: t for n,t in load_file(partial).items() if 'layers.2' not in n}, partial, {'format': 'pt'})
    config = copy_model(f, 'odd_config')/'image_tokenizer/config.json'
    config.write_text(config.read_text().replace('"dim": 96', '"dim": 97'))
    llm = copy_model(f, 'other_llm')/'llm/config.json'
    config = json.loads(llm.read_text()); config['v2flow']['codebook'] = '0'*16; llm.write_text(json.dumps(config))
    from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration
    model, tokenizer = own_llm(f/'own')
    T5ForConditionalGeneration(T5Config(vocab_size=500, d_model=16, d_kv=8, d_ff=16, num_layers=1,
                                        num_heads=2)).save_pretrained(f/'t5')
    tokenizer.save_pretrained(f/'t5')
    model.save_pretrained(f/'long_words'); AutoTokenizer.from_pretrained(shipped/'llm').save_pretrained(f/'long_words')
    model.get_input_embeddings().weight.data.mul_(-1)
    model.save_pretrained(f/'stranger'); tokenizer.save_pretrained(f/'stranger')
    wordless = copy_model(f, 'wordless'); shutil.rmtree(wordless/'llm'); shutil.copytree(f/'own', wordless/'llm')
    (f/'not.yaml').write_text('a: [1')
    (f/'odd.yaml').write_text('colour: red')
    (f/'list.yaml').write_text('- 1'); (f/'numbers.yaml').write_text('1: 2\ncolour: red')
    (f/'read_only').mkdir(); (f/'read_only').chmod(0o500)
    (f/'held/checkpoints/step-00000010').mkdir(parents=True); (f/'held/model').mkdir()
    (f/'images').mkdir(); good.save(f/'images/a.png'); (f/'images/b.png').write_text('broken')
    (f/'nothing').mkdir()

O = ('--out', '{f}/x.png')
D = ('--model', str(shipped))                                      # digits
cases = {  # name: (arguments, exit code, what the line must contain)
    'image missing': (('reconstruct', '{f}/none.png', *O), 1, 'none.png: no such image file'),
    'image empty': (('encode', '{f}/empty.png'), 1, 'empty.png: the file is empty'),
    'image is text': (('caption', '{f}/text.png'), 1, 'text.png: not an image'),
    'image truncated': (('reconstruct', '{f}/cut.png', *O), 1, 'cut.png: the image is damaged or truncated'),
    'image far too large': (('caption', '{f}/bomb.png'), 1, 'bomb.png: the image is far too large'),
    'image is a folder': (('caption', '{f}'), 1, 'a folder, not an image file'),
    'caption empty': (('generate', '', *O), 2, 'caption is empty'),
    'caption of blanks': (('generate', '   ', *O, *D), 2, 'caption is empty'),
    'caption of 10,000 words': (('generate', 'seven '*10_000, *O, *D), 2, 'too long'),
    'no caption': (('generate', *O), 2, "Missing argument 'caption'"),
    'caption not UTF-8': (('generate', '\udce9', *O, *D), 2, 'the caption is not UTF-8'),
    'size of zero': (('generate', 'a six', '--size', '0', '0', *O, *D), 2, '--size'),
    'num-images 0': (('generate', 'a six', '--num-images', '0', *O), 2, '--num-images'),
    'num-images -1': (('generate', 'a six', '--num-images', '-1', *O), 2, '--num-images'),
    'num-images many': (('generate', 'a six', '--num-images', 'many', *O), 2, '--num-images'),
    'seed negative': (('generate', 'a six', '--seed', '-1', *O), 2, '--seed'),
    'model missing': (('generate', 'a six', '--model', '{f}/none', *O), 1, 'no such model folder'),
    'model empty': (('generate', 'a six', '--model', '{f}/empty_model', *O), 1, 'model_index.json: missing'),
    'model without index': (('generate', 'a six', '--model', '{f}/no_index', *O), 1, 'model_index.json: missing'),
    'model without weights': (('generate', 'a six', '--model', '{f}/no_weights', *O), 1, 'model.safetensors: missing'),
    'model without llm weights': (('generate', 'a six', '--model', '{f}/no_llm_weights', *O), 1,
                                  'model.safetensors: missing'),
    'model without llm': (('generate', 'a six', '--model', '{f}/no_llm', *O), 1, 'no such folder in the model'),
    'weights damaged': (('generate', 'a six', '--model', '{f}/flipped', *O), 1, 'model.safetensors: damaged'),
    'llm damaged': (('generate', 'a six', '--model', '{f}/flipped_llm', *O), 1, 'model.safetensors: damaged'),
    'vocabulary damaged': (('encode', '{f}/good.png', '--model', '{f}/flipped_words'), 1,
                           'vocabulary.safetensors: damaged'),
    'another vocabulary': (('encode', '{f}/good.png', '--model', '{f}/other_words'), 1, 'made for another vocabulary'),
    'another llm': (('caption', '{f}/good.png', '--model', '{f}/other_llm'), 1, 'not made for each other'),
    'llm incomplete': (('caption', '{f}/good.png', '--model', '{f}/partial_llm'), 1, 'weights are missing'),
    'text tokenizer missing': (('caption', '{f}/good.png', '--model', '{f}/no_text_tokenizer'), 1,
                               'its text tokenizer cannot be loaded'),
    'index is a list': (('caption', '{f}/good.png', '--model', '{f}/odd_index'), 1,
                        'model_index.json: not a JSON object'),
    'words missing': (('encode', '{f}/good.png', '--model', '{f}/odd_words'), 1, 'vocabulary.json: not a JSON object'),
    'config does not fit': (('encode', '{f}/good.png', '--model', '{f}/odd_config'), 1, 'odd_config'),
    'ids too high': (('decode', '{f}/high.json', *O, *D), 1, 'the codebook has 0 to 127'),
    'ids negative': (('decode', '{f}/low.json', *O, *D), 1, 'the codebook has 0 to 127'),
    'ids too few': (('decode', '{f}/few.json', *O, *D), 1, 'need (B, 16)'),
    'ids are floats': (('decode', '{f}/floats.json', *O, *D), 1, 'list of integers'),
    'ids are words': (('decode', '{f}/words.json', *O, *D), 1, 'list of integers'),
    'ids are booleans': (('decode', '{f}/bools.json', *O, *D), 1, 'list of integers'),
    'ids in a dict': (('decode', '{f}/dict.json', *O, *D), 1, 'list of integers'),
    'ids beyond 64 bits': (('decode', '{f}/huge.json', *O, *D), 1, 'huge.json'),
    'ids file broken': (('decode', '{f}/broken.json', *O), 1, 'broken.json: cannot be read as JSON'),
    'ids file binary': (('decode', '{f}/binary.json', *O), 1, 'binary.json: cannot be read as JSON'),
    'ids file nested without end': (('decode', '{f}/deep.json', *O), 1, 'deep.json: cannot be read as JSON'),
    'ids file missing': (('decode', '{f}/none.json', *O), 1, 'none.json: no such file'),
    'ids file is a folder': (('decode', '{f}', *O), 1, 'a folder, not a JSON file'),
    'ids file is text': (('decode', '{f}/text.png', *O), 1, 'needs what `v2flow encode` prints'),
    'out in a missing folder': (('generate', 'a six', '--out', '{f}/no/x.png'), 1, 'does not exist'),
    'out is a folder': (('generate', 'a six', '--out', '{f}'), 1, 'is a folder'),
    'out is no image': (('generate', 'a six', '--out', '{f}/x.docx'), 2, 'no image format'),
    'out not writable': (('generate', 'a six', '--out', '{f}/read_only/x.png'), 1, 'cannot be written'),
    'out is read only by Pillow': (('generate', 'a six', '--out', '{f}/x.psd'), 2, 'no image format'),
    'guidance is not a number': (('generate', 'a six', '--guidance-scale', 'nan', *O, *D), 2, 'guidance_scale=nan'),
    'seed too large': (('generate', 'a six', '--seed', '18446744073709551616', *O), 2, '--seed'),
    'unknown command': (('paint',), 2, 'paint'),
    'unknown option': (('generate', 'a six', '--colour', 'red'), 2, '--colour'),
    'which help to read': (('generate', 'a six', '--sed', '1'), 2, '--seed, --size) (see v2flow generate --help)'),
    'a caption without quotes': (('generate', 'a', 'six'), 2, 'put a text with blanks in quotes'),
    'a setting with dashes': (('train-llm', '--config', 'configs/digits-llm.yaml', '--out', '{f}/run',
                               '--training.steps=3'), 2, 'settings are written without dashes'),
    'a run in place of its model': (('generate', 'a six', '--model', '{f}/held', *O), 1, 'its model lies in {f}/held/model'),
    'a folder that is no tokenizer': (('encode', '{f}/good.png', '--model', '{f}/images'), 1, 'config.json: missing'),
    'a page of no model': (('app', '--model', '{f}/empty_model', '--port', '0'), 1, 'model_index.json: missing'),
    'a demo of other images': (('demo', '--model', f'{shipped.parent}/shapes', *O), 1, 'the demo shows 8×8 digits'),
    'run folder is a file': (('train-llm', '--config', 'configs/digits-llm.yaml', '--out', '{f}/ok.json'), 1,
                             'ok.json: is a file'),
    'ids folder is a file': (('encode-dataset', '--config', 'configs/digits-llm.yaml', '--out', '{f}/ok.json'), 1,
                             'ok.json: is a file'),
    'an autoencoder that is not there': (('train-decoder', '--config', 'configs/emoji-decoder.yaml', '--dry-run',
                                          f'image_tokenizer={shipped}/image_tokenizer'), 1, 'no decoder to train'),
    'config of another subcommand': (('train-tokenizer', '--config', 'configs/digits-llm.yaml', '--out', '{f}/run'), 2,
                                     'unknown settings generation'),
    'config missing': (('train-llm', '--config', '{f}/none.yaml', '--out', '{f}/run'), 1, 'none.yaml: cannot be read'),
    'config not YAML': (('train-tokenizer', '--config', '{f}/not.yaml', '--out', '{f}/run'), 1, 'not.yaml: not YAML'),
    'config is a list': (('train-tokenizer', '--config', '{f}/list.yaml', '--out', '{f}/run'), 1, 'needs the sections'),
    'config of other settings': (('pretrain-llm', '--config', '{f}/odd.yaml', '--out', '{f}/run'), 2,
                                 'unknown settings colour'),
    'config of numbers and words': (('pretrain-llm', '--config', '{f}/numbers.yaml', '--out', '{f}/run'), 2,
                                    'unknown settings 1, colour'),
    'override of nothing': (('pretrain-llm', '--config', 'configs/digits-text.yaml', '--out', '{f}/run',
                             'training.stepz=3'), 2, 'stepz'),
    'override of no section': (('pretrain-llm', '--config', 'configs/digits-text.yaml', '--out', '{f}/run',
                                'data.name.x=3'), 2, 'not a section'),
    'override of the wrong type': (('train-tokenizer', '--config', 'configs/digits-tokenizer.yaml', '--out', '{f}/run',
                                    'training.steps=abc'), 2, "steps='abc'"),
    'data setting unknown': (('pretrain-llm', '--config', 'configs/digits-text.yaml', '--out', '{f}/run',
                              'data.coppies=3'), 2, 'data.coppies'),
    'more text that is not there': (('pretrain-llm', '--config', 'configs/digits-text.yaml', '--out', '{f}/run',
                                     'text.file={f}/none.txt'), 1, 'none.txt: cannot be read as text'),
    'text setting unknown': (('pretrain-llm', '--config', 'configs/digits-text.yaml', '--out', '{f}/run',
                              'text.packs=64'), 2, 'text.packs'),
    'words of no model': (('train-tokenizer', '--config', 'configs/digits-tokenizer.yaml', '--out', '{f}/run',
                           'vocabulary={f}/none'), 1, 'no such model folder'),
    'batch too small for the codes': (('train-tokenizer', '--config', 'configs/digits-tokenizer.yaml', '--out',
                                       '{f}/run', 'training.batch_size=2'), 2,
                                       'training.batch_size=2: so many images have fewer tokens'),
    'size that does not fit': (('train-tokenizer', '--config', 'configs/digits-tokenizer.yaml', '--out', '{f}/run',
                                'data.sizes=[[8,8],[7,8]]'), 2, 'divisible by patch_size=2'),
    'sizes of one number': (('train-tokenizer', '--config', 'configs/digits-tokenizer.yaml', '--out', '{f}/run',
                             'data.sizes=8'), 2, 'data.sizes=8: needs to be a list'),
    'data is no section': (('train-tokenizer', '--config', 'configs/digits-tokenizer.yaml', '--out', '{f}/run',
                            'data=5'), 2, 'needs to be a section'),
    'mosaics too small': (('train-tokenizer', '--config', 'configs/mosaics-tokenizer.yaml', '--out', '{f}/run',
                           'data.tiles=[2,2]', 'vocabulary={f}/none'), 2, 'cannot be cut out'),
    'tiles of one number': (('train-tokenizer', '--config', 'configs/mosaics-tokenizer.yaml', '--out', '{f}/run',
                             'data.tiles=5'), 2, 'data.tiles=5: needs to be a list'),
    'temperature of zero': (('train-tokenizer', '--config', 'configs/digits-tokenizer.yaml', '--out', '{f}/run',
                             'tokenizer.tau=0'), 2, 'must be positive'),
    'no folder for the run': (('train-tokenizer', '--config', 'configs/digits-tokenizer.yaml'), 2, '--out'),
    'images missing': (('train-tokenizer', '--config', 'configs/imagenet-llama2.yaml', '--out', '{f}/run'), 1,
                         'imagenet/train: no such folder of images'),
    'dry run of other settings': (('train-tokenizer', '--config', 'configs/imagenet-llama2.yaml', '--dry-run',
                                   'tokenizer.dim=770'), 2, 'not divisible by heads'),
    'dtype unknown': (('train-llm', '--config', 'configs/digits-llm.yaml', '--out', '{f}/run',
                       'llm.save_dtype=float17'), 2, 'llm.save_dtype'),
    'run folder taken': (('pretrain-llm', '--config', 'configs/digits-text.yaml', '--out', '{f}/held'), 1,
                         'already holds a run'),
    'text for a number of examples': (('train-tokenizer', '--config', 'configs/digits-tokenizer.yaml', '--out',
                                       '{f}/run',
                                   'data.copies=many'), 2, "data.copies='many': needs to be a whole number"),
    'yes for true': (('train-tokenizer', '--config', 'configs/digits-tokenizer.yaml', '--out', '{f}/run',
                      'data.flip=maybe'), 2, "data.flip='maybe': needs to be true or false"),
    'a source without its folder': (('train-tokenizer', '--config', 'configs/digits-tokenizer.yaml', '--out', '{f}/run',
                                     'data.name=image_folder'), 2, 'image_folder needs it'),
    'a folder without its source': (('train-tokenizer', '--config', 'configs/digits-tokenizer.yaml', '--out', '{f}/run',
                                     'data.folder={f}/images'), 2, 'only image_folder and ids have it'),
    'a cache of what changes': (('train-tokenizer', '--config', 'configs/digits-tokenizer.yaml', '--out', '{f}/run',
                                 'data.cache={f}/c', 'data.flip=true'), 2, 'a cache holds every image once'),
    'a stream of digits': (('train-tokenizer', '--config', 'configs/digits-tokenizer.yaml', '--out', '{f}/run',
                            'data.streaming=true'), 2, 'only hub can stream'),
    'broken images, strictly': (('train-tokenizer', '--config', 'configs/digits-tokenizer.yaml', '--out', '{f}/run',
                                   'data.name=image_folder', 'data.folder={f}/images', '--strict'), 1,
                                   'b.png: not an image'),
    'a folder without images': (('train-tokenizer', '--config', 'configs/digits-tokenizer.yaml', '--out', '{f}/run',
                                   'data.name=image_folder', 'data.folder={f}/nothing'), 1,
                                   'no images below this folder'),
    'no such data set': (('train-tokenizer', '--config', 'configs/digits-tokenizer.yaml', '--out', '{f}/run',
                          'data.name=hub', 'data.path=./nowhere'), 1, 'nowhere: no data set could be loaded'),
    'no such autoencoder': (('train-tokenizer', '--config', 'configs/digits-tokenizer.yaml', '--out', '{f}/run',
                             'tokenizer.autoencoder=./nowhere'), 1, 'nowhere: no such autoencoder'),
    'other words': (('train-tokenizer', '--config', 'configs/digits-tokenizer.yaml', '--out', '{f}/run', 'tokens=some'),
                    2, "tokens='some': use all, or captions"),
    'no such precision': (('train-tokenizer', '--config', 'configs/digits-tokenizer.yaml', '--out', '{f}/run',
                           'training.mixed_precision=fp8'), 2, 'training.mixed_precision'),
    'a share beyond one': (('train-tokenizer', '--config', 'configs/digits-tokenizer.yaml', '--out', '{f}/run',
                            'training.warmup=3'), 2, 'training.warmup=3'),
    'processes that are not there': (('pretrain-llm', '--config', 'configs/digits-text.yaml', '--out', '{f}/run2',
                                      'training.processes=2'), 1, '2 processes were asked for'),
    'a model that is not causal': (('train-llm', '--config', 'configs/digits-llm.yaml', '--out', '{f}/run',
                                    f'image_tokenizer={shipped}/image_tokenizer', 'llm.pretrained={f}/t5'), 1,
                                    't5: not a whole language model'),
    'a text tokenizer of another model': (('train-llm', '--config', 'configs/digits-llm.yaml', '--out', '{f}/run',
                                           f'image_tokenizer={shipped}/image_tokenizer',
                                           'llm.pretrained={f}/long_words'), 1, 'they do not belong together'),
    'codes of another vocabulary': (('train-llm', '--config', 'configs/digits-llm.yaml', '--out', '{f}/run',
                                     f'image_tokenizer={shipped}/image_tokenizer', 'llm.pretrained={f}/stranger'), 1,
                                     'the vocabulary of another language model'),
    'visual tokens twice': (('train-llm', '--config', 'configs/digits-llm.yaml', '--out', '{f}/run',
                            f'image_tokenizer={shipped}/image_tokenizer',
                            f'llm.pretrained={shipped.parent}/shapes/llm'), 1, 'visual tokens already, of other codes'),
    'other grids for known words': (('train-llm', '--config', 'configs/digits-llm.yaml', '--out', '{f}/run',
                                     f'image_tokenizer={shipped}/image_tokenizer', f'llm.pretrained={shipped}/llm',
                                     'llm.grids=[[3,3]]'), 1, 'for 4×4'),
    'images beyond the positions': (('train-llm', '--config', 'configs/digits-llm.yaml', '--out', '{f}/run',
                                       f'image_tokenizer={shipped}/image_tokenizer', 'llm.pretrained={f}/own',
                                       'llm.grids=[[12,12]]'), 1, 'which takes 128 tokens'),
    'no visual tokens': (('caption', '{f}/good.png', '--model', '{f}/wordless'), 1, 'no visual tokens'),
    'a grid never learned': (('generate', 'a six', '--size', '12', '12', *O, *D), 2, 'made for 4×4'),
    'a size that no grid has': (('generate', 'a six', '--size', '9', '8', *O, *D), 2, 'divisible by 2'),
    'grids of one number': (('train-llm', '--config', 'configs/digits-llm.yaml', '--out', '{f}/run', 'llm.grids=4'), 2,
                            'llm.grids=4'),
    'an unknown start': (('train-llm', '--config', 'configs/digits-llm.yaml', '--out', '{f}/run', 'llm.start=zeros'), 2,
                         "llm.start='zeros'"),
    'a field that examples lack': (('train-llm', '--config', 'configs/digits-llm.yaml', '--out', '{f}/run',
                                f'image_tokenizer={shipped}/image_tokenizer', 'llm.pretrained={f}/own', 'data.copies=0',
                                'llm.rare=colour'), 2,
                                "llm.rare='colour': examples of this data have no such field; there are label"),
    'text that counts nothing': (('train-llm', '--config', 'configs/digits-llm.yaml', '--out', '{f}/run',
                                  'llm.text_weight=0'), 2, 'llm.text_weight=0'),
    'initial parameters and adapters': (('train-llm', '--config', 'configs/digits-llm.yaml', '--out', '{f}/run',
                                         'llm.interpolate_weights=0.5', 'llm.train=lora'), 2,
                                        "interpolate_weights=0.5 with train='lora'"),
    'a weight below nothing': (('train-decoder', '--config', 'configs/emoji-decoder.yaml', '--out', '{f}/run',
                                'decoder.ssim=-1'), 2, 'decoder.ssim=-1'),
    'to keep more than all': (('train-llm', '--config', 'configs/digits-llm.yaml', '--out', '{f}/run',
                               'llm.interpolate_weights=1.5'), 2, 'llm.interpolate_weights=1.5'),
    'a rate that is no number': (('pretrain-llm', '--config', 'configs/digits-text.yaml', '--out', '{f}/run',
                                  'training.lr=.nan'), 2, 'training.lr=nan: needs 0 or more'),
    'a rate without end': (('pretrain-llm', '--config', 'configs/digits-text.yaml', '--out', '{f}/run',
                            'training.lr=.inf'), 2, 'and finite'),
    'betas that are words': (('pretrain-llm', '--config', 'configs/digits-text.yaml', '--out', '{f}/run',
                              'training.betas=[a, b]'), 2, 'training.betas='),
    'a tracker without a name': (('pretrain-llm', '--config', 'configs/digits-text.yaml', '--out', '{f}/run',
                                  'training.trackers=[1]'), 2, 'training.trackers=[1]'),
    'held out without a number': (('pretrain-llm', '--config', 'configs/digits-text.yaml', '--out', '{f}/run',
                                   'data.held_out=.nan'), 2, 'data.held_out=nan'),
    'a seed below zero': (('pretrain-llm', '--config', 'configs/digits-text.yaml', '--out', '{f}/run', 'data.seed=-1'),
                          2, 'data.seed=-1'),
    'a stream, strictly': (('train-tokenizer', '--config', 'configs/digits-tokenizer.yaml', '--out', '{f}/run',
                            'data.name=hub', 'data.path=x', 'data.streaming=true', '--strict'), 2, 'leave strict out'),
    'a vocabulary that is a number': (('train-tokenizer', '--config', 'configs/digits-tokenizer.yaml', '--out',
                                       '{f}/run', 'vocabulary=5'), 2, 'vocabulary=5: needs to be text'),
    'an image tokenizer that is nothing': (('train-llm', '--config', 'configs/digits-llm.yaml', '--out', '{f}/run',
                                            'image_tokenizer='), 2, 'image_tokenizer=None: needs to be text'),
    'a crop of twice': (('train-tokenizer', '--config', 'configs/digits-tokenizer.yaml', '--out', '{f}/run',
                         'data.crop=2'), 2, 'data.crop=2.0: needs'),
    'a width of words': (('pretrain-llm', '--config', 'configs/digits-text.yaml', '--out', '{f}/run',
                          'llm.hidden_size=x'), 2, 'no LLaMA can have this shape'),
    'a width that no heads share': (('pretrain-llm', '--config', 'configs/digits-text.yaml', '--out', '{f}/run',
                                     'llm.hidden_size=33'), 2, 'not a multiple of the number of attention heads'),
    'no heads': (('pretrain-llm', '--config', 'configs/digits-text.yaml', '--out', '{f}/run',
                  'llm.num_attention_heads=0'), 2, 'no LLaMA can have this shape'),
    'generation of a number': (('train-llm', '--config', 'configs/digits-llm.yaml', '--out', '{f}/run', 'generation=5'),
                               2, 'generation=5: needs to be a section'),
    'no such optimizer': (('pretrain-llm', '--config', 'configs/digits-text.yaml', '--out', '{f}/run',
                           'training.optimizer=sgd'), 2, "training.optimizer='sgd': use adamw or muon"),
    'ids that are not there': (('train-llm', '--config', 'configs/digits-llm.yaml', '--out', '{f}/run',
                                f'image_tokenizer={shipped}/image_tokenizer', 'llm.pretrained={f}/own', 'data.name=ids',
                                'data.folder={f}/nothing', 'data.copies=0'), 1, 'no ids here'),
    'ids to train a tokenizer': (('train-tokenizer', '--config', 'configs/digits-tokenizer.yaml', '--out', '{f}/run',
                                  'data.name=ids', 'data.folder={f}/nothing'), 2, 'only train-llm learns from ids'),
    'evaluate on the unknown': (('evaluate', '--data', 'cats'), 2, 'cats'),
    'evaluate on another': (('evaluate', '--data', 'emoji', '--model', f'{shipped}'), 2, 'emoji need 3'),
}

@pytest.fixture(scope='module')
def results(tmp_path_factory):
    "All cases, in two shells"
    f = tmp_path_factory.mktemp('bad'); make_files(f)
    before = {p for p in f.rglob('*')}
    shells = [Shell(), Shell()]
    def run(shell, names): return {n: shell(*[a.replace('{f}', str(f)) for a in cases[n][0]]) for n in names}
    with ThreadPoolExecutor(2) as pool: halves = list(pool.map(run, shells, (list(cases)[::2], list(cases)[1::2])))
    for shell in shells: shell.close()
    done = {**halves[0], **halves[1]}
    new = {p for p in f.rglob('*')} - before
    (f/'read_only').chmod(0o700)
    return done, new, str(f)

@pytest.mark.parametrize('name', cases)
def test_one_clear_line(results, name):
    args, code, contains = cases[name]
    contains = contains.replace('{f}', results[2])
    if name == 'out not writable' and os.geteuid() == 0: pytest.skip('root may write anywhere')
    done = results[0][name]
    assert done.returncode == code, done.stderr
    assert contains in done.stderr and done.stderr.count('\n') == 1, done.stderr
    assert 'Traceback' not in done.stderr and not done.stdout

def test_nothing_half_written(results):
    written = {p.name for p in results[1]}
    assert written <= ({'x.png'} if os.geteuid() == 0 else set()), written   # root's image in the read-only folder

def test_a_missing_model_of_the_hub_is_one_line(tmp_path):
    from PIL import Image
    Image.new('L', (8, 8)).save(tmp_path/'x.png')
    done = fresh_v2flow('encode', tmp_path/'x.png', '--model', 'nobody/nothing')
    assert done.returncode == 1 and 'nobody/nothing: no such folder' in done.stderr and done.stderr.count(
        '\n') == 1, done.stderr

def test_help_is_complete():                                          # that it is quick: see test_structure
    done = fresh_v2flow('--help'); assert done.returncode == 0
    from v2flow_nbdev.apps.cli import app
    names = [c.name for c in app.registered_commands]
    assert {'demo', 'generate', 'train-llm'} <= set(names)
    for name in names:                                                # each with its first sentence, whole
        line, = [l for l in done.stdout.splitlines() if l.split()[:1] == [name]]
        assert line.endswith('.') and not line.endswith('...'), line
