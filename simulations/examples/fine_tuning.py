"""A classifier fine-tuned by Hugging Face's Trainer: all records in one place, without privacy.

    python -m fedlora.simulations.examples.fine_tuning FILE.csv BASE OUT

FILE.csv has the columns `text` and `label`. What a private federation changes in it is all that
`private_fine_tuning.py` differs in.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification as Classifier
from transformers import AutoTokenizer, Trainer, TrainingArguments


def main(file: str, base: str, out: str) -> dict[str, float]:
    """Train on nine tenths of the records, score the last tenth, and keep the adapter."""
    with Path(file).open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    names = sorted({row["label"] for row in rows})
    tokenizer = AutoTokenizer.from_pretrained(base)
    records = [
        {
            "text": row["text"],
            "label": names.index(row["label"]),
            **tokenizer(row["text"], truncation=True, max_length=64),
        }
        for row in rows
    ]
    tenth = len(records) // 10
    lora = LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=["query", "value"])
    model = Classifier.from_pretrained(base, num_labels=len(names))
    trainer = Trainer(
        get_peft_model(model, lora),
        TrainingArguments(out, num_train_epochs=3, learning_rate=1e-3, report_to="none"),
        train_dataset=records[tenth:],
        eval_dataset=records[:tenth],
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model(out)
    return trainer.evaluate()


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
