"""What is it worth that the language model was pretrained? The same architecture with random parameters, and an image tokenizer with the same codes that
takes its random table for the vocabulary: what `train-llm` needs for a row of the exam that knows no word.

    python -m benchmarks.from_scratch runs/smollm2-tokenizer-64/model runs/scratch
    v2flow train-llm --config configs/smollm2-llm-64.yaml --out runs/scratch-llm llm.pretrained=runs/scratch/llm \\
        image_tokenizer=runs/scratch/image_tokenizer llm.train=all llm.store_base=true llm.start=random …

Ids of images are those of the first tokenizer, so give its run's `ids` to the second run: cp -r runs/smollm2-llm-64/ids runs/scratch-llm. The second
tokenizer decodes them as the first does; it cannot encode, for its features would be mixtures of random embeddings."""
import argparse, sys
from pathlib import Path
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from v2flow_nbdev.base.files import read_json, write_json
from v2flow_nbdev.base.gguf import llm_folder
from v2flow_nbdev.models.tokenizer import V2Flow
from v2flow_nbdev.models.vocabulary import Vocabulary

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('image_tokenizer', type=Path); p.add_argument('out', type=Path)
    p.add_argument('--llm', default='smollm2', help='a folder, a Hub id or smollm2'); p.add_argument('--seed', type=int, default=0)
    args = p.parse_args()
    try:
        folder, tok = llm_folder(args.llm), V2Flow.from_pretrained(args.image_tokenizer)
        torch.manual_seed(args.seed)
        llm = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).to(torch.bfloat16)
        llm.save_pretrained(args.out/'llm'); AutoTokenizer.from_pretrained(folder).save_pretrained(args.out/'llm')
        tok.save_pretrained(args.out/'image_tokenizer')
        file = args.out/'image_tokenizer/config.json'
        write_json(file, read_json(file) | dict(vocab_source=str(args.out/'llm'), vocab_checksum=Vocabulary.from_pretrained(args.out/'llm').checksum))
    except (OSError, ValueError) as e: sys.exit(f'benchmarks.from_scratch: {e}')

if __name__ == '__main__': main()
