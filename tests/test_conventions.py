"Pipelines and the processor do what their namesakes in `diffusers` and `transformers` do"
import copy, inspect
import numpy as np, pytest, torch
from conftest import shipped
from v2flow_nbdev.language.pipeline import V2FlowPipeline
from v2flow_nbdev.language.processor import V2FlowProcessor

def draw(pipe, prompt='a seven', n=2, seed=0, **how):
    return pipe(prompt, n, generator=[torch.Generator().manual_seed(seed + i) for i in range(n)], **how)

def test_arguments_have_the_names_of_diffusers(pipe):
    from diffusers import StableDiffusion3Pipeline
    from v2flow_nbdev.systems.tokenflow_pipeline import TokenFlowPipeline
    theirs = set(inspect.signature(StableDiffusion3Pipeline.__call__).parameters)
    wanted = {'prompt', 'negative_prompt', 'num_images_per_prompt', 'guidance_scale', 'generator', 'height', 'width', 'output_type',
              'return_dict', 'callback_on_step_end'}
    for kind in (V2FlowPipeline, TokenFlowPipeline):
        assert wanted <= theirs & set(inspect.signature(kind.__call__).parameters)
        assert callable(kind.set_progress_bar_config) and callable(kind.progress_bar)

def test_forms_of_output_hold_the_same_images(pipe):
    pil, array, tensor = (draw(pipe, output_type=t).images for t in ('pil', 'np', 'pt'))
    assert array.shape == (2, 8, 8, 1) and array.dtype == np.float32 and 0 <= array.min() <= array.max() <= 1
    assert torch.equal(torch.from_numpy(array).permute(0, 3, 1, 2), tensor)
    assert np.array_equal((array[..., 0]*255).round().astype('uint8'), np.stack([np.asarray(im) for im in pil]))
    images, ids = draw(pipe, return_dict=False)
    assert torch.equal(ids, draw(pipe).ids) and images[0].tobytes() == pil[0].tobytes()
    assert pipe.reconstruct(pil, output_type='pt').shape == (2, 1, 8, 8)
    for wrong in ('latent', 'PIL', None):
        with pytest.raises(ValueError, match='output_type'): draw(pipe, output_type=wrong)

def test_a_negative_prompt_takes_the_place_of_no_caption(pipe):
    plain = draw(pipe, guidance_scale=4.).ids
    assert torch.equal(draw(pipe, guidance_scale=4., negative_prompt='').ids, plain)
    assert not torch.equal(draw(pipe, guidance_scale=4., negative_prompt='a nine').ids, plain)
    assert torch.equal(draw(pipe, guidance_scale=4., negative_prompt='a nine', static_cache=True).ids,
                       draw(pipe, guidance_scale=4., negative_prompt='a nine').ids)           # both loops agree
    # against itself nothing is left to be driven to: as without guidance
    assert torch.equal(draw(pipe, guidance_scale=4., negative_prompt='a seven').ids, draw(pipe, guidance_scale=1.).ids)
    both = [torch.Generator().manual_seed(0) for _ in range(2)]
    several = pipe(['a seven', 'a six'], negative_prompt=['a nine', 'a two'], generator=both).ids
    assert torch.equal(several[:1], draw(pipe, 'a seven', 1, negative_prompt='a nine').ids)
    with pytest.raises(ValueError, match='no effect at guidance_scale=1'): draw(pipe, guidance_scale=1., negative_prompt='x')
    with pytest.raises(ValueError, match='3 for 1 prompts'): draw(pipe, negative_prompt=['a', 'b', 'c'])

def test_what_a_callback_returns_is_used(pipe):
    steps = []
    def look(p, step, timestep, callback_kwargs): steps.append(timestep); return callback_kwargs   # as in diffusers
    assert torch.equal(draw(pipe, callback_on_step_end=look).ids, draw(pipe).ids)
    assert steps == sorted(steps) and steps[-1] == 1. and len(steps) == 16 + pipe.image_tokenizer.config.n_iter
    def off(p, step, t, found): return dict(guidance_scale=1.) if step == 0 else {}
    first = draw(pipe, guidance_scale=6.).ids
    cut = draw(pipe, guidance_scale=6., callback_on_step_end=off).ids
    assert torch.equal(cut[:, 0], first[:, 0]) and not torch.equal(cut, first)
    other = draw(pipe, 'a four').ids
    given = draw(pipe, callback_on_step_end=lambda p, i, t, found: dict(ids=other) if i == 15 else None)
    assert torch.equal(given.ids, other)
    grey = torch.zeros(2, 1, 8, 8)
    last = lambda p, i, t, found: dict(images=grey) if t == 1 else None
    assert torch.equal(draw(pipe, callback_on_step_end=last, output_type='pt').images, grey/2 + 0.5)
    how = dict(decoder_guidance_scale=3.)
    stronger = draw(pipe, output_type='pt', callback_on_step_end=lambda *a: dict(decoder_guidance_scale=6.), **how).images
    assert not torch.equal(stronger, draw(pipe, output_type='pt', **how).images)
    for wrong, why in ((dict(ids=other), 'changed after step 15 alone'), (dict(latents=1), 'it may give guidance_scale')):
        with pytest.raises(ValueError, match=why): draw(pipe, callback_on_step_end=lambda *a: wrong)

def test_the_bar_is_shown_when_it_is_asked_for(pipe, capfd):
    quiet = copy.copy(pipe)
    draw(quiet); assert capfd.readouterr().err == ''
    quiet.set_progress_bar_config(disable=False, desc='digits', ascii=True)
    assert torch.equal(draw(quiet).ids, draw(pipe).ids)
    shown = capfd.readouterr().err
    assert 'digits: 100%' in shown and '20/20' in shown
    quiet.set_progress_bar_config(disable=True); draw(quiet)
    assert capfd.readouterr().err == ''

def test_a_chat_template_is_used_where_it_is_asked_for(pipe):
    chat = copy.copy(pipe); chat.tokenizer = copy.deepcopy(pipe.tokenizer)
    bare = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    chat.tokenizer.chat_template = bare                                           # says no more than the caption
    assert torch.equal(draw(chat, chat_template=True).ids, draw(pipe).ids)
    chat.tokenizer.chat_template = bare + ' written by hand'
    assert not torch.equal(draw(chat, chat_template=True).ids, draw(pipe).ids)
    assert torch.equal(draw(chat).ids, draw(pipe).ids)                            # not asked for, not used
    with pytest.raises(ValueError, match='no chat template; leave it out'): draw(pipe, chat_template=True)

def test_a_processor_does_what_its_pipeline_does(pipe, tmp_path):
    from PIL import Image
    processor, image = V2FlowProcessor.of(pipe), Image.new('RGB', (40, 30), 'teal')
    processor.save_pretrained(tmp_path/'p')
    for p in (processor, V2FlowProcessor.from_pretrained(tmp_path/'p'), V2FlowProcessor.from_pretrained(shipped)):
        batch = p(['a seven', 'the digit 3'], [image, image])
        assert torch.equal(batch['pixel_values'], pipe.prepare([image, image])) and set(batch) == {'input_ids', 'attention_mask',
                                                                                                   'pixel_values'}
        assert p.batch_decode(batch['input_ids']) == ['a seven', 'the digit 3']
        assert p('a </s> b')['input_ids'][0].tolist().count(p.tokenizer.eos_token_id) == 0
        assert batch.to('cpu')['attention_mask'].shape == batch['input_ids'].shape
    (tmp_path/'p/processor_config.json').write_text('{"image_size": [8]}')
    with pytest.raises(OSError, match='not two sizes'): V2FlowProcessor.from_pretrained(tmp_path/'p')
