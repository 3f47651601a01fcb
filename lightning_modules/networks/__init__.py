"""Networks: factories `(in_channels, out_channels, *, options) -> nn.Module`, meant as Hydra partials.

A network returns logits (B, K, *spatial), or a dict with `logits` and extras: `deep` (logits of coarser levels, coarsest last), `heads`
(logits of further heads on the same trunk), `features` (the last ones of each branch), `loss` (the network's own scalar term, already
weighted). Each carries the attributes that `contract.describe` documents. Networks that stand on MONAI are loaded when first asked for,
because importing MONAI takes seconds.
"""

import importlib
from typing import Any

from lesionbench.errors import nearest
from lightning_modules.networks.autoencoder import SpatialAutoencoder
from lightning_modules.networks.branched_resnet import BranchedResNet
from lightning_modules.networks.branched_unet import BranchedUNet
from lightning_modules.networks.branched_vnet import BranchedVNet
from lightning_modules.networks.contract import describe
from lightning_modules.networks.conv_transformer import transbts
from lightning_modules.networks.critic import PixelCritic
from lightning_modules.networks.dilated_unet import DilatedUNet
from lightning_modules.networks.held import held
from lightning_modules.networks.noisy import NoisyInput
from lightning_modules.networks.pack import MiddleSlice, PackUNet, pack_attention_unet
from lightning_modules.networks.paired_unet import PairedUNet
from lightning_modules.networks.subpixel import SubpixelNet
from lightning_modules.networks.swin import swin_unet
from lightning_modules.networks.window import WindowChannels

_MONAI = (
    "attention_unet",
    "basic_unet",
    "dynunet",
    "nnunet",
    "segresnet",
    "segresnet_vae",
    "swin_unetr",
    "unet",
    "unet_plus_plus",
    "unetr",
    "vnet",
)

__all__ = [
    "BranchedResNet",
    "BranchedUNet",
    "BranchedVNet",
    "DilatedUNet",
    "MiddleSlice",
    "NoisyInput",
    "PackUNet",
    "PairedUNet",
    "PixelCritic",
    "SpatialAutoencoder",
    "SubpixelNet",
    "WindowChannels",
    "describe",
    "held",
    "pack_attention_unet",
    "swin_unet",
    "transbts",
    *_MONAI,
]


def __getattr__(name: str) -> Any:
    if name in _MONAI:
        return getattr(importlib.import_module("lightning_modules.networks.monai_unets"), name)
    hint = "" if name.startswith("_") else nearest(name, __all__)
    raise AttributeError(f"module {__name__!r} has no network {name!r}{hint}")
