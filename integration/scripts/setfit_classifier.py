"""A plain script of setfit: contrastive steps of the encoder, a classifier, and what both make of a few texts.

setfit_classifier.py MODEL OUT ROWS (of this process in a batch); epochs, since max_steps asks for pairs by ROWS.
"""

import json
import sys
from pathlib import Path

from datasets import Dataset
from setfit import SetFitModel, Trainer, TrainingArguments

from tests.support.sentence_runs import rows

path, out, size = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
data = Dataset.from_dict({"text": rows("pairs", 8)["anchor"], "label": [number % 2 for number in range(8)]})
arguments = TrainingArguments(
    str(out / "steps"), batch_size=size, num_epochs=1, logging_steps=1, report_to="none", seed=1, save_strategy="no"
)
trainer = Trainer(model=SetFitModel.from_pretrained(path), args=arguments, train_dataset=data)
trainer.train()
found = trainer.model.predict_proba(["w7 w30 w54", "w9 w30 w78 w12", "w100"])
trainer.model.save_pretrained(str(out / "model"))
if trainer.st_trainer.is_world_process_zero():
    log = [(entry["embedding_loss"], entry["grad_norm"]) for entry in trainer.st_trainer.state.log_history[:-1]]
    (out / "found.json").write_text(json.dumps({"log": log, "probabilities": found.tolist()}))
