"""Supervised fine-tuning on conversations, with TRL: an ordinary script, written as for one GPU.

    python examples/sft_trl.py --model Qwen/Qwen3-0.6B --data chats.jsonl --output_dir out --max_steps 100

The same file, sharded:

    accelerate launch --config_file recipes/accelerate/tp2_zero1.yaml -m tp_plugin.run examples/sft_trl.py ...
"""

from dataclasses import dataclass, field

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, set_seed
from trl import SFTConfig, SFTTrainer


@dataclass
class ScriptArguments:
    model: str = field(metadata={"help": "A model of the hub, or a directory."})
    data: str = field(metadata={"help": "JSON lines with `prompt` and `completion`, or with `messages`."})
    held_out: float = field(default=0.0, metadata={"help": "The share of the data to evaluate on, not trained."})
    lora_rank: int = field(
        default=0, metadata={"help": "Train adapters of this rank on all linear layers; 0 trains all."}
    )


def main() -> None:
    script, args = HfArgumentParser((ScriptArguments, SFTConfig)).parse_args_into_dataclasses()
    set_seed(args.seed)
    data = load_dataset("json", data_files=script.data, split="train")
    parts = data.train_test_split(script.held_out, seed=args.seed) if script.held_out else {"train": data}

    adapters = None
    if script.lora_rank:
        from peft import LoraConfig

        adapters = LoraConfig(r=script.lora_rank, lora_alpha=2 * script.lora_rank, target_modules="all-linear")

    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(script.model, dtype="auto"),
        args=args,
        train_dataset=parts["train"],
        eval_dataset=parts.get("test"),
        processing_class=AutoTokenizer.from_pretrained(script.model),
        peft_config=adapters,
    )
    trainer.train()
    if "test" in parts:
        trainer.save_metrics("eval", trainer.evaluate())
    trainer.save_state()
    trainer.save_model()


if __name__ == "__main__":
    main()
