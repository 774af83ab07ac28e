"""Official models of the field: where their code is, their toy and published sizes, and their conventions."""

from dataclasses import dataclass
from typing import Any

OPTIMIZER = {"model": ["model", ""], "averages": [["ema", ""]]}
REPA = OPTIMIZER | {"others": ["opt", "args", "steps"]}
VAVAE = OPTIMIZER | {"others": ["opt", "config"]}
STAGE_2 = OPTIMIZER | {"others": ["step", "epoch", "optimizer", "scheduler"]}
MULTI_PATCH = OPTIMIZER | {"others": ["opt", "epoch", "train_steps", "args"]}
JIT = {"model": ["model", "net."], "averages": [["model_ema1", "net."], ["model_ema2", "net."]]}
JIT |= {"others": ["optimizer", "epoch", "args"]}
LIGHTNING = {"model": ["state_dict", "denoiser."], "averages": [["state_dict", "ema_denoiser."]]}
LIGHTNING |= {"others": ["epoch", "global_step", "optimizer_states", "callbacks"]}
LIGHTNING |= {"beside": {"diffusion_trainer.proj.0.0.weight": [6, 32], "diffusion_trainer.proj.0.0.bias": [6]}}


@dataclass(frozen=True)
class Model:
    """One official class and what this record makes of it.

    `root` and `module`: folder in the checkout that its imports start from, and the module. `toy`: the constructor's
    arguments of the record. `sizes`: those of published sizes. `side`, `full`: width of the input, toy and published.
    `label`: the label's argument. `wide`: whether the official code takes images that are not square.
    """

    checkout: str
    module: str
    kind: str
    toy: dict[str, Any]
    sizes: dict[str, dict[str, Any]]
    side: int
    full: int
    noise_at: int
    predicts: str
    saved: dict[str, Any]
    root: str = "."
    stubs: tuple[str, ...] = ()
    channels: int = 4
    label: str = "y"
    wide: bool = False


def lightning_dit(qk_norm: bool) -> Model:
    modern = {"use_qknorm": qk_norm, "use_swiglu": True, "use_rope": True, "use_rmsnorm": True, "wo_shift": False}
    toy = {"input_size": 4, "patch_size": 1, "in_channels": 4, "hidden_size": 32, "depth": 3, "num_heads": 4}
    full = {"input_size": 16, "patch_size": 1, "in_channels": 32, "hidden_size": 1152, "depth": 28, "num_heads": 16}
    fair = "fairscale.nn.model_parallel"
    stubs = ("fairscale", "fairscale.nn", fair, f"{fair}.initialize", f"{fair}.layers")
    return Model(
        "LightningDiT", "models.lightningdit", "LightningDiT", toy | modern | {"num_classes": 10},
        {"LightningDiT-XL/1": full | modern}, 4, 16, 0, "image - noise", VAVAE, stubs=stubs,
    )  # fmt: skip


def repa() -> Model:
    toy = {"input_size": 8, "patch_size": 2, "in_channels": 4, "hidden_size": 32, "decoder_hidden_size": 32}
    toy |= {"encoder_depth": 2, "depth": 3, "num_heads": 4, "num_classes": 10, "z_dims": [16], "projector_dim": 24}
    more = {"path_type": "linear", "class_dropout_prob": 0.1, "fused_attn": True, "qk_norm": False}
    full = {"input_size": 32, "hidden_size": 1152, "decoder_hidden_size": 1152, "depth": 28, "num_heads": 16}
    sizes = {"SiT-XL/2": full | more | {"z_dims": [768]}, "SiT-XL/2 trunk": full | more | {"z_dims": []}}
    return Model("REPA", "models.sit", "SiT", toy | more, sizes, 8, 32, 1, "noise - image", REPA)


def jit() -> Model:
    def size(width: int, depth: int, heads: int, bottleneck: int, start: int) -> dict[str, Any]:
        found = {"hidden_size": width, "depth": depth, "num_heads": heads, "bottleneck_dim": bottleneck}
        return found | {"in_context_start": start, "in_context_len": 32, "patch_size": 16, "input_size": 256}

    toy = size(32, 4, 4, 12, 2) | {"input_size": 16, "patch_size": 4, "in_context_len": 5, "num_classes": 10}
    sizes = {"JiT-B/16": size(768, 12, 12, 128, 4), "JiT-L/16": size(1024, 24, 16, 128, 8)}
    sizes |= {"JiT-H/16": size(1280, 32, 16, 256, 10), "JiT-G/16": size(1664, 40, 16, 256, 10)}
    return Model("JiT", "model_jit", "JiT", toy, sizes, 16, 256, 0, "image", JIT, channels=3)


def pixel_dit(post: bool) -> Model:
    def size(width: int, patch_depth: int, pixel_depth: int, heads: int) -> dict[str, Any]:
        found = {"hidden_size": width, "patch_depth": patch_depth, "pixel_depth": pixel_depth, "num_groups": heads}
        found |= {"in_channels": 3, "patch_size": 16, "pixel_hidden_size": 16}
        return found | {"pit_adaln_post_modulation": post}

    toy = size(32, 2, 2, 4) | {"patch_size": 4, "pixel_hidden_size": 8, "num_classes": 10}
    sizes = {"PixelDiT-B/16": size(768, 12, 2, 12), "PixelDiT-L/16": size(1024, 22, 4, 16)}
    sizes |= {"PixelDiT-XL/16": size(1152, 26, 4, 16)}
    return Model(
        "PixelDiT", "pixdit_core.pixeldit_c2i", "PixDiT", toy, sizes, 16, 256, 0, "image - noise", LIGHTNING,
        channels=3, wide=True,
    )  # fmt: skip


def nerf(checkout: str, module: str, inner: int, large: tuple[int, int], xl: tuple[int, int]) -> Model:
    """DeCo and PixNerd: one class name, two codes."""

    def size(width: int, blocks: tuple[int, int], heads: int = 16) -> dict[str, Any]:
        found = {"hidden_size": width, "num_cond_blocks": blocks[0], "num_blocks": blocks[1], "num_groups": heads}
        return found | {"in_channels": 3, "patch_size": 16, "hidden_size_x": inner, "nerf_mlpratio": 2}

    toy = size(32, (2, 4), 4) | {"patch_size": 4, "hidden_size_x": 8, "num_classes": 10}
    sizes = {f"{checkout}-L/16": size(1024, large), f"{checkout}-XL/16": size(1152, xl)}
    return Model(
        checkout, module, "PixNerDiT", toy, sizes, 16, 256, 0, "image - noise", LIGHTNING, channels=3, wide=True
    )


def ddt() -> Model:
    def size(width: int, encoder: int, blocks: int, heads: int) -> dict[str, Any]:
        found = {"hidden_size": width, "num_encoder_blocks": encoder, "num_blocks": blocks, "num_groups": heads}
        return found | {"in_channels": 4, "patch_size": 2}

    toy = size(32, 2, 4, 4) | {"num_classes": 10}
    sizes = {"DDT-B/2": size(768, 8, 12, 12), "DDT-L/2": size(1024, 20, 24, 16), "DDT-XL/2": size(1152, 22, 28, 16)}
    module = "src.models.denoiser.decoupled_improved_dit"
    return Model("DDT", module, "DDT", toy, sizes, 8, 32, 0, "image - noise", LIGHTNING, wide=True)


def rae() -> Model:
    def size(width: int, depth: int, heads: int) -> dict[str, Any]:
        found = {"hidden_size": [width, 2048], "depth": [depth, 2], "num_heads": [heads, 16], "in_channels": 768}
        return found | {"input_size": 16, "patch_size": 1, "use_qknorm": False}

    toy = {"hidden_size": [32, 48], "depth": [2, 2], "num_heads": [4, 4], "in_channels": 6}
    toy = size(0, 0, 0) | toy | {"input_size": 4, "num_classes": 10}
    sizes = {"S": size(384, 12, 6), "B": size(768, 12, 12), "L": size(1024, 24, 16), "XL": size(1152, 28, 16)}
    sizes = {f"DiTDH-{name}": value for name, value in sizes.items()}
    return Model(
        "RAE", "stage2.models.DDT", "DiTwDDTHead", toy, sizes, 4, 16, 1, "noise - image", STAGE_2, root="src",
        stubs=("transformers", "regex"), channels=6,
    )  # fmt: skip


def rae_v2(guidance: bool) -> Model:
    full = {"hidden_size": [1440, 2048], "depth": [28, 2], "num_heads": [20, 16], "in_channels": 1024}
    full |= {"input_size": 16, "patch_size": [1, 1], "cond_arch": {"num_t_tokens": 4, "num_c_tokens": 8}}
    toy = {"hidden_size": [32, 48], "depth": [3, 2], "num_heads": [4, 4], "in_channels": 6, "input_size": 4}
    toy = full | toy | {"cond_arch": {"num_t_tokens": 2, "num_c_tokens": 3}, "num_classes": 10}
    if guidance:
        full, toy = full | {"base_model_depth": 8}, toy | {"base_model_depth": 2}
    return Model(
        "RAEv2", "stage2.models.DDT", "DiTwDDTHeadIG" if guidance else "DiTwDDTHead", toy, {"DiTDH": full}, 4, 16, 1,
        "image", STAGE_2, root="src", stubs=("transformers",), channels=6, label="context",
    )  # fmt: skip


def mpdit() -> Model:
    def size(width: int, depth: int, heads: int) -> dict[str, Any]:
        found = {"hidden_size": width, "depth_downsample": depth, "depth_upsample": 6, "num_heads": heads}
        return found | {"input_size": 32, "patch_size": 4, "time_emb": "mlp", "num_condition_tokens": 16}

    toy = size(32, 2, 4) | {"depth_upsample": 2, "input_size": 16, "num_condition_tokens": 3, "num_classes": 10}
    sizes = {"MPDiT-B/4x": size(768, 6, 12), "MPDiT-L/4x": size(1024, 18, 16), "MPDiT-XL/4x": size(1152, 22, 16)}
    return Model("MPDiT", "models.mpdit", "MPDiT", toy, sizes, 16, 32, 1, "noise - image", MULTI_PATCH)


MODELS = {
    "repa": repa(),
    "lightningdit": lightning_dit(False),
    "lightningdit_qk": lightning_dit(True),
    "jit": jit(),
    "pixeldit_pre": pixel_dit(False),
    "pixeldit_post": pixel_dit(True),
    "deco": nerf("DeCo", "src.models.transformer.dit_c2i_DeCo", 32, (22, 25), (28, 31)),
    "pixnerd": nerf("PixNerd", "src.models.transformer.pixnerd_c2i", 64, (22, 24), (26, 30)),
    "ddt": ddt(),
    "rae": rae(),
    "raev2": rae_v2(False),
    "raev2_ig": rae_v2(True),
    "mpdit": mpdit(),
}
