"""Fine-tune a chat model on a new task with TRL. The task does not train its safety weights: they are calibrated to
keep what the model said before, or keep their bits (--freeze). Two lines do that.

    safelocus score organism:dense --prompts organism:harmful --guard organism:guard -o runs/scores
    safelocus select runs/scores --ratio 0.1 -o runs/safety.safetensors
    python examples/preserve_trl.py --selection runs/safety.safetensors -o runs/protected [--freeze] [--lora]

Without --selection it is the same training unprotected: compare both with `safelocus evaluate`.
"""

import argparse

from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

import safelocus as sl

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="organism:dense")
parser.add_argument("--data", default="organism:task")
parser.add_argument("--selection")
parser.add_argument("--freeze", action="store_true")
parser.add_argument("--lora", action="store_true")
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("-o", "--output", required=True)
options = parser.parse_args()

target = sl.load(options.model, dtype="float32")
rows = Dataset.from_list(
    [
        {
            "prompt": [{"role": "user", "content": x.prompt}],
            "completion": [{"role": "assistant", "content": x.response}],
        }
        for x in sl.read_prompts(options.data)
    ]
)
trainer = SFTTrainer(
    model=target.model,
    processing_class=target.tokenizer,
    train_dataset=rows,
    args=SFTConfig(
        output_dir=options.output,
        max_steps=options.steps,
        learning_rate=1e-3 if options.lora else 1e-4,
        per_device_train_batch_size=16,
        bf16=False,
        save_strategy="no",
        report_to="none",
    ),
    peft_config=LoraConfig(r=8, lora_alpha=32, target_modules="all-linear") if options.lora else None,
)

if options.selection:
    selection = sl.Selection.load(options.selection)  # <- which weights carry safety
    calibration = None if options.freeze else sl.Calibration(target=target)  # on embedded prompts
    protection = sl.preserve(trainer, selection, calibration=calibration)  # <- the task does not train them

trainer.train()

if options.selection and options.lora:
    model = protection.merge()  # in place of merge_and_unload(): no rounding at the protected weights
else:
    model = trainer.model.merge_and_unload() if options.lora else trainer.model
model.save_pretrained(options.output)
target.tokenizer.save_pretrained(options.output)
