"""Fine-tune a Mixture-of-Experts model of transformers by its own Trainer, with the experts of moe_kernels.

pip install ./moe_kernels 'transformers>=5.7' accelerate
python docs/examples/trainer.py Qwen/Qwen3-30B-A3B texts.jsonl out/     # {"text": ...} in each line
"""

import json
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from transformers import DataCollatorForLanguageModeling as Collator

from moe_kernels.transformers import register


def main(name, file, out, max_length=1024, **settings):
    register()
    on_gpu = torch.cuda.is_available()
    tokenizer = AutoTokenizer.from_pretrained(name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16 if on_gpu else torch.float32)
    model.set_experts_implementation("moe_kernels")  # the one line that changes; the router stays transformers' own
    with open(file) as lines:
        texts = [json.loads(line)["text"] for line in lines]
    examples = [{"input_ids": ids} for ids in tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]]
    collator = Collator(tokenizer, mlm=False)
    settings = dict(learning_rate=1e-5, warmup_steps=20, bf16=on_gpu, logging_steps=10, report_to="none") | settings
    trainer = Trainer(model, TrainingArguments(out, **settings), collator, examples, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main(*sys.argv[1:]) if len(sys.argv) == 4 else sys.exit(__doc__)
