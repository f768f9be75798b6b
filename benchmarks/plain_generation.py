"""Generation as one would write it first, with `transformers` alone: what `generation.py` compares the library's loop with. This
file is a baseline: the sha256 of its content stands beside every result that it has part in"""
import math
import torch
import torch.nn.functional as F
from transformers import LogitsProcessorList
from v2flow_nbdev.language.generation import VisualTokenProcessor, left_pad
from v2flow_nbdev.language.sequences import image_to_text
from v2flow_nbdev.language.text_models import first_id, last_id
from v2flow_nbdev.language.visual_tokens import VisualTokens
from v2flow_nbdev.models.resampler import gumbel

def prompts(model, tokenizer, captions, grid, guided=False):
    "Captions, and as many empty ones for guidance, up to the token that begins an image: (B or 2·B, L)"
    begin, bos = VisualTokens.of(model).begin(grid), first_id(tokenizer)
    examples = [[bos, *c, begin] for c in tokenizer(captions, add_special_tokens=False).input_ids]
    return left_pad(examples + [[bos, begin]]*len(examples)*guided, model.device)

@torch.no_grad()
def image_ids(model, tokenizer, captions, grid, guidance_scale=1., generator=None, **sampling):
    "Captions → ids, (B, N), by `model.generate` with a logits processor"
    visual, batch = VisualTokens.of(model), prompts(model, tokenizer, captions, grid, guidance_scale != 1)
    length, n = batch['input_ids'].shape[1], math.prod(grid)
    processor = VisualTokenProcessor(visual, length, guidance_scale, generator=generator, grid=grid, **sampling)
    out = model.generate(**batch, do_sample=False, max_new_tokens=n, eos_token_id=None, suppress_tokens=None,
                         pad_token_id=tokenizer.pad_token_id, disable_compile=True,
                         logits_processor=LogitsProcessorList([processor]))
    return out[:len(captions), length:length + n] - visual.first

@torch.no_grad()
def captions(model, tokenizer, ids, grid, n=64):
    "Ids → text tokens, (B, at most n), by `model.generate`"
    visual = VisualTokens.of(model)
    batch = left_pad([image_to_text(visual, first_id(tokenizer), i, [])[0] for i in ids.unflatten(1, grid)], model.device)
    out = model.generate(**batch, do_sample=False, max_new_tokens=n, eos_token_id=last_id(tokenizer),
                         pad_token_id=tokenizer.pad_token_id, suppress_tokens=list(visual.new), disable_compile=True)
    return out[:, batch['input_ids'].shape[1]:]

@torch.no_grad()
def two_passes(model, tokenizer, captions, grid, guidance_scale=2., generator=None):
    "Ids as `generate_image_ids` draws them, (B, N), by two calls of the model per token: with the caption, and without"
    visual, ids = VisualTokens.of(model), []
    both = [dict(prompts(model, tokenizer, c, grid), use_cache=True, logits_to_keep=1)
            for c in (captions, ['']*len(captions))]
    for branch in both: branch['position_ids'] = (branch['attention_mask'].cumsum(1) - 1).clamp(min=0)
    for _ in range(math.prod(grid)):
        logits = []
        for branch in both:
            out = model(**branch)
            branch['past_key_values'] = out.past_key_values
            logits.append(out.logits[:, -1, visual.first:visual.first + visual.codebook_size].log_softmax(-1))
        mixed = torch.lerp(logits[1], logits[0], guidance_scale)
        ids.append((mixed + gumbel(mixed.shape, generator, mixed.device)).argmax(-1, keepdim=True))
        for branch in both:
            branch.update(input_ids=visual.first + ids[-1], attention_mask=F.pad(branch['attention_mask'], (0, 1),
                value=1), position_ids=branch['position_ids'][:, -1:] + 1)
    return torch.cat(ids, 1)
