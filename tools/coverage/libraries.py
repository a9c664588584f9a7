"""Models of timm and torchvision by name, small ones if a family has them, and shrunken classes of diffusers."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn

from tools.coverage.diffusion import classes, diffusion_model
from tools.coverage.lookup import floats

ROWS = 3
SIDE = 96
"""The height and width of pictures for models that accept any size."""

TIMM = (
    "beit_base_patch16_224", "bat_resnext26ts", "cait_xxs24_224", "caformer_s18", "coat_lite_tiny",
    "coatnet_nano_rw_224", "convformer_s18", "convit_tiny", "convmixer_768_32", "convnext_atto", "convnextv2_atto",
    "crossvit_tiny_240", "cspdarknet53", "davit_tiny", "deit_tiny_patch16_224", "densenet121", "dla34", "dpn48b",
    "edgenext_xx_small", "efficientformer_l1", "efficientformerv2_s0", "efficientnet_b0", "efficientvit_b0",
    "eva02_tiny_patch14_224", "fastvit_t8", "fastvit_mci0", "focalnet_tiny_srf", "gcvit_xxtiny", "ghostnet_050",
    "hgnetv2_b0", "hiera_tiny_224", "hrnet_w18_small", "inception_next_atto", "levit_128s", "maxvit_nano_rw_256",
    "mixer_s32_224", "mobilenetv3_small_050", "mobilenetv4_conv_small", "mobileone_s0", "mobilevitv2_050",
    "mvitv2_tiny", "naflexvit_base_patch16_gap", "nest_tiny", "pit_ti_224", "poolformer_s12", "pvt_v2_b0",
    "regnetx_002", "repvit_m0_9", "resnet18", "rexnetr_100", "sequencer2d_s", "swin_tiny_patch4_window7_224",
    "swinv2_tiny_window8_256", "tiny_vit_5m_224", "twins_pcpvt_small", "vgg11", "visformer_tiny",
    "vit_tiny_patch16_224", "volo_d1_224", "xcit_nano_12_p16_224",
)  # fmt: skip
"""One name per family."""

TORCHVISION = (
    "alexnet", "convnext_tiny", "deeplabv3_mobilenet_v3_large", "deeplabv3_resnet50", "densenet121", "efficientnet_b0",
    "efficientnet_v2_s", "fasterrcnn_mobilenet_v3_large_320_fpn", "fasterrcnn_resnet50_fpn", "fcn_resnet50",
    "fcos_resnet50_fpn", "googlenet", "inception_v3", "keypointrcnn_resnet50_fpn", "lraspp_mobilenet_v3_large",
    "maskrcnn_resnet50_fpn", "maxvit_t", "mc3_18", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "mvit_v1_b",
    "r3d_18", "raft_small", "regnet_y_400mf", "resnet18", "retinanet_resnet50_fpn", "s3d", "shufflenet_v2_x0_5",
    "squeezenet1_0", "ssd300_vgg16", "ssdlite320_mobilenet_v3_large", "swin3d_t", "swin_t", "swin_v2_t", "vgg11",
    "vit_b_16", "wide_resnet50_2",
)  # fmt: skip
"""One name per family and task."""


def other_rows() -> Iterator[tuple[str, str, str]]:
    """Yield every (table, library, name) of libraries other than transformers."""
    yield from (("diffusers", "diffusers", f"diffusers/{name}") for name in classes())
    yield from (("timm", "timm", f"timm/{name}") for name in TIMM)
    yield from (("torchvision", "torchvision", f"torchvision/{name}") for name in TORCHVISION)


def other_model(library: str, name: str) -> tuple[nn.Module, dict[str, Any]]:
    """Build a random model in eval mode, and inputs that it accepts.

    Raises:
        Exception: the library cannot build it.
    """
    build = {"diffusers": diffusion_model, "timm": _timm, "torchvision": _torchvision}[library]
    return build(name.partition("/")[2])


def _timm(name: str) -> tuple[nn.Module, dict[str, Any]]:
    timm: Any = importlib.import_module("timm")
    model: nn.Module = timm.create_model(name, pretrained=False, num_classes=7).eval()
    size = model.pretrained_cfg["input_size"]  # type: ignore[index]
    return model, {"x": floats(ROWS, *size)}


def _torchvision(name: str) -> tuple[nn.Module, dict[str, Any]]:
    models: Any = importlib.import_module("torchvision.models")
    builder = models.get_model_builder(name)
    takes = inspect.signature(builder).parameters
    options: dict[str, Any] = {"weights_backbone": None} if "weights_backbone" in takes else {}
    if "rcnn" in name or name.startswith(("fcos", "retinanet")):
        options |= {"min_size": 120, "max_size": 160}
    if name in ("googlenet", "inception_v3"):
        options |= {"aux_logits": False, "init_weights": True}
    model: nn.Module = builder(weights=None, **options).eval()
    module = type(model).__module__
    if ".detection." in module:
        return model, {"images": [floats(3, 120, 160), floats(3, 140, 130)]}
    if ".video." in module:
        frames = (16, 224, 224) if name.startswith(("mvit", "s3d")) else (8, 64, 64)
        return model, {"x": floats(2, 3, *frames)}
    if ".optical_flow." in module:
        return model, {"image1": floats(2, 3, 128, 128), "image2": floats(2, 3, 128, 136)[..., :128].contiguous()}
    side = 224 if name.startswith(("alexnet", "inception", "maxvit", "swin", "vit")) else SIDE
    first = next(iter(inspect.signature(model.forward).parameters))
    return model, {first: floats(ROWS, 3, side, side)}
