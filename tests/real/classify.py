"""An ordinary Trainer script: tell from which package of Python a piece of documentation is.

    python tests/real/classify.py --model MINILM --output_dir out

Written as for one GPU; accuracy and macro F1 are of rows that nothing was trained on.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)

from tests.real.python_docs import PACKAGES, subjects

HELD_OUT = 96


@dataclass
class Script:
    model: str = field(metadata={"help": "The directory of the encoder."})
    dropout: float = field(default=0.1, metadata={"help": "Of hidden states and of attention."})
    rows: int = field(default=480, metadata={"help": "Texts, of which the last are held out."})


def metrics(found: Any) -> dict[str, float]:
    chosen, wanted = np.argmax(found.predictions, -1), found.label_ids
    scores = []
    for label in range(len(PACKAGES)):
        right = ((chosen == label) & (wanted == label)).sum()
        scores.append(2 * right / max(1, (chosen == label).sum() + (wanted == label).sum()))
    return {"accuracy": float((chosen == wanted).mean()), "f1": float(np.mean(scores)), "rows": len(wanted)}


def main() -> None:
    script, args = HfArgumentParser((Script, TrainingArguments)).parse_args_into_dataclasses()
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(script.model)
    model = AutoModelForSequenceClassification.from_pretrained(
        script.model,
        num_labels=len(PACKAGES),
        hidden_dropout_prob=script.dropout,
        attention_probs_dropout_prob=script.dropout,
    )
    rows = [
        tokenizer(text, truncation=True, max_length=64) | {"labels": label} for text, label in subjects(script.rows)
    ]
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=rows[:-HELD_OUT],
        eval_dataset=rows[-HELD_OUT:],
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=metrics,
    )
    trainer.train()
    trainer.save_metrics("eval", trainer.evaluate())
    trainer.save_state()
    trainer.save_model()


if __name__ == "__main__":
    main()
