"""Stream text from a model of Transformers that runs on mamba-ops.

Run it with `python examples/transformers_generate.py FOLDER PROMPT`: FOLDER is what `save_pretrained` wrote, of any
model that `use_mamba_ops` takes, with its tokenizer. Without arguments a small Mamba-2 with random weights goes on with
bytes. It needs `mamba-ops[transformers]`, and no network.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mamba_ops.commands.targets import quiet_transformers
from mamba_ops.compat.transformers import use_mamba_ops


class Bytes:
    """A tokenizer whose tokens are bytes, as far as streaming needs one."""

    def __call__(self, text: str, **options: Any) -> dict[str, Tensor]:
        return {"input_ids": torch.tensor([list(text.encode())])}

    def decode(self, tokens: list[int], **options: Any) -> str:
        return bytes(tokens).decode(errors="replace")


def load(folder: Path | None) -> tuple[Any, Any]:
    """Return model and tokenizer of a folder, or a small model with random weights."""
    if folder is not None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    from transformers import Mamba2Config, Mamba2ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1, "chunk_size": 32}
    config = Mamba2Config(vocab_size=256, num_hidden_layers=2, eos_token_id=None, pad_token_id=0, **sizes)
    return Mamba2ForCausalLM(config), Bytes()


def main() -> None:
    """Load, bind, and write tokens as they come."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("prompt", nargs="?", default="The state of the sequence")
    parser.add_argument("--tokens", type=int, default=32)
    options = parser.parse_args()
    with quiet_transformers():
        from transformers import TextStreamer

        device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
        model, tokenizer = load(options.folder)
        model = model.eval().to(device)
        print(use_mamba_ops(model), file=sys.stderr)  # what runs on our ops, and what does not
        inputs = {name: tensor.to(device) for name, tensor in tokenizer(options.prompt, return_tensors="pt").items()}
        streamer, begin = TextStreamer(tokenizer, skip_prompt=True), time.perf_counter()
        made = model.generate(**inputs, streamer=streamer, max_new_tokens=options.tokens, do_sample=False)
    count = made.shape[1] - inputs["input_ids"].shape[1]
    print(f"{count} tokens, {count / (time.perf_counter() - begin):.0f} a second", file=sys.stderr)


if __name__ == "__main__":
    main()
