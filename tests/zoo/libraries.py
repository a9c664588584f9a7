"""Small models of diffusers, timm and torchvision, each with two batches of different sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.zoo.model import Small, noise


def small(
    model: Callable[[], nn.Module], batch: Callable[..., dict[str, Any]], first: Any, second: Any, maps: str
) -> Small:
    """Return a model in eval mode with its batches for two sets of sizes."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return Small(model().eval(), batch(0, *first), batch(1, *second), fallback=maps)


ATTENTION = "**.{to_q,to_v}"


def sd3() -> Small:
    """Stable Diffusion 3's transformer: images and texts in one attention."""
    from diffusers import SD3Transformer2DModel

    def batch(seed: int, rows: int, size: int, words: int) -> dict[str, Any]:
        return {
            "hidden_states": noise(seed, rows, 4, size, size),
            "encoder_hidden_states": noise(seed + 2, rows, words, 32),
            "pooled_projections": noise(seed + 4, rows, 24),
            "timestep": torch.arange(rows) + 3,
        }

    def model() -> nn.Module:
        return SD3Transformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=32,
            caption_projection_dim=32,
            pooled_projection_dim=24,
            out_channels=4,
        )

    return small(model, batch, (2, 16, 7), (3, 12, 9), ATTENTION)


def flux() -> Small:
    """Flux: packed images with their own positions, and guidance."""
    from diffusers import FluxTransformer2DModel

    def batch(seed: int, rows: int, height: int, width: int, words: int) -> dict[str, Any]:
        positions = torch.zeros(height, width, 3)
        positions[..., 1], positions[..., 2] = torch.arange(height)[:, None], torch.arange(width)[None]
        return {
            "hidden_states": noise(seed, rows, height * width, 8),
            "encoder_hidden_states": noise(seed + 2, rows, words, 32),
            "pooled_projections": noise(seed + 4, rows, 24),
            "timestep": torch.linspace(0.1, 0.9, rows),
            "img_ids": positions.reshape(-1, 3),
            "txt_ids": torch.zeros(words, 3),
            "guidance": torch.full((rows,), 3.5),
        }

    def model() -> nn.Module:
        return FluxTransformer2DModel(
            patch_size=1,
            in_channels=8,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=32,
            pooled_projection_dim=24,
            guidance_embeds=True,
            axes_dims_rope=(2, 2, 4),
        )

    return small(model, batch, (2, 4, 6, 7), (3, 5, 5, 9), ATTENTION)


def sana() -> Small:
    """Sana: linear self-attention and masked texts."""
    from diffusers import SanaTransformer2DModel

    def batch(seed: int, rows: int, size: int, words: int) -> dict[str, Any]:
        return {
            "hidden_states": noise(seed, rows, 4, size, size),
            "encoder_hidden_states": noise(seed + 2, rows, words, 24),
            "timestep": torch.arange(rows) + 3,
            "encoder_attention_mask": torch.ones(rows, words, dtype=torch.long),
        }

    def model() -> nn.Module:
        return SanaTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=4,
            attention_head_dim=8,
            num_layers=2,
            num_cross_attention_heads=4,
            cross_attention_head_dim=8,
            cross_attention_dim=32,
            caption_channels=24,
            mlp_ratio=2.0,
            sample_size=8,
            patch_size=1,
        )

    return small(model, batch, (2, 8, 7), (3, 6, 9), ATTENTION)


def sdxl_unet() -> Small:
    """SDXL's UNet, whose added conditions are a dict."""
    from diffusers import UNet2DConditionModel

    def batch(seed: int, rows: int, size: int, words: int) -> dict[str, Any]:
        return {
            "sample": noise(seed, rows, 4, size, size),
            "timestep": torch.arange(rows) + 3,
            "encoder_hidden_states": noise(seed + 2, rows, words, 32),
            "added_cond_kwargs": {"text_embeds": noise(seed + 4, rows, 24), "time_ids": torch.full((rows, 6), 64.0)},
        }

    def model() -> nn.Module:
        return UNet2DConditionModel(
            sample_size=16,
            in_channels=4,
            out_channels=4,
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=32,
            attention_head_dim=8,
            transformer_layers_per_block=(1, 2),
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=8 * 6 + 24,
            norm_num_groups=8,
            use_linear_projection=True,
        )

    return small(model, batch, (2, 16, 7), (3, 24, 9), ATTENTION)


def wan() -> Small:
    """Wan: videos, with positions in three directions."""
    from diffusers import WanTransformer3DModel

    def batch(seed: int, rows: int, frames: int, size: int, words: int) -> dict[str, Any]:
        return {
            "hidden_states": noise(seed, rows, 4, frames, size, size),
            "timestep": torch.arange(rows) + 3,
            "encoder_hidden_states": noise(seed + 2, rows, words, 16),
        }

    def model() -> nn.Module:
        return WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=16,
            freq_dim=32,
            ffn_dim=32,
            num_layers=2,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            rope_max_seq_len=32,
        )

    return small(model, batch, (2, 2, 8, 7), (3, 3, 12, 9), ATTENTION)


def detection() -> Small:
    """Faster R-CNN: a list of images of any size, with boxes for each in training."""
    from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn

    def batch(seed: int, *sizes: tuple[int, int]) -> dict[str, Any]:
        boxes = torch.tensor([[4.0, 6.0, 30.0, 40.0], [10.0, 10.0, 50.0, 44.0]])
        targets = [{"boxes": boxes.clone(), "labels": torch.tensor([1, 2])} for _ in sizes]
        images = [torch.sigmoid(noise(seed + number, 3, *size)) for number, size in enumerate(sizes)]
        return {"images": images, "targets": targets}

    def model() -> nn.Module:
        return fasterrcnn_mobilenet_v3_large_320_fpn(
            weights=None, weights_backbone=None, num_classes=5, min_size=64, max_size=96
        )

    return small(model, batch, ((64, 80), (72, 64)), ((90, 64),), "**.{fc6,fc7,cls_score}")


def segmentation() -> Small:
    """DeepLab: images of any size, with a dict of maps as its output."""
    from torchvision.models.segmentation import deeplabv3_mobilenet_v3_large

    def batch(seed: int, rows: int, height: int, width: int) -> dict[str, Any]:
        return {"x": noise(seed, rows, 3, height, width)}

    def model() -> nn.Module:
        return deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=5)

    return small(model, batch, (2, 64, 64), (3, 96, 64), "classifier.**")


def video() -> Small:
    """A Swin transformer over videos."""
    from torchvision.models.video import SwinTransformer3d

    def batch(seed: int, rows: int, frames: int, size: int) -> dict[str, Any]:
        return {"x": noise(seed, rows, 3, frames, size, size)}

    def model() -> nn.Module:
        return SwinTransformer3d(
            patch_size=[2, 4, 4], embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=[2, 4, 4], num_classes=5
        )

    return small(model, batch, (2, 4, 32), (3, 4, 48), "**.qkv")


TIMM = (
    *("vit_tiny_patch16_224", "deit_tiny_patch16_224", "beit_base_patch16_224", "eva02_tiny_patch14_224"),
    *("swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "convnext_atto", "convnextv2_atto", "resnet18"),
    *("regnety_002", "efficientnet_b0", "mobilenetv3_small_050", "mixer_s32_224", "coatnet_pico_rw_224"),
    *("cait_xxs24_224", "xcit_nano_12_p16_224", "davit_tiny", "crossvit_tiny_240", "pvt_v2_b0", "levit_128s"),
    *("mobilevit_xxs", "efficientformer_l1", "edgenext_xx_small", "poolformer_s12", "volo_d1_224"),
    *("vit_base_patch16_siglip_224", "twins_pcpvt_small", "nest_tiny", "focalnet_tiny_srf", "fastvit_t8"),
)
"""Names of timm's models, one a family."""


def timm_model(name: str) -> Small:
    """Return a model of timm with images of its own size."""
    import timm

    def model() -> nn.Module:
        created: nn.Module = timm.create_model(name, pretrained=False, num_classes=7)
        return created

    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        built = model().eval()
        for parameter in built.parameters():  # branch scales that start at zero would hide the branches
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.1)
    size = built.default_cfg["input_size"][-1]  # type: ignore[index, union-attr]
    maps = [path for path, module in built.named_modules() if _is_map(module)]
    chosen = "{" + ",".join(maps[:: max(1, len(maps) // 8)]) + "}"
    return Small(built, {"x": _picture(0, 2, size)}, {"x": _picture(1, 3, size)}, fallback=chosen)


def _is_map(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)


def _picture(seed: int, rows: int, size: int) -> Tensor:
    return noise(seed, rows, 3, size, size)


LIBRARIES: dict[str, Callable[[], Small]] = {
    "sd3": sd3,
    "flux": flux,
    "sana": sana,
    "sdxl_unet": sdxl_unet,
    "wan": wan,
    "detection": detection,
    "segmentation": segmentation,
    "video": video,
}
"""Builders by name."""
