"""Load an exported model with plain transformers in one process, run it, and sample from it.

A script that takes a JSON object of options and imports nothing of tp_plugin. The last line on stdout is a JSON object:
``loss``, ``logits_error`` and ``logits_max`` (largest absolute difference and value), ``dtype`` and ``sample``.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def visit(job: dict[str, Any]) -> dict[str, Any]:
    """Compare the model in ``job["directory"]`` with a reference and continue a prompt with it."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = {"trust_remote_code": job["trust_remote_code"]}
    model = AutoModelForCausalLM.from_pretrained(
        job["directory"], dtype="auto", attn_implementation=job["attn_implementation"], **options
    ).eval()
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    if torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > 1.5 * size:
        model.to("cuda")
    found: dict[str, Any] = {"dtype": str(model.dtype).removeprefix("torch."), "sample": None}
    with torch.no_grad():
        if job["reference"]:
            reference = load_file(job["reference"])
            losses, errors = [], []
            for row, logits in zip(reference["input_ids"], reference["logits"], strict=True):
                ids = row[None].to(model.device)
                out = model(input_ids=ids, labels=ids)
                losses.append(out.loss.float().item())
                errors.append((out.logits[0].cpu().float() - logits.float()).abs().max().item())
            found["loss"] = sum(losses) / len(losses)
            found["logits_error"] = max(errors)
            found["logits_max"] = reference["logits"].float().abs().max().item()
        if job["prompt"] is not None:
            tokenizer = AutoTokenizer.from_pretrained(job["directory"], **options)
            start = tokenizer(job["prompt"], return_tensors="pt").to(model.device)
            torch.manual_seed(job["seed"])
            ids = model.generate(
                input_ids=start["input_ids"],
                attention_mask=start["attention_mask"],
                max_new_tokens=job["max_new_tokens"],
                do_sample=True,
                top_k=20,
            )
            found["sample"] = tokenizer.decode(ids[0], skip_special_tokens=True)
    return found


if __name__ == "__main__":
    print(json.dumps(visit(json.loads(sys.argv[1]))))
