"""Networks: factories `(in_channels, out_channels, *, options) -> nn.Module`, meant as Hydra partials.

A network returns logits (B, K, *spatial), or a dict with `logits` and extras: `deep` (logits of coarser levels, coarsest last), `heads`
(logits of further heads on the same trunk), `features` (the last ones of each branch), `presence` (logits of classes in the whole image), `loss` (the network's own scalar term, already
weighted). Each carries the attributes that `contract.describe` documents. Networks that stand on MONAI are loaded when first asked for,
because importing MONAI takes seconds.
"""

import importlib
from typing import Any

from lesionbench.errors import nearest
from lightning_modules.networks.autoencoder import SpatialAutoencoder
from lightning_modules.networks.cbam_unet import CBAMUNet
from lightning_modules.networks.cmm_net import CMMNet
from lightning_modules.networks.context_encoding_unet import ContextEncodingUNet
from lightning_modules.networks.contract import describe
from lightning_modules.networks.conv_transformer import transbts
from lightning_modules.networks.critic import PixelCritic
from lightning_modules.networks.deepseg import DeepSeg
from lightning_modules.networks.dilated_unet import DilatedUNet
from lightning_modules.networks.emsvit import EMSViT
from lightning_modules.networks.hardnet import HarDNet
from lightning_modules.networks.horizontal_unet import HorizontalUNet
from lightning_modules.networks.light_unet import LightUNet
from lightning_modules.networks.maab import MAABUNet
from lightning_modules.networks.modality_interaction import ModalityInteractionUNet
from lightning_modules.networks.multi_head_resnet import MultiHeadResNet
from lightning_modules.networks.multi_head_unet import MultiHeadUNet
from lightning_modules.networks.multi_head_vnet import MultiHeadVNet
from lightning_modules.networks.noisy import NoisyInput
from lightning_modules.networks.one_per_output import OnePerOutput
from lightning_modules.networks.pack import MiddleSlice, PackUNet, pack_attention_unet
from lightning_modules.networks.paired_unet import PairedUNet
from lightning_modules.networks.residual_unet import ResidualUNet
from lightning_modules.networks.resunet import ResUNet
from lightning_modules.networks.rrelu_unet import RReLUUNet
from lightning_modules.networks.segnet import SegNet
from lightning_modules.networks.slab import SlabChannels
from lightning_modules.networks.stateless import stateless
from lightning_modules.networks.subpixel import SubpixelNet
from lightning_modules.networks.swin import swin_unet
from lightning_modules.networks.xception_unet_plus_plus import XceptionUNetPlusPlus

_MONAI = {  # name -> the module that makes it
    "attention_unet": "monai_unets",
    "basic_unet": "monai_unets",
    "dints": "monai_dints",
    "dints_search": "monai_dints",
    "dynunet": "monai_dynunet",
    "nnunet": "monai_dynunet",
    "segresnet": "monai_segresnet",
    "segresnet_vae": "monai_segresnet",
    "swin_unetr": "monai_transformers",
    "unet": "monai_unets",
    "unet_plus_plus": "monai_unets",
    "unetr": "monai_transformers",
    "vnet": "monai_unets",
}

__all__ = [
    "CBAMUNet",
    "CMMNet",
    "ContextEncodingUNet",
    "DeepSeg",
    "DilatedUNet",
    "EMSViT",
    "HarDNet",
    "HorizontalUNet",
    "LightUNet",
    "MAABUNet",
    "MiddleSlice",
    "ModalityInteractionUNet",
    "MultiHeadResNet",
    "MultiHeadUNet",
    "MultiHeadVNet",
    "SegNet",
    "NoisyInput",
    "OnePerOutput",
    "PackUNet",
    "PairedUNet",
    "PixelCritic",
    "RReLUUNet",
    "ResUNet",
    "ResidualUNet",
    "SlabChannels",
    "SpatialAutoencoder",
    "SubpixelNet",
    "XceptionUNetPlusPlus",
    "describe",
    "pack_attention_unet",
    "stateless",
    "swin_unet",
    "transbts",
    *_MONAI,
]


def __getattr__(name: str) -> Any:
    if name in _MONAI:
        return getattr(importlib.import_module(f"lightning_modules.networks.{_MONAI[name]}"), name)
    hint = "" if name.startswith("_") else nearest(name, __all__)
    raise AttributeError(f"module {__name__!r} has no network {name!r}{hint}")
