"""Fine-tune a model of Transformers on the bytes of a text, with Transformers' Trainer and mamba-ops under the model.

Run it with `python examples/finetune_transformers.py FOLDER TEXT`: FOLDER is what `save_pretrained` wrote, of any model
that `use_mamba_ops` takes. Without arguments it trains a small Mamba-2 with random weights on its own source. It needs
`mamba-ops[finetune]`, and no network.
"""

import argparse
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mamba_ops.commands.targets import TargetError, quiet_transformers, tokenize, transformers_model
from mamba_ops.compat.transformers import use_mamba_ops


class Windows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """A text in pieces of one length, as Trainer wants them; the model itself shifts the labels."""

    def __init__(self, tokens: list[int], length: int) -> None:
        self.rows = torch.tensor(tokens[: len(tokens) // length * length]).view(-1, length)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def finetune(model: nn.Module, tokens: list[int], options: argparse.Namespace) -> tuple[float, float]:
    """Train a model on all but the last tenth of a text; return its loss on that before and after, in bits a token."""
    split = len(tokens) - max(len(tokens) // 10, options.window)
    train, held_out = (Windows(part, options.window) for part in (tokens[:split], tokens[split:]))
    if not len(train):
        raise TargetError(f"got a text of {len(tokens)} tokens, expected at least {2 * options.window}: two windows")
    from transformers import Trainer, TrainingArguments

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch,
            per_device_eval_batch_size=options.batch,
            learning_rate=options.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=options.steps // 10,
            max_grad_norm=1.0,
            logging_steps=max(options.steps // 10, 1),
            save_strategy="no",
            report_to=[],
            prediction_loss_only=True,
            use_cpu=options.device.type == "cpu",
            dataloader_pin_memory=options.device.type != "cpu",
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=train, eval_dataset=held_out)
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        after = trainer.evaluate()["eval_loss"]
    return before / math.log(2), after / math.log(2)


@torch.no_grad()  # decoding has no gradients
def continued(model: Any, tokens: list[int], count: int) -> list[int]:
    """Return what a model writes after some tokens."""
    prompt = torch.tensor([tokens], device=model.device)
    written = model.eval().generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, do_sample=False, pad_token_id=0
    )
    return list(written[0, len(tokens) :].tolist())


def main(arguments: list[str] | None = None) -> int:
    default = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("checkpoint", nargs="?", default="mamba2", help="a folder; by default random weights")
    parser.add_argument("text", nargs="?", type=Path, default=Path(__file__), help="a file; by default this one")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--window", type=int, default=128, help="tokens of a row")
    parser.add_argument("--batch", type=int, default=8, help="rows of a step")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="of AdamW; a checkpoint wants less")
    parser.add_argument("--out", type=Path, help="a folder, where the model is saved")
    parser.add_argument("--device", type=torch.device, default=default, help=f"default: {default}")
    options = parser.parse_args(arguments)
    try:
        import accelerate  # noqa: F401  # Trainer's
    except ModuleNotFoundError:
        parser.error("accelerate is not installed, and Trainer needs it; pip install 'mamba-ops[finetune]'")
    try:
        with quiet_transformers():
            model = transformers_model(options.checkpoint, options.device)
            tokens = tokenize(options.text.read_bytes(), options.checkpoint)
            with use_mamba_ops(model):
                before, after = finetune(model, tokens, options)
                written = continued(model, tokens[:32], 64)
            if options.out is not None:
                model.save_pretrained(options.out)
    except (TargetError, OSError) as error:
        parser.error(str(error))
    print(f"{options.text.name}, {len(tokens)} tokens, {options.steps} steps on {options.device}")
    print(f"  held out: {before:.3f} bits a token before, {after:.3f} after")
    if max(written) < 256 and options.checkpoint == "mamba2":
        print(f"  it writes: {bytes(written).decode(errors='replace')!r}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
