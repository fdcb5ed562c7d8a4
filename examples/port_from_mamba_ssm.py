"""Train a small language model whose code was written for mamba_ssm, unchanged, on this machine.

Run it with `python examples/port_from_mamba_ssm.py [TEXT]`; without arguments it reads its own source. What imports
`mamba_ssm` comes after `install`, and gets the functions and modules of mamba-ops under the original names: so this
runs where mamba_ssm has no wheel, on a CPU too. The text is packed, documents in one row, and kept apart by `seq_idx`.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from mamba_ops.compat import install

install("mamba_ssm", "causal_conv1d")

# -- from here on: code as its authors wrote it -----------------------------------------------------------------------

from mamba_ssm.models.config_mamba import MambaConfig  # type: ignore[import-not-found]  # noqa: E402
from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel  # type: ignore[import-not-found]  # noqa: E402

VOCABULARY = 256  # bytes


def new_model(device: torch.device) -> Any:
    """Return a model with a Mamba-2 mixer in each of two layers."""
    ssm = {"layer": "Mamba2", "headdim": 16, "d_state": 16, "chunk_size": 32}
    config = MambaConfig(d_model=64, n_layer=2, vocab_size=VOCABULARY, ssm_cfg=ssm)
    return MambaLMHeadModel(config, device=device)


def packed(paragraphs: list[bytes], length: int) -> tuple[Tensor, Tensor]:
    """Return rows of tokens, and which paragraph each token is of."""
    tokens = torch.tensor([byte for paragraph in paragraphs for byte in paragraph])
    lengths = torch.tensor([len(paragraph) for paragraph in paragraphs])
    numbers = torch.repeat_interleave(torch.arange(len(paragraphs)), lengths)
    rows = len(tokens) // length * length
    return tokens[:rows].view(-1, length), numbers[:rows].view(-1, length).int()


def train(model: Any, tokens: Tensor, numbers: Tensor, steps: int) -> tuple[float, float]:
    """Train on random rows; return the first and the last loss, in bits a byte."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        row = torch.randint(len(tokens), (4,), device=tokens.device)
        logits = model(tokens[row], seq_idx=numbers[row]).logits[:, :-1]
        is_next = numbers[row, 1:] == numbers[row, :-1]  # the first byte of a paragraph follows nothing
        loss = cross_entropy(logits[is_next], tokens[row, 1:][is_next])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item() / math.log(2))
    return losses[0], sum(losses[-5:]) / len(losses[-5:])


def main() -> None:
    """Train, and go on with a prompt."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="?", type=Path, default=Path(__file__))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--window", type=int, default=128)
    options = parser.parse_args()
    torch.manual_seed(0)
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    paragraphs = [p for p in options.text.read_bytes().split(b"\n\n") if p]
    tokens, numbers = (t.to(device) for t in packed(paragraphs, options.window))
    model = new_model(device)
    first, last = train(model, tokens, numbers, options.steps)
    print(f"{len(paragraphs)} paragraphs in {len(tokens)} rows; loss {first:.2f} before, {last:.2f} after, bits a byte")
    prompt = tokens[:1, :16]
    out = model.generate(prompt, max_length=48, vocab_size=VOCABULARY, top_k=1)
    print(repr(bytes(out[0].tolist()).decode(errors="replace")))


if __name__ == "__main__":
    main()
