"""The models of `models.py`: every family of torchvision, 40 of timm, 15 transformers, small, without downloads.

A `Case` builds a model in training mode and its inputs. Packages are imported when a case is built.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

CLASSES = 10
Built = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
"""Model, positional and named arguments."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One model. ``package``: what has to be installed. ``group``: its heading in the table."""

    name: str
    package: str
    group: str
    build: Callable[[], Built]

    @property
    def installed(self) -> bool:
        return importlib.util.find_spec(self.package) is not None


def images(size: int, batch: int = 4, frames: int = 0) -> Tensor:
    return torch.randn(batch, 3, *([frames] if frames else []), size, size)


# torchvision ------------------------------------------------------------------------------------------------------

CLASSIFIERS: dict[str, tuple[int, dict[str, Any]]] = {
    "alexnet": (64, {}),
    "efficientnet_b0": (32, {}),
    "efficientnet_v2_s": (32, {}),
    "googlenet": (64, {"init_weights": False}),
    "inception_v3": (128, {"init_weights": False, "aux_logits": False}),
    "mnasnet0_5": (32, {}),
    "mobilenet_v2": (32, {}),
    "mobilenet_v3_large": (32, {}),
    "mobilenet_v3_small": (32, {}),
    "regnet_x_400mf": (32, {}),
    "regnet_y_400mf": (32, {}),
    "resnet18": (32, {}),
    "shufflenet_v2_x0_5": (32, {}),
    "squeezenet1_0": (64, {}),
    "vgg11": (32, {}),
    "vgg16_bn": (32, {}),
}
SEGMENTERS = ("deeplabv3_mobilenet_v3_large", "deeplabv3_resnet50", "fcn_resnet50", "lraspp_mobilenet_v3_large")
DETECTORS = (
    "fasterrcnn_mobilenet_v3_large_320_fpn",
    "fasterrcnn_resnet50_fpn",
    "fasterrcnn_resnet50_fpn_v2",
    "fcos_resnet50_fpn",
    "keypointrcnn_resnet50_fpn",
    "maskrcnn_resnet50_fpn",
    "retinanet_resnet50_fpn",
    "retinanet_resnet50_fpn_v2",
    "ssd300_vgg16",
    "ssdlite320_mobilenet_v3_large",
)
VIDEO: dict[str, tuple[int, int]] = {
    "mc3_18": (32, 4),
    "mvit_v1_b": (224, 16),
    "mvit_v2_s": (224, 16),
    "r2plus1d_18": (32, 4),
    "r3d_18": (32, 4),
    "s3d": (224, 16),
    "swin3d_t": (32, 4),
}


def _torchvision(name: str, inputs: Callable[[], tuple[Any, ...]], **options: Any) -> Built:
    from torchvision import models

    options = {"weights": None, "num_classes": CLASSES, **options}
    return models.get_model(name, **options), inputs(), {}


def _shallow(name: str) -> Built:
    """A family with few blocks, which its class can build."""
    from torchvision import models
    from torchvision.models import convnext, maxvit, resnet, swin_transformer

    few: dict[str, Any] = {"num_classes": CLASSES}
    blocks = [convnext.CNBlockConfig(width, wider, 1) for width, wider in ((64, 96), (96, 128), (128, None))]
    swin = {"patch_size": [4, 4], "embed_dim": 48, "depths": [1, 2, 1], "num_heads": [2, 4, 8], "window_size": [2, 2]}
    squares = {"input_size": (64, 64), "partition_size": 2, "stem_channels": 32, "head_dim": 32}
    making: dict[str, Callable[[], nn.Module]] = {
        "vit": lambda: models.VisionTransformer(32, 8, num_layers=2, num_heads=4, hidden_dim=64, mlp_dim=128, **few),
        "convnext": lambda: models.ConvNeXt(blocks, **few),
        "densenet": lambda: models.DenseNet(32, (2, 2), 64, **few),
        "resnet_bottleneck": lambda: models.ResNet(resnet.Bottleneck, [1, 2, 1, 1], **few),
        "resnext": lambda: models.ResNet(resnet.Bottleneck, [1, 1, 1, 1], groups=32, width_per_group=4, **few),
        "wide_resnet": lambda: models.ResNet(resnet.Bottleneck, [1, 1, 1, 1], width_per_group=128, **few),
        "swin": lambda: models.SwinTransformer(**swin, **few),
        "swin_v2": lambda: models.SwinTransformer(
            **swin,
            block=swin_transformer.SwinTransformerBlockV2,
            downsample_layer=swin_transformer.PatchMergingV2,
            **few,
        ),
        "maxvit": lambda: maxvit.MaxVit(
            **squares, block_channels=[32, 64], block_layers=[1, 1], stochastic_depth_prob=0.0, **few
        ),
    }
    return making[name](), (images(64 if name == "maxvit" else 32),), {}


SHALLOW = ("vit", "convnext", "densenet", "resnet_bottleneck", "resnext", "wide_resnet", "swin", "swin_v2", "maxvit")


def _detection(name: str, size: int = 96) -> tuple[Any, ...]:
    """Images and targets: one box of each image, with a mask and key points for those that want them."""
    boxes = torch.tensor([[8.0, 8.0, 56.0, 64.0]])
    points = torch.tensor([[20.0, 20.0, 1.0]]).expand(1, 17, 3)
    masks = torch.zeros(1, size, size, dtype=torch.uint8)
    masks[:, 8:64, 8:56] = 1
    target = {"boxes": boxes, "labels": torch.tensor([1])}
    target |= {"masks": masks} if name.startswith("maskrcnn") else {}
    target |= {"keypoints": points} if name.startswith("keypointrcnn") else {}
    return list(images(size, 2)), [dict(target) for _ in range(2)]


def _detector(name: str) -> Built:
    scale = {} if name.startswith("ssd") else {"min_size": 96, "max_size": 96}
    classes = {"num_classes": 2} if name.startswith("keypointrcnn") else {}
    return _torchvision(name, lambda: _detection(name), weights_backbone=None, **scale, **classes)


def _raft() -> Built:
    from torchvision import models

    return models.get_model("raft_small", weights=None), (images(128, 1), images(128, 1)), {"num_flow_updates": 2}


def torchvision_cases() -> list[Case]:
    def case(name: str, group: str, build: Callable[[], Built]) -> Case:
        return Case(f"torchvision/{name}", "torchvision", f"torchvision, {group}", build)

    found = [case(name, "classification", functools.partial(_shallow, name)) for name in SHALLOW]
    for name, (size, options) in CLASSIFIERS.items():
        build = functools.partial(_torchvision, name, functools.partial(lambda s: (images(s),), size), **options)
        found.append(case(name, "classification", build))
    for name in SEGMENTERS:
        build = functools.partial(_torchvision, name, lambda: (images(64),), weights_backbone=None)
        found.append(case(name, "segmentation", build))
    for name in DETECTORS:
        found.append(case(name, "detection", functools.partial(_detector, name)))
    for name, (size, frames) in VIDEO.items():
        clip = functools.partial(lambda s, f: (images(s, 2 if s < 224 else 1, f),), size, frames)
        found.append(case(name, "video", functools.partial(_torchvision, name, clip)))
    return [*found, case("raft_small", "optical flow", _raft)]


# timm -------------------------------------------------------------------------------------------------------------

TIMM: dict[str, tuple[int, dict[str, Any]]] = {
    "beit_base_patch16_224": (32, {"img_size": 32, "embed_dim": 64, "depth": 2, "num_heads": 4}),
    "eca_halonext26ts": (256, {}),
    "mobileone_s0": (32, {}),
    "cait_xxs24_224": (32, {"img_size": 32, "depth": 2}),
    "coat_lite_tiny": (64, {"img_size": 64}),
    "convit_tiny": (32, {"img_size": 32, "depth": 3, "local_up_to_layer": 2}),
    "convmixer_768_32": (32, {}),
    "test_convnext": (32, {}),
    "crossvit_9_240": (240, {}),
    "cs3darknet_focus_s": (64, {}),
    "davit_tiny": (64, {"depths": (1, 1, 1, 1)}),
    "densenet121": (32, {"block_config": (2, 2, 2, 2)}),
    "dla46_c": (64, {}),
    "dpn48b": (32, {}),
    "edgenext_xx_small": (64, {}),
    "efficientformer_l1": (224, {"depths": (1, 1, 2, 2)}),
    "efficientformerv2_s0": (224, {}),
    "efficientnet_b0": (32, {}),
    "efficientvit_b0": (64, {}),
    "efficientvit_m0": (224, {}),
    "eva02_tiny_patch14_224": (28, {"img_size": 28, "depth": 2}),
    "fasternet_t0": (64, {}),
    "fastvit_t8": (64, {}),
    "focalnet_tiny_srf": (64, {}),
    "gcvit_xxtiny": (224, {}),
    "ghostnet_050": (32, {}),
    "hgnet_tiny": (64, {}),
    "hiera_tiny_224": (64, {"img_size": (64, 64), "stages": (1, 1, 1, 1)}),
    "inception_next_atto": (64, {}),
    "levit_128s": (224, {}),
    "test_mambaout": (64, {}),
    "coatnet_pico_rw_224": (224, {}),
    "poolformer_s12": (64, {}),
    "resmlp_12_224": (32, {"img_size": 32}),
    "lcnet_050": (32, {}),
    "mobilevit_xxs": (64, {}),
    "mobilevitv2_050": (64, {}),
    "mvitv2_tiny": (64, {"img_size": 64}),
    "nest_tiny": (64, {"img_size": 64}),
    "nf_resnet26": (32, {}),
    "pit_ti_224": (64, {"img_size": 64}),
    "pvt_v2_b0": (64, {}),
    "regnety_002": (32, {}),
    "repvit_m0_9": (64, {}),
    "res2net50_14w_8s": (32, {}),
    "resnest14d": (32, {}),
    "resnetv2_18": (32, {}),
    "rexnet_100": (32, {}),
    "selecsls42": (64, {}),
    "legacy_seresnet18": (64, {}),
    "skresnet18": (32, {}),
    "starnet_s050": (64, {}),
    "swinv2_tiny_window8_256": (64, {"img_size": 64, "window_size": 2, "depths": (1, 1, 1, 1)}),
    "tiny_vit_5m_224": (224, {}),
    "twins_pcpvt_small": (64, {"img_size": 64, "depths": (1, 1, 1, 1)}),
    "visformer_tiny": (224, {"depth": (2, 2, 2)}),
    "test_vit": (32, {"img_size": 32}),
    "test_vit_relpos": (32, {"img_size": 32}),
    "ese_vovnet19b_dw": (64, {}),
    "xcit_nano_12_p16_224": (64, {"img_size": 64, "depth": 3}),
}


def _timm(name: str, size: int, options: dict[str, Any]) -> Built:
    import timm

    return timm.create_model(name, pretrained=False, num_classes=CLASSES, **options), (images(size),), {}


def timm_cases() -> list[Case]:
    return [
        Case(f"timm/{name}", "timm", "timm", functools.partial(_timm, name, size, options))
        for name, (size, options) in TIMM.items()
    ]


# transformers -----------------------------------------------------------------------------------------------------

TEXT = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
GROUPED = {**TEXT, "num_key_value_heads": 2}
EMBEDDED = {**TEXT, "embedding_size": 64}
DISTILLED = {"dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 4}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
MAMBA = {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 8}
OPT = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 128, "word_embed_proj_dim": 64}
T5 = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
SIDES = {"layers": 2, "attention_heads": 4, "ffn_dim": 128}
BART = {f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in SIDES.items()}
SWIN = {"image_size": 32, "patch_size": 2, "window_size": 2, "embed_dim": 32}
SEGFORMER = {"hidden_sizes": [32, 64, 64, 64], "depths": [1, 1, 1, 1], "decoder_hidden_size": 64}
VOCABULARY, LENGTH = 100, 16
TEXTS: dict[str, tuple[str, dict[str, Any]]] = {
    "BertForSequenceClassification": ("BertConfig", TEXT),
    "RobertaForMaskedLM": ("RobertaConfig", TEXT),
    "DistilBertForSequenceClassification": ("DistilBertConfig", DISTILLED),
    "AlbertForSequenceClassification": ("AlbertConfig", EMBEDDED),
    "ElectraForSequenceClassification": ("ElectraConfig", EMBEDDED),
    "DebertaV2ForSequenceClassification": ("DebertaV2Config", TEXT),
    "GPT2LMHeadModel": ("GPT2Config", GPT2),
    "GPTNeoXForCausalLM": ("GPTNeoXConfig", TEXT),
    "LlamaForCausalLM": ("LlamaConfig", GROUPED),
    "Qwen2ForCausalLM": ("Qwen2Config", GROUPED),
    "MixtralForCausalLM": ("MixtralConfig", {**GROUPED, "num_local_experts": 4}),
    "MambaForCausalLM": ("MambaConfig", MAMBA),
    "OPTForCausalLM": ("OPTConfig", OPT),
    "T5ForConditionalGeneration": ("T5Config", T5),
    "BartForConditionalGeneration": ("BartConfig", {"d_model": 64, **BART}),
}
PICTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "ViTForImageClassification": ("ViTConfig", {**TEXT, "image_size": 32, "patch_size": 8}),
    "SwinForImageClassification": ("SwinConfig", {**SWIN, "depths": [1, 1, 1], "num_heads": [2, 4, 8]}),
    "SegformerForSemanticSegmentation": ("SegformerConfig", SEGFORMER),
}


def quiet(options: dict[str, Any], config: type) -> Any:
    """A configuration without dropout and caches: its two runs with the same seed compute the same."""
    made = config(**options)
    for name, given in made.to_dict().items():
        if isinstance(given, float) and "drop" in name:
            setattr(made, name, 0.0)
    made.use_cache = False
    return made


def _transformer(name: str, configuration: str, options: dict[str, Any], picture: bool) -> Built:
    # It imports a package named kernels if there is one, and would find the folder of that name in a checkout.
    sys.path[:] = [path for path in sys.path if not Path(path, "kernels", "packing.py").exists()]
    import transformers

    sizes = {"num_labels": CLASSES} if picture else {"vocab_size": VOCABULARY, "max_position_embeddings": 64}
    config = quiet({**sizes, **options}, getattr(transformers, configuration))
    config.pad_token_id = 0
    model = getattr(transformers, name)(config)
    if picture:
        return model, (), {"pixel_values": images(64 if "Seg" in name else 32)}
    tokens = torch.randint(3, VOCABULARY, (4, LENGTH))
    named = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if name.startswith(("T5", "Bart")):
        named["decoder_input_ids"] = torch.randint(3, VOCABULARY, (4, LENGTH))
    return model, (), named


def transformer_cases() -> list[Case]:
    return [
        Case(
            f"transformers/{name}",
            "transformers",
            "transformers",
            functools.partial(_transformer, name, config, options, cases is PICTURES),
        )
        for cases in (TEXTS, PICTURES)
        for name, (config, options) in cases.items()
    ]


def all_cases() -> list[Case]:
    return [*torchvision_cases(), *timm_cases(), *transformer_cases()]


# For all ----------------------------------------------------------------------------------------------------------

DROPPED = ("dropout", "attention_dropout", "drop_prob", "stochastic_depth_prob", "activation_dropout", "attn_drop")


def built(case: Case) -> Built:
    """The model as it is compared: in training mode, nothing dropped, no value exactly on a corner."""
    torch.manual_seed(0)
    model, args, kwargs = case.build()
    settle(model)
    return model.train(), args, kwargs


def settle(model: nn.Module) -> None:
    """Switch off what drops at random, and move parameters off the values where all are alike.

    A zero-initialized residual scale has no gradient behind it; a normalized output of exactly 0 sits on the corner of
    ReLU, where the last bit of a float decides.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) or type(module).__name__ == "StochasticDepth":
            module.p = 0.0
        for name in DROPPED:
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all()):
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
