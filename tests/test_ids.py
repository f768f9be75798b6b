("Ids are a contract: the same image gives the same ids wherever `encode` runs, and a saved tokenizer is the one that "
 "was saved")
import copy, json
from contextlib import contextmanager
from dataclasses import asdict, replace
import pytest, torch
from conftest import root, shipped
from v2flow_nbdev.models.latents import AutoencoderLatents, PixelLatents
from v2flow_nbdev.models.autoencoder import small_autoencoder
from v2flow_nbdev.language.pipeline import V2FlowPipeline
from v2flow_nbdev.models.tokenizer import V2Flow, V2FlowConfig
from v2flow_nbdev.models.tokenizer_training import DecoderTraining, TokenizerTraining
from v2flow_nbdev.models.vocabulary import Vocabulary

def autoencoder(scale=3., shift=0.2, seed=0):
    "Untrained, but with numbers that half precision rounds"
    model = small_autoencoder(4, 16, halvings=2, seed=seed)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        for p in model.parameters(): p.data.add_(0.05*torch.randn_like(p))
    return AutoencoderLatents(model, scale, shift)

def words(seed=0):
    return Vocabulary([f'w{i}' for i in range(200)],
                      torch.randn(200, 48, generator=torch.Generator().manual_seed(seed)))

def tokenizer(latents=None, **how):
    "256 random codes over 200 random tokens: many an id is nearly another, so that any rounding shows"
    torch.manual_seed(0)
    config = V2FlowConfig(**{**dict(image_size=(32, 32), image_channels=3, patch_size=4, latent_channels=4
                                    if latents else 0, codebook_size=256, dim=32, depth=1,
                                    velocity_width=32, velocity_depth=1, n_iter=1, n_steps=2, autoencoder='ours'
                                    if latents else ''), **how})
    tok = V2Flow(config, words(), latents).eval()
    tok.quantizer.initialised.fill_(True)
    x = images(16)
    codes = tok.mixtures(tok.to_latents(x), 1.).flatten(0, 1)
    tok.quantizer.codebook.copy_(torch.nn.functional.normalize(codes[torch.randperm(len(codes))[:256]]
                                                               + 0.02*torch.randn(256, 48), dim=-1).detach())
    return tok

def images(n=16, seed=5):
    return (torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))*2 - 1).repeat_interleave(4,
        2).repeat_interleave(4, 3)

@pytest.fixture(scope='module')
def tok(): return tokenizer(autoencoder())

@pytest.fixture(scope='module')
def ids(tok): return tok.encode(images())

@contextmanager
def products(precision):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try: yield
    finally: torch.set_float32_matmul_precision(before)

def surroundings(tok):
    "Ways in which others run a tokenizer"
    x = images()
    def under(context):
        def run(t):
            with context(): return t.encode(x)
        return run
    def in_training(t): m = TokenizerTraining(t).train(); m.before_step(1.); return m(x).ids
    def decoder_training(t):
        seen = []
        inner, t._latents_from = t._latents_from, lambda ids, *a, **k: seen.append(ids) or inner(ids, *a, **k)
        with torch.autocast('cpu', torch.bfloat16): DecoderTraining(t)(x)
        return seen[0]
    def latents_first(t):
        with torch.autocast('cpu', torch.bfloat16): return t.encode(latents=t.to_latents(x))
    def cast(dtype):
        def run(t): t.latents.to(dtype); return t.to(dtype).encode(x)
        return run
    return dict(autocast=under(lambda: torch.autocast('cpu', torch.bfloat16)),
                bfloat16_products=under(lambda: products('medium')), bfloat16=cast(torch.bfloat16),
                float16=cast(torch.float16),
        float16_then_float32=lambda t: t.half().float().encode(x), float64_images=lambda t: t.encode(x.double()),
        in_training_mode=lambda t: t.train().encode(x),
        a_frozen_step=lambda t: under(lambda: torch.autocast('cpu', torch.bfloat16))(type('', (),
            dict(encode=lambda s, x: in_training(t)))()),
        evaluated=lambda t: TokenizerTraining(t).eval()(x).ids, decoder_training=decoder_training,
        latents_first=latents_first,
        loaded_onto_itself=lambda t: (t.load_state_dict(t.half().state_dict()), t.encode(x))[1])

@pytest.mark.parametrize('where', list(surroundings(None)))
def test_the_same_ids_wherever_encode_runs(tok, ids, where):
    assert torch.equal(surroundings(tok)[where](copy.deepcopy(tok)), ids)

def test_the_images_would_tell_if_anything_were_rounded(tok, ids):
    "Else the tests around this one could not fail"
    for part in ('readout', 'codebook', 'encoder'):
        t = copy.deepcopy(tok)
        for p in dict(readout=[t.resampler.readout.weight], codebook=[t.quantizer.codebook],
                      encoder=t.latents.model.encoder.parameters())[part]:
            p.data.copy_(p.data.bfloat16())
        assert not torch.equal(t.encode(images()), ids), part

@pytest.mark.parametrize('dtype', [None, torch.float16, torch.bfloat16])
@pytest.mark.parametrize('cast', [None, torch.bfloat16, torch.float16])
def test_saved_after_any_cast_and_in_any_dtype(tok, ids, tmp_path, cast, dtype):
    t = copy.deepcopy(tok)
    if cast: t.to(cast)
    t.save_pretrained(tmp_path, dtype)
    again = V2Flow.from_pretrained(tmp_path)
    assert torch.equal(again.encode(images()), ids) and again.codebook_checksum == tok.codebook_checksum
    assert again.masked.mask_token.dtype == torch.float32
    again.decode(ids[:1])

def test_a_large_count_survives_half_precision(tok, tmp_path):
    t = copy.deepcopy(tok); t.quantizer.counts.fill_(1e6)                            # float16 ends at 65,504
    t.save_pretrained(tmp_path, torch.float16)
    assert V2Flow.from_pretrained(tmp_path).quantizer.counts.max() == 1e6

def test_scale_and_shift_are_those_of_the_autoencoder(tok, ids, tmp_path):
    assert (tok.config.latent_scale, tok.config.latent_shift) == (3., 0.2)
    assert tok.config.autoencoder_checksum == tok.latents.encoder_checksum
    tok.save_pretrained(tmp_path)
    again = V2Flow.from_pretrained(tmp_path)
    assert (again.latents.scale, again.latents.shift) == (3., 0.2) and torch.equal(again.encode(images()), ids)

@pytest.mark.parametrize('other, why', [(dict(scale=2.), 'latent_scale'), (dict(shift=0.), 'latent_shift'),
                                        (dict(seed=1), 'autoencoder_checksum')])
def test_another_autoencoder_is_refused(tok, tmp_path, other, why):
    with pytest.raises(ValueError, match=why): V2Flow(tok.config, words(), autoencoder(**other))
    tok.save_pretrained(tmp_path)
    autoencoder(**other).save_pretrained(tmp_path/'autoencoder')  # copied into the folder of another tokenizer
    with pytest.raises(OSError, match=why): V2Flow.from_pretrained(tmp_path)

def test_a_scale_of_one_is_a_scale_too(tmp_path):
    config = tokenizer(autoencoder(1., 0.)).config
    with pytest.raises(ValueError, match='latent_scale'): V2Flow(config, words(), autoencoder(3., 0.))

def test_a_decoder_may_be_tuned(tok, ids, tmp_path):
    t = copy.deepcopy(tok)
    for p in t.latents.model.decoder.parameters(): p.data.mul_(1.1)
    t.save_pretrained(tmp_path)
    again = V2Flow.from_pretrained(tmp_path)
    assert torch.equal(again.encode(images()), ids)
    assert all(torch.equal(a, b) for a, b in zip(again.latents.model.decoder.parameters(),
                                                 t.latents.model.decoder.parameters()))

def test_an_autoencoder_without_a_name_is_saved_too(tmp_path):
    t = tokenizer(autoencoder(), autoencoder='')
    t.save_pretrained(tmp_path)
    assert torch.equal(V2Flow.from_pretrained(tmp_path).encode(images()), t.encode(images()))

def test_loaded_without_its_autoencoder_it_is_still_saved_with_it(tok, ids, tmp_path):
    tok.save_pretrained(tmp_path/'a')
    V2Flow.from_pretrained(tmp_path/'a', autoencoder=False).save_pretrained(tmp_path/'b')
    (tmp_path/'a').rename(tmp_path/'moved')
    assert torch.equal(V2Flow.from_pretrained(tmp_path/'b').encode(images()), ids)

def test_what_is_saved_replaces_what_was_there(tok, tmp_path):
    tok.save_pretrained(tmp_path); (tmp_path/'README.md').write_text('mine')
    other = tokenizer(); other.save_pretrained(tmp_path)                             # on pixel patches: no autoencoder
    assert torch.equal(V2Flow.from_pretrained(tmp_path).encode(images()), other.encode(images()))
    assert not (tmp_path/'autoencoder').exists() and (tmp_path/'README.md').exists()
    blind = V2Flow(other.config); blind.load_state_dict(other.state_dict()); blind.save_pretrained(tmp_path)
    assert V2Flow.from_pretrained(tmp_path).vocabulary is None                       # no vocabulary of the one before
    tok.save_pretrained(tmp_path)
    assert torch.equal(V2Flow.from_pretrained(tmp_path).encode(images()), tok.encode(images()))

def test_pixel_patches_reload_with_their_scale(tmp_path):
    fit = PixelLatents.fit(images(), 4)
    t = tokenizer(latent_shift=fit.shift, latent_scale=fit.scale)
    t.save_pretrained(tmp_path)
    assert torch.equal(V2Flow.from_pretrained(tmp_path).encode(images()), t.encode(images()))

def test_a_config_of_a_newer_version_says_so(tok, tmp_path):
    tok.save_pretrained(tmp_path)
    content = json.loads((tmp_path/'config.json').read_text())
    assert content['format_version'] == V2FlowConfig.format_version
    (tmp_path/'config.json').write_text(json.dumps(content | dict(format_version=99, wavelets=3)))
    with pytest.raises(OSError, match='newer version'): V2Flow.from_pretrained(tmp_path)
    (tmp_path/'config.json').write_text(json.dumps(content | dict(wavelets=3)))
    with pytest.raises(OSError, match='wavelets'): V2Flow.from_pretrained(tmp_path)

@pytest.mark.parametrize('name', ['digits', 'shapes', 'emoji'])
def test_shipped_configs_carry_their_version(name):
    folder = root/'data/checkpoints'/name
    assert json.loads((folder/'image_tokenizer/config.json').read_text(
        ))['format_version'] == V2FlowConfig.format_version
    assert json.loads((folder/'model_index.json').read_text())['format_version'] == 1

bad_images = dict(integers=(lambda x: ((x + 1)*127.5).byte(), 'uint8'), bytes_as_floats=(lambda x: (x + 1)*127.5,
    'values from'), nan=(lambda x: x*float('nan'), 'values from'),
    one_nan=(lambda x: x.index_fill(0, torch.tensor(1), float('nan')), 'values from'),
    infinite=(lambda x: x/0, 'values from'), none=(lambda x: x[:0], 'empty'), a_list=(list, 'a list'),
    an_empty_list=(lambda x: [], 'a list'), unbatched=(lambda x: x[0], 'shape'), grey=(lambda x: x[:, :1], 'shape'),
    odd=(lambda x: x[..., :-1], 'divisible'), nothing=(lambda x: None, 'images'))

@pytest.mark.parametrize('kind', bad_images)
@pytest.mark.parametrize('entrance', ['encode', 'forward', 'to_latents'])
def test_images_are_checked_at_every_entrance(tok, kind, entrance):
    make, why = bad_images[kind]
    call = TokenizerTraining(tok).eval() if entrance == 'forward' else getattr(tok, entrance)
    with pytest.raises(ValueError, match=why): call(make(images(4)))

@pytest.mark.parametrize('dtype', [torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.int64])
def test_ids_of_any_integer_dtype(tok, dtype):
    ids = torch.arange(64)[None]
    a, b = (tok.decode(i, generator=torch.Generator().manual_seed(0)) for i in (ids, ids.to(dtype)))
    assert torch.equal(a, b)

@pytest.mark.parametrize('bad, why', [(torch.zeros(1, 64), 'integers'), (torch.zeros(1, 64).bool(), 'integers'),
                                      (torch.zeros(1, 63).long(), r'need \(B, 64\)'),
                                      (torch.full((1, 64), 256), '0 to 255'),
                                      (torch.full((1, 64), -1), '0 to 255'), (torch.zeros(0, 64).long(), 'no ids'),
                                      ([[0]*64], 'a list'), (None, 'NoneType')])
def test_ids_are_checked(tok, bad, why):
    for decode in (tok.decode, tok.decode_latents):
        with pytest.raises(ValueError, match=why): decode(bad)

@pytest.mark.parametrize('bad', [torch.zeros(1, 4, 8), torch.zeros(1, 3, 8, 8), torch.zeros(0, 4, 8, 8),
                                 torch.zeros(1, 4, 8, 8).long(), torch.full((1, 4, 8, 8), float('nan'))])
def test_latents_are_checked(tok, bad):
    for entrance in (lambda: tok.encode(latents=bad), lambda: TokenizerTraining(tok).eval()(latents=bad)):
        with pytest.raises(ValueError, match='latents'): entrance()

def test_images_or_latents_but_not_both(tok):
    x = images(1)
    for give in (dict(), dict(images=x, latents=tok.to_latents(x))):
        with pytest.raises(ValueError, match='images or latents'): tok.encode(**give)

def test_counts_that_must_agree(tok, pipe, tmp_path):
    g = lambda n: [torch.Generator().manual_seed(i) for i in range(n)]
    calls = dict(decode=lambda: tok.decode(tok.encode(images(2)), generator=g(3)),
                 decode_none=lambda: tok.decode(tok.encode(images(2)), generator=[]),
                 reconstruct=lambda: pipe.reconstruct(torch.zeros(2, 1, 8, 8), generator=g(3)),
                 pipe=lambda: pipe(['a six', 'a two'], 2, generator=g(2)),
                 pipe_none=lambda: pipe('a six', generator=[]))
    for name, call in calls.items():
        with pytest.raises(ValueError, match=r'\d generators for \d'): call()

@pytest.mark.parametrize('given', [[], (), torch.zeros(0, 1, 8, 8), [torch.zeros(1, 8, 8), torch.full((1, 8, 8), 200.)],
                                   torch.zeros(1, 1, 8, 8).byte(), [None], 7])
def test_the_pipeline_checks_images(pipe, given):
    for call in (pipe.caption, pipe.reconstruct, pipe.prepare):
        with pytest.raises(ValueError): call(given)

def test_images_of_several_sizes_are_brought_to_one(pipe):
    assert pipe.prepare([torch.zeros(1, 8, 8), torch.zeros(3, 20, 12), torch.zeros(1, 8, 8).double()]).shape == (3, 1,
        8, 8)

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_a_pipeline_after_a_cast(pipe, tmp_path, dtype):
    from v2flow_nbdev.data.sources import digits
    from v2flow_nbdev.base.images import to_tensor
    x = to_tensor([r['image'] for r in digits('test')[:40]], 1)
    ids = pipe.image_tokenizer.encode(x)
    cast = V2FlowPipeline.from_pretrained(shipped).to(dtype)
    assert torch.equal(cast.image_tokenizer.encode(x), ids) and {p.dtype for p in cast.llm.parameters()} == {dtype}
    assert len(cast('a six', 2).images) == 2 and len(cast.caption(x[:2])) == 2
    cast.save_pretrained(tmp_path)
    again = V2FlowPipeline.from_pretrained(tmp_path)
    assert torch.equal(again.image_tokenizer.encode(x), ids)
    assert len(again('a six').images) == 1

def test_a_pipeline_saved_over_another(pipe, tmp_path):
    emoji = V2FlowPipeline.from_pretrained(root/'data/checkpoints/emoji')
    emoji.save_pretrained(tmp_path)
    emoji.llm.save_pretrained(tmp_path/'llm', max_shard_size='5MB')  # and its language model in several files
    pipe.save_pretrained(tmp_path)
    again = V2FlowPipeline.from_pretrained(tmp_path)
    assert again.llm.config.vocab_size == pipe.llm.config.vocab_size and not list((tmp_path/'llm').glob('model-*'))
    assert torch.equal(again.image_tokenizer.encode(torch.zeros(1, 1, 8, 8)),
                       pipe.image_tokenizer.encode(torch.zeros(1, 1, 8, 8)))

def test_an_index_of_a_newer_version_says_so(tmp_path):
    import shutil
    shutil.copytree(shipped, tmp_path/'m', ignore=shutil.ignore_patterns('*.png'))
    index = json.loads((tmp_path/'m/model_index.json').read_text())
    (tmp_path/'m/model_index.json').write_text(json.dumps(index | dict(format_version=99)))
    with pytest.raises(OSError, match='newer version'): V2FlowPipeline.from_pretrained(tmp_path/'m')
    (tmp_path/'m/model_index.json').write_text(json.dumps(index | dict(defaults=dict(index['defaults'], glow=1))))
    with pytest.raises(OSError, match='glow'): V2FlowPipeline.from_pretrained(tmp_path/'m')

@pytest.mark.parametrize('defaults', [dict(guidance_scale='x'), dict(top_p=2.), dict(temperature=None), dict(top_k=0),
                                      dict(glow=1)])
def test_wrong_defaults_are_found_when_a_pipeline_is_made(pipe, defaults):
    with pytest.raises(ValueError): V2FlowPipeline(pipe.image_tokenizer, pipe.llm, pipe.tokenizer, defaults)

def metric_calls():
    from v2flow_nbdev.evaluation import judges as j, metrics as m
    a, b, g = torch.zeros(4, 3, 16, 16), torch.zeros(1, 3, 16, 16), torch.zeros(4, 1, 16, 16)
    return dict(psnr=lambda: m.psnr(a, b), psnr_channels=lambda: m.psnr(a, g), ssim=lambda: m.ssim(a, b),
                fidelity=lambda: m.fidelity(a, b), lpips=lambda: m.lpips(a, a[:3], network=lambda x, y: x[:, 0, 0, 0]),
                accuracy=lambda: j.accuracy(None, g, [1, 2, 3]), diversity=lambda: j.diversity(g, torch.zeros(3), g,
                    torch.zeros(4)), nearest_real=lambda: j.nearest_real(a, a, [[0]]*3),
                    top1_retrieval=lambda: j.top1_retrieval(a, a, [0]*3, [[0]]*4))

@pytest.mark.parametrize('name', metric_calls())
def test_scores_compare_as_many_of_one_as_of_the_other(name):
    with pytest.raises(ValueError, match=r'need pairs|give one for each'): metric_calls()[name]()
