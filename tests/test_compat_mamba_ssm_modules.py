"""The modules and models of mamba_ssm over our ops: caches, packed sequences, checkpoints, decoding."""

import inspect
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from mamba_ops.compat import mamba_ssm
from mamba_ops.compat.mamba_ssm import blocks, generation, models
from mamba_ops.registry import use_backend
from tests.tape import Tape

PROMPT, LENGTH, CUTS = 7, 20, (0, 7, 9, 20)


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    with use_backend("torch"):  # which alone takes float64
        yield
    torch.set_default_dtype(torch.float32)


def drawn(mixer: Any) -> Any:
    """A MIMO mixer whose weights differ along its rank."""
    for name, parameter in mixer.named_parameters():
        if name.startswith("mimo_"):
            nn.init.normal_(parameter)
    return mixer


MIXERS: dict[str, Callable[[], Any]] = {
    "Mamba": lambda: mamba_ssm.Mamba(32, layer_idx=0, bias=True),
    "Mamba2": lambda: mamba_ssm.Mamba2(32, headdim=8, d_state=16, ngroups=2, layer_idx=0, dt_limit=(0.01, 0.05)),
    "Mamba2 beside an MLP": lambda: mamba_ssm.Mamba2(32, headdim=8, d_state=16, d_ssm=32, D_has_hdim=True, layer_idx=0),
    "Mamba2 without norm": lambda: mamba_ssm.Mamba2(32, headdim=8, d_state=16, rmsnorm=False, layer_idx=0),
    "Mamba3": lambda: mamba_ssm.Mamba3(32, 16, headdim=8, ngroups=2, chunk_size=4, layer_idx=0),
    "Mamba3 with norm": lambda: mamba_ssm.Mamba3(32, 16, headdim=8, is_outproj_norm=True, rope_fraction=1, layer_idx=0),
    "Mamba3 MIMO": lambda: drawn(mamba_ssm.Mamba3(32, 16, headdim=8, is_mimo=True, mimo_rank=2, layer_idx=0)),
    "Mamba3 MIMO with norm": lambda: drawn(
        mamba_ssm.Mamba3(32, 16, headdim=8, ngroups=2, is_mimo=True, chunk_size=2, is_outproj_norm=True, layer_idx=0)
    ),
    "MHA": lambda: mamba_ssm.MHA(
        32, 4, num_heads_kv=2, mlp_dim=100, causal=True, d_conv=3, rotary_emb_dim=4, layer_idx=0
    ),
}


@pytest.mark.parametrize("name", MIXERS)
def test_a_mixer_goes_on_from_its_caches(name: str) -> None:
    """A prompt in two parts, and then token by token, is the whole."""
    mixer, u = MIXERS[name](), torch.randn(2, LENGTH, 32)
    want = mixer(u)
    with torch.no_grad():
        params = generation.InferenceParams(LENGTH, 2)
        out = []
        for begin, end in ((0, PROMPT), (PROMPT, 15), *((t, t + 1) for t in range(15, LENGTH))):
            out.append(mixer(u[:, begin:end], inference_params=params))
            params.seqlen_offset = end
    torch.testing.assert_close(torch.cat(out, 1), want)
    states = mixer.allocate_inference_cache(2, LENGTH)
    kept = params.key_value_memory_dict[0]
    assert [None if t is None else (t.shape, t.dtype) for t in states] == [
        None if t is None else (t.shape, t.dtype) for t in kept
    ]


@pytest.mark.parametrize("name", [name for name in MIXERS if "MHA" not in name])
def test_a_mixer_keeps_packed_sequences_apart(name: str) -> None:
    mixer, u = MIXERS[name](), torch.randn(1, LENGTH, 32)
    want = torch.cat([mixer(u[:, a:b]) for a, b in itertools.pairwise(CUTS)], 1)
    idx = torch.repeat_interleave(torch.arange(3), torch.tensor([7, 2, 11]))[None]
    ends = torch.tensor(CUTS)
    for packed in ({"seq_idx": idx}, {"cu_seqlens": ends}, {"seq_idx": idx, "cu_seqlens": ends}):
        torch.testing.assert_close(mixer(u, **packed), want)
    token = torch.randn(3, 1, 32)
    with torch.no_grad():
        params = generation.InferenceParams(LENGTH, 3)
        torch.testing.assert_close(mixer(u, cu_seqlens=ends, inference_params=params), want)
        params.seqlen_offset = 1
        step = mixer(token, inference_params=params)
    rows = [torch.cat((u[:, a:b], token[i : i + 1]), 1) for i, (a, b) in enumerate(itertools.pairwise(CUTS))]
    torch.testing.assert_close(step, torch.cat([mixer(row)[:, -1:] for row in rows]))


@pytest.mark.parametrize("name", ["Mamba2", "Mamba3", "Mamba3 MIMO"])
def test_a_decode_goes_on_from_the_last_sequence_of_a_row(name: str) -> None:
    mixer, u, token = MIXERS[name](), torch.randn(1, 9, 32), torch.randn(1, 1, 32)
    idx = torch.tensor([[0] * 7 + [1] * 2])
    with torch.no_grad():
        params = generation.InferenceParams(LENGTH, 1)
        mixer(u, seq_idx=idx, inference_params=params)
        params.seqlen_offset = 9
        step = mixer(token, inference_params=params)
    torch.testing.assert_close(step, mixer(torch.cat((u[:, 7:], token), 1))[:, -1:])


def test_simple_mixers() -> None:
    mixer: Any = mamba_ssm.Mamba2Simple(32, headdim=8, d_state=16, learnable_init_states=True)
    nn.init.normal_(mixer.init_states)
    whole: Any = mamba_ssm.Mamba2(32, headdim=8, d_state=16)
    state = {n: t for n, t in mixer.state_dict().items() if n != "init_states"}
    whole.load_state_dict(state)
    u = torch.randn(2, LENGTH, 32)
    assert not torch.allclose(mixer(u), whole(u))
    mixer(u).sum().backward()
    assert mixer.init_states.grad.abs().sum() > 0
    nn.init.zeros_(mixer.init_states)
    torch.testing.assert_close(mixer(u), whole(u))


def test_parameters_are_those_of_the_original() -> None:
    """Names, dtypes, and what optimizers and initialisers are told of them."""
    new: dict[str, Any] = {"device": "cpu", "dtype": torch.bfloat16}
    mixer = mamba_ssm.Mamba(32, **new)
    kinds = {n: (p.dtype, getattr(p, "_no_weight_decay", False)) for n, p in mixer.named_parameters()}
    low, kept = (torch.bfloat16, False), (torch.float32, True)
    named = ("in_proj.weight", "conv1d.weight", "conv1d.bias", "x_proj.weight", "dt_proj.weight", "dt_proj.bias")
    assert kinds == {"A_log": kept, **dict.fromkeys((*named, "out_proj.weight"), low)} | {
        "D": (torch.get_default_dtype(), True)
    }
    assert mixer.dt_proj.bias._no_reinit
    sizes = functional.softplus(mamba_ssm.Mamba(32).dt_proj.bias)
    assert 0.001 * 0.99 <= sizes.min() < sizes.max() <= 0.1 * 1.01
    mixer2 = mamba_ssm.Mamba2(32, headdim=8, A_init_range=(2, 3), conv_init=0.25)
    assert set(dict(mixer2.named_parameters())) == {
        *("dt_bias", "A_log", "D", "in_proj.weight", "conv1d.weight", "conv1d.bias", "norm.weight", "out_proj.weight")
    }
    assert 2 <= mixer2.A_log.exp().min() <= mixer2.A_log.exp().max() <= 3
    assert mixer2.conv1d.weight.abs().max() <= 0.25
    mixer3 = mamba_ssm.Mamba3(32, 16, headdim=8, is_outproj_norm=True, dt_min=0.2, dt_max=0.3, dtype=torch.bfloat16)
    shapes = {n: tuple(p.shape) for n, p in mixer3.named_parameters() if p.dtype != torch.bfloat16}
    assert shapes == {"dt_bias": (8,), "B_bias": (8, 1, 16), "C_bias": (8, 1, 16), "D": (8,)}
    assert {n for n, p in mixer3.named_parameters() if getattr(p, "_no_weight_decay", False)} == {"dt_bias", "D"}
    low = {n: tuple(p.shape) for n, p in mixer3.named_parameters() if p.dtype == torch.bfloat16}
    assert low == {
        "in_proj.weight": (2 * 64 + 2 * 16 + 3 * 8 + 4, 32),
        "B_norm.weight": (16,),
        "C_norm.weight": (16,),
        "norm.weight": (64,),
        "out_proj.weight": (32, 64),
    }
    mimo = mamba_ssm.Mamba3(32, 16, headdim=8, is_mimo=True, mimo_rank=3, dtype=torch.bfloat16)
    kept = {n: tuple(p.shape) for n, p in mimo.named_parameters() if p.dtype != torch.bfloat16}
    weights = dict.fromkeys(("mimo_x", "mimo_z", "mimo_o"), (8, 3, 8))
    assert kept == shapes | weights | {"B_bias": (8, 3, 16), "C_bias": (8, 3, 16)}
    assert mimo.in_proj.weight.shape == (2 * 64 + 2 * 3 * 16 + 3 * 8 + 4, 32)
    assert [getattr(mimo, n)[0, 0, 0].item() for n in weights] == pytest.approx([1 / 3, 1, 1 / 3])
    assert [tuple(s.shape) for s in mimo.allocate_inference_cache(5, 9)] == [
        (5, 8, 4),
        (5, 8, 8, 16),
        (5, 3, 8, 16),
        (5, 8, 8),
    ]
    sizes = functional.softplus(mixer3.dt_bias)
    assert 0.2 * 0.99 <= sizes.min() <= sizes.max() <= 0.3 * 1.01


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: mamba_ssm.Mamba2(32, headdim=5), "Mamba2: headdim: got 64 channels, heads of 5 and 1 groups"),
        (lambda: mamba_ssm.Mamba2(32, headdim=8, process_group=object()), "Mamba2: process_group: got a object, exp"),
        (lambda: mamba_ssm.Mamba2(32, headdim=8, A_init_range=(0, 1)), r"Mamba2: A_init_range: got \(0, 1\), expected"),
        (lambda: mamba_ssm.Mamba2Simple(32, headdim=8, activation="gelu"), "Mamba2Simple: activation: got 'gelu'"),
        (lambda: mamba_ssm.Mamba(32, dt_init="zero"), "Mamba: dt_init: got 'zero', expected 'constant' or 'random'"),
        (lambda: mamba_ssm.MHA(32, 5), "MHA: num_heads: got 5 heads and 5 of keys and values, of 32 channels"),
        (
            lambda: models.create_block(32, 0, {"layer": "Mamba3"}),
            "create_block: ssm_cfg: got layer 'Mamba3', expected",
        ),
        (
            lambda: mamba_ssm.Mamba3(32, 16, headdim=8, is_mimo=True, mimo_rank=0),
            "Mamba3: mimo_rank: got 0, expected 1 at least",
        ),
        (lambda: mamba_ssm.Mamba3(32, 16, headdim=0), "Mamba3: headdim: got 0, expected a divisor of the 64 channels"),
        (lambda: mamba_ssm.Mamba2(32, headdim=0), "Mamba2: headdim: got 64 channels, heads of 0 and 1 groups"),
        (
            lambda: mamba_ssm.Mamba2Simple(32, headdim=8, ngroups=0),
            "Mamba2Simple: headdim: got 64 channels, heads of 8",
        ),
        (lambda: mamba_ssm.Mamba3(32, 16, headdim=5), "Mamba3: headdim: got 5, expected a divisor of the 64 channels"),
        (
            lambda: mamba_ssm.Mamba3(32, 16, headdim=8)(torch.zeros(2, 3, 32), cu_seqlens=torch.tensor([0, 3])),
            "got a b",
        ),
        (lambda: MIXERS["Mamba3"]().step(torch.zeros(1, 2, 32), *(torch.zeros(0),) * 4), "Mamba3.step: u: got shape"),
        (lambda: MIXERS["Mamba"]().step(torch.zeros(1, 2, 32), *(torch.zeros(0),) * 2), "Mamba.step: hidden_states:"),
    ],
)
def test_wrong_modules_are_refused(make: Callable[[], Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        make()


def test_caches_of_a_smaller_batch_or_of_no_layer_are_refused() -> None:
    params = generation.InferenceParams(9, 3)
    params.key_value_memory_dict[0] = MIXERS["Mamba"]().allocate_inference_cache(3, 9)
    with pytest.raises(ValueError, match="got states of 3 rows in layer 0, expected at least 4"):
        MIXERS["Mamba"]()(torch.zeros(4, 2, 32), params)
    with pytest.raises(ValueError, match="Mamba: layer_idx: got None, expected the number of the layer"):
        mamba_ssm.Mamba(32)(torch.zeros(2, 2, 32), params)


def test_projections_are_called() -> None:
    """So that hooks and wrappers see them, in every path."""
    mixer, calls = mamba_ssm.Mamba2(32, headdim=8, layer_idx=0), []
    for name, module in mixer.named_children():
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
    mixer(torch.randn(1, 5, 32))
    assert calls == ["in_proj", "norm", "out_proj"]


# -- models -----------------------------------------------------------------------------------------------------------


SSM2 = {"layer": "Mamba2", "headdim": 8, "d_state": 16}
CONFIGS: dict[str, dict[str, Any]] = {
    "mamba": {},
    "mamba2": {"ssm_cfg": SSM2, "fused_add_norm": False},
    "hybrid": {
        "ssm_cfg": SSM2,
        "attn_layer_idx": [1],
        "attn_cfg": {"num_heads": 4, "causal": True, "rotary_emb_dim": 4},
        "d_intermediate": 48,
        "rms_norm": False,
        "tie_embeddings": False,
    },
}


def new_model(name: str) -> Any:
    torch.manual_seed(0)
    config = models.MambaConfig(d_model=32, n_layer=2, vocab_size=61, **CONFIGS[name])
    return mamba_ssm.MambaLMHeadModel(config, dtype=torch.float64)


def greedy(model: Any, tokens: Tensor, length: int) -> Tensor:
    while tokens.shape[1] < length:
        tokens = torch.cat((tokens, model(tokens).logits[:, -1:, :61].argmax(-1)), 1)
    return tokens


@pytest.mark.parametrize("name", CONFIGS)
def test_generation_is_the_whole_model_again_and_again(name: str) -> None:
    model, prompt = new_model(name), torch.randint(0, 61, (2, PROMPT))
    with torch.no_grad():
        want = greedy(model, prompt, 16)
        seen: list[Tensor] = []
        streamer = type("", (), {"put": lambda _, value: seen.append(value), "end": lambda _: seen.append(None)})()
        got = model.generate(
            prompt, 16, vocab_size=61, return_dict_in_generate=True, output_scores=True, streamer=streamer, cg=True
        )
        assert torch.equal(got.sequences, want)
        logits = model(want).logits[:, PROMPT - 1 : -1, :61]
        torch.testing.assert_close(torch.stack(got.scores, 1), logits)
        assert seen.pop() is None
        assert torch.equal(torch.cat([seen[0], *seen[1:]], 1), want)
        taught = torch.randint(0, 61, (2, 12))
        taught[:, :PROMPT] = prompt
        assert torch.equal(model.generate(prompt, 16, vocab_size=61, teacher_outputs=taught)[:, :12], taught)
        ended = model.generate(prompt[:1], 16, vocab_size=61, eos_token_id=int(want[0, PROMPT + 2]))
        assert ended.shape[1] <= PROMPT + 3


@pytest.mark.parametrize("name", CONFIGS)
def test_steps_are_captured_where_a_device_has_graphs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a stand-in for these. A second prompt replays; a swap, or a larger batch, captures again."""
    tapes: list[Tape] = []
    monkeypatch.setattr(generation, "graphs_of", lambda device: tapes.append(Tape()) or tapes[-1])
    model = new_model(name)
    for rows, length, records in ((2, 16, 1), (2, 12, 0), (1, 12, 1), (3, 16, 1)):
        prompt, before = torch.randint(0, 61, (rows, PROMPT)), sum(tape.records for tape in tapes)
        with torch.no_grad():
            want = greedy(model, prompt, length)
        assert torch.equal(model.generate(prompt, length, vocab_size=61, cg=True), want)
        assert sum(tape.records for tape in tapes) == before + records
    assert sum(tape.replays for tape in tapes) == 8 + 4 + 4 + 8
    with use_backend(causal_conv1d="torch"):  # the same kernels, another selection
        model.generate(prompt, length, vocab_size=61, cg=True)
    assert sum(tape.records for tape in tapes) == 4


@pytest.mark.parametrize("name", CONFIGS)
def test_checkpoints(name: str, tmp_path: Path) -> None:
    model, tokens = new_model(name), torch.randint(0, 61, (2, 5))
    assert model.lm_head.weight.shape[0] == 64
    assert (model.lm_head.weight is model.backbone.embedding.weight) == (name != "hybrid")
    model.save_pretrained(tmp_path)
    again = mamba_ssm.MambaLMHeadModel.from_pretrained(tmp_path, device="cpu", dtype=torch.float64)
    assert again.config == model.config
    torch.testing.assert_close(again(tokens).logits, model(tokens).logits)
    torch.testing.assert_close(again(tokens, num_last_tokens=2).logits, model(tokens).logits[:, -2:])
    low = mamba_ssm.MambaLMHeadModel.from_pretrained(str(tmp_path), dtype=torch.bfloat16)
    assert low.lm_head.weight.dtype == torch.bfloat16
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"got no pytorch_model.bin, expected a checkpoint"):
        mamba_ssm.MambaLMHeadModel.from_pretrained(tmp_path)


def test_models_take_packed_documents() -> None:
    model, tokens = new_model("mamba2"), torch.randint(0, 61, (1, LENGTH))
    idx = torch.repeat_interleave(torch.arange(3), torch.tensor([7, 2, 11]))[None]
    want = torch.cat([model(tokens[:, a:b]).logits for a, b in itertools.pairwise(CUTS)], 1)
    torch.testing.assert_close(model(tokens, seq_idx=idx).logits, want)


def test_sampling() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).repeat(4000, 1)

    def shares(**options: Any) -> Tensor:
        return torch.bincount(generation.sample(logits.clone(), **options), minlength=4) / 4000

    torch.manual_seed(0)
    near: dict[str, Any] = {"atol": 0.03, "rtol": 0}
    torch.testing.assert_close(shares(), torch.tensor([1.0, 0, 0, 0]))
    torch.testing.assert_close(shares(top_k=0), torch.tensor([0.5, 0.3, 0.15, 0.05]), **near)
    torch.testing.assert_close(shares(top_k=2), torch.tensor([0.625, 0.375, 0, 0]), **near)
    torch.testing.assert_close(shares(top_k=0, top_p=0.75), torch.tensor([0.625, 0.375, 0, 0]), **near)
    torch.testing.assert_close(shares(top_k=0, min_p=0.25), torch.tensor([0.526, 0.316, 0.158, 0]), **near)
    torch.testing.assert_close(shares(top_k=2, temperature=0.5), torch.tensor([0.735, 0.265, 0, 0]), **near)
    with pytest.raises(ValueError, match=r"sample: top_p: got 1\.5, expected 0 to 1"):
        generation.sample(logits, top_k=0, top_p=1.5)
    row = torch.tensor([[2.0, -2.0, 1.0]])
    changed = generation.modify_logit_for_repetition_penalty(row.clone(), torch.tensor([[0, 1]]), 2.0)
    torch.testing.assert_close(changed, torch.tensor([[1.0, -4.0, 1.0]]))


def test_blocks_take_norms_that_they_can_fuse() -> None:
    with pytest.raises(ValueError, match=r"Block: norm_cls: got a Identity, expected an nn\.LayerNorm or RMSNorm"):
        blocks.Block(8, nn.Identity, nn.Identity, nn.Identity, fused_add_norm=True)
    assert list(inspect.signature(blocks.GatedMLP).parameters)[:3] == ["in_features", "hidden_features", "out_features"]
    mlp, x = blocks.GatedMLP(8, 100), torch.randn(2, 8)
    y, gate = mlp.fc1(x).chunk(2, -1)
    assert mlp.fc2.in_features == 128
    torch.testing.assert_close(mlp(x), mlp.fc2(y * functional.silu(gate)))
