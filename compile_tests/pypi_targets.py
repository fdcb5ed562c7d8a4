"""Small models of PyPI packages that are not ours, for `python -m compile_tests --against-torch all`.

Each is a factory as `mamba-ops audit` takes it: it returns a model, and the inputs of two calls of different sizes.
Nothing is downloaded; a target whose package is not installed is left out.
"""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Made = tuple[nn.Module, list[Any]]
_TARGETS: dict[str, str] = {}  # names of factories, and the package that each needs


def _target(package: str) -> Callable[[Callable[[], Made]], Callable[[], Made]]:
    def register(factory: Callable[[], Made]) -> Callable[[], Made]:
        _TARGETS[factory.__name__] = package
        return factory

    return register


def installed() -> list[str]:
    """Return the targets whose packages are installed, as `mamba-ops audit` takes them."""
    return [f"{__name__}:{name}" for name, package in _TARGETS.items() if importlib.util.find_spec(package)]


def _images(size: int = 32, channels: int = 3) -> list[Any]:
    return [torch.randn(batch, channels, size, size) for batch in (2, 3)]


def _sequences(width: int, lengths: tuple[int, ...] = (16, 24)) -> list[Any]:
    return [torch.randn(2, length, width) for length in lengths]


def _tokens(size: int = 64, lengths: tuple[int, ...] = (16, 24)) -> list[Any]:
    return [torch.randint(size, (2, length)) for length in lengths]


def _timm(name: str, size: int = 32, **options: Any) -> Made:
    import timm

    return timm.create_model(name, pretrained=False, **options), _images(size)


@_target("timm")
def timm_resnet() -> Made:
    return _timm("resnet10t")


@_target("timm")
def timm_vit() -> Made:
    return _timm("vit_tiny_patch16_224", img_size=32, depth=2)


@_target("timm")
def timm_relpos() -> Made:
    return _timm("vit_relpos_small_patch16_224", img_size=32, depth=2)


@_target("timm")
def timm_convnext() -> Made:
    return _timm("convnext_atto", depths=(1, 1, 1, 1), size=64)


@_target("timm")
def timm_swin() -> Made:
    return _timm("swin_tiny_patch4_window7_224", img_size=56, size=56, window_size=7, depths=(2, 2), num_heads=(2, 4))


@_target("timm")
def timm_maxvit() -> Made:
    return _timm("maxvit_rmlp_pico_rw_256", img_size=64, size=64)


@_target("timm")
def timm_naflex() -> Made:
    return _timm("naflexvit_base_patch16_gap", depth=1, size=64)


@_target("torchvision")
def torchvision_densenet() -> Made:
    from torchvision.models import DenseNet

    return DenseNet(8, (2, 2), 16, memory_efficient=True), _images(64)


@_target("torchvision")
def torchvision_googlenet() -> Made:
    from torchvision.models import googlenet

    return googlenet(weights=None, init_weights=False), _images(64)


@_target("x_transformers")
def x_transformers_decoder() -> Made:
    from x_transformers import Decoder, TransformerWrapper

    return TransformerWrapper(num_tokens=64, max_seq_len=64, attn_layers=Decoder(dim=32, depth=2, heads=2)), _tokens()


@_target("x_transformers")
def x_transformers_rotary() -> Made:
    from x_transformers import Encoder, TransformerWrapper

    layers = Encoder(dim=32, depth=2, heads=2, rotary_pos_emb=True, attn_num_mem_kv=4, use_rmsnorm=True)
    return TransformerWrapper(num_tokens=64, max_seq_len=64, attn_layers=layers), _tokens()


@_target("x_transformers")
def x_transformers_alibi() -> Made:
    from x_transformers import Decoder, TransformerWrapper

    layers = Decoder(dim=32, depth=2, heads=2, alibi_pos_bias=True, alibi_num_heads=1, rel_pos_bias=False)
    return TransformerWrapper(num_tokens=64, max_seq_len=64, attn_layers=layers), _tokens()


def _graphs() -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(nodes, 8), torch.randint(nodes, (2, 3 * nodes), generator=generator)) for nodes in (10, 14)]


@_target("torch_geometric")
def geometric_gcn() -> Made:
    from torch_geometric.nn import GCN

    return GCN(8, 16, 2, 4), _graphs()


@_target("torch_geometric")
def geometric_gat() -> Made:
    from torch_geometric.nn import GAT

    return GAT(8, 16, 2, 4, heads=2), _graphs()


@_target("torch_geometric")
def geometric_pool() -> Made:
    from torch_geometric.nn import GraphUNet

    return GraphUNet(8, 16, 4, depth=2), _graphs()


@_target("torch_geometric")
def geometric_sag_pool() -> Made:
    from torch_geometric.nn import SAGPooling

    return SAGPooling(8), _graphs()


@_target("diffusers")
def diffusers_unet() -> Made:
    from diffusers import UNet2DModel

    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    model = UNet2DModel(16, block_out_channels=(32, 32), layers_per_block=1, norm_num_groups=8, **blocks)
    return model, [(image, torch.tensor(3)) for image in _images(16)]


@_target("diffusers")
def diffusers_dit() -> Made:
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=3, out_channels=3, num_layers=1, sample_size=16
    )
    calls = [
        {"hidden_states": image, "timestep": torch.ones(len(image)), "class_labels": torch.ones(len(image)).long()}
        for image in _images(16)
    ]
    return model, calls


@_target("diffusers")
def diffusers_vae() -> Made:
    from diffusers import AutoencoderKL

    return AutoencoderKL(block_out_channels=(32,), norm_num_groups=8), _images(16)


@_target("vit_pytorch")
def vit_pytorch_vit() -> Made:
    from vit_pytorch import SimpleViT

    return SimpleViT(image_size=32, patch_size=8, num_classes=4, dim=32, depth=2, heads=2, mlp_dim=32), _images()


@_target("vit_pytorch")
def vit_pytorch_navit() -> Made:
    from vit_pytorch.na_vit import NaViT

    model = NaViT(image_size=32, patch_size=8, num_classes=4, dim=32, depth=1, heads=2, mlp_dim=32)
    return model, [([[torch.randn(3, size, 16), torch.randn(3, 16, 16)]],) for size in (16, 32)]


@_target("vector_quantize_pytorch")
def vector_quantize() -> Made:
    from vector_quantize_pytorch import VectorQuantize

    return VectorQuantize(dim=32, codebook_size=16), _sequences(32)


@_target("vector_quantize_pytorch")
def vector_quantize_residual() -> Made:
    from vector_quantize_pytorch import ResidualFSQ

    return ResidualFSQ(dim=32, levels=[5, 3], num_quantizers=2), _sequences(32)


@_target("local_attention")
def local_attention_transformer() -> Made:
    from local_attention.transformer import LocalTransformer

    model = LocalTransformer(
        num_tokens=64, dim=32, depth=1, max_seq_len=64, causal=True, local_attn_window_size=8, heads=2, dim_head=16
    )
    return model, _tokens()


@_target("performer_pytorch")
def performer() -> Made:
    from performer_pytorch import Performer

    return Performer(dim=32, depth=1, heads=2, dim_head=16), _sequences(32)


@_target("colt5_attention")
def colt5() -> Made:
    from colt5_attention import ConditionalRoutedFeedForward

    return ConditionalRoutedFeedForward(32, num_heavy_tokens=8, light_ff_mult=1, heavy_ff_mult=2), _sequences(32)


@_target("mambapy")
def mambapy_mamba() -> Made:
    from mambapy.mamba import Mamba, MambaConfig

    return Mamba(MambaConfig(d_model=16, n_layers=1, d_state=4, pscan=False)), _sequences(16)


@_target("mambapy")
def mambapy_pscan() -> Made:
    from mambapy.mamba import Mamba, MambaConfig

    return Mamba(MambaConfig(d_model=16, n_layers=1, d_state=4, pscan=True)), _sequences(16)


@_target("monai")
def monai_unet() -> Made:
    from monai.networks.nets import UNet

    return UNet(2, 1, 2, channels=(8, 16), strides=(2,), num_res_units=1), _images(32, 1)


@_target("monai")
def monai_swin_unetr() -> Made:
    from monai.networks.nets import SwinUNETR

    return SwinUNETR(1, 2, feature_size=12, spatial_dims=2, depths=(1, 1, 1, 1)), _images(64, 1)


@_target("segmentation_models_pytorch")
def segmentation_unet() -> Made:
    from segmentation_models_pytorch import Unet

    return Unet("resnet18", encoder_weights=None, encoder_depth=3, decoder_channels=(16, 8, 8)), _images(64)


@_target("rotary_embedding_torch")
def rotary_embedding() -> Made:
    from rotary_embedding_torch import RotaryEmbedding

    class Rotated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rotary = RotaryEmbedding(dim=16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.rotary.rotate_queries_or_keys(x)

    return Rotated(), [torch.randn(1, 2, length, 16) for length in (16, 24)]


@_target("linformer")
def linformer_model() -> Made:
    from linformer import Linformer

    return Linformer(dim=32, seq_len=24, depth=1, heads=2, k=8), _sequences(32)


@_target("kornia")
def kornia_augmentation() -> Made:
    from kornia.augmentation import RandomHorizontalFlip

    return RandomHorizontalFlip(p=1.0), _images()


@_target("kornia")
def kornia_canny() -> Made:
    from kornia.filters import Canny

    return Canny(), _images()


@_target("gpytorch")
def gpytorch_regression() -> Made:
    import gpytorch

    class Kernel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            covariance: torch.Tensor = self.kernel(x).to_dense()
            return covariance

    return Kernel(), [torch.randn(n, 3) for n in (6, 9)]


@_target("torchdiffeq")
def torchdiffeq_rk4() -> Made:
    from torchdiffeq import odeint

    class Flow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> Any:
            return odeint(lambda t, y: self.proj(y), x, torch.linspace(0.0, 1.0, 3), method="rk4")

    return Flow(), [torch.randn(n, 8) for n in (4, 6)]


@_target("transformers")
def transformers_bert() -> Made:
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    return BertModel(config), [{"input_ids": tokens} for tokens in _tokens()]


@_target("transformers")
def transformers_mixtral() -> Made:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=32, num_local_experts=4,
    )  # fmt: skip
    return MixtralForCausalLM(config), [{"input_ids": tokens, "use_cache": False} for tokens in _tokens()]


@_target("transformers")
def transformers_t5() -> Made:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=64, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config), [{"input_ids": t, "labels": t} for t in _tokens()]
