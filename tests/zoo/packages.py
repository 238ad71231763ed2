"""Architectures of transformers, torchvision and timm, which are imported when a model is made."""

from __future__ import annotations

import types
from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tests.zoo.setting import N, Setting, call, classifier, labels, named

SCHEMAS: list[torch.library.Library] = []  # they last as long as the object


@cache
def torchvision_models() -> types.ModuleType:
    """The package, also where its compiled part does not load.

    A torchvision built for another torch (say, for a device, beside a torch for CPUs) cannot register
    its detection operators, and its import fails for want of their schemas. No classifier calls them.
    """
    try:
        import torchvision.models
    except RuntimeError:
        SCHEMAS.append(torch.library.Library("torchvision", "FRAGMENT"))
        for name in ("nms", "qnms"):
            SCHEMAS[0].define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision.models
    return torchvision.models


def _images(size: int, channels: int = 3) -> Tensor:
    return torch.randn(N, channels, size, size)


class InDouble(TorchFunctionMode):
    """Casts to single precision, which some models contain, are to double precision."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        args = [torch.float64 if a is torch.float32 else a for a in args]
        kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return func(*args, **kwargs)


def in_double(call: Callable[..., Any]) -> Callable[..., Any]:
    """A way to call a model, in double precision throughout."""

    def run(model: nn.Module, *inputs: Any) -> Any:
        with InDouble():
            return call(model, *inputs)

    return run


WORDS, LENGTH = 7, 4


def _own_loss(kind: str, config: str, *names: str, shift: bool = False, **options: Any) -> Setting:
    """A model of transformers, which computes its loss from ``labels=``."""
    torchvision_models()  # transformers imports it where it is installed
    import transformers

    made = getattr(transformers, config)(**options)
    model = getattr(transformers, kind)(made).eval()
    values = []
    for name in names:
        if name == "pixel_values":
            values.append(_images(options.get("image_size", 16)))
        elif name == "attention_mask":
            values.append((torch.arange(LENGTH) < torch.tensor([4, 2, 3]).unsqueeze(1)).long())
        else:
            values.append(torch.randint(WORDS, (N, LENGTH)))
    classes = options.get("num_labels")
    target = torch.randint(WORDS, (N, LENGTH)) if classes is None else labels(classes)

    def criterion(f: Tensor) -> Tensor:
        if shift:
            return F.cross_entropy(f[:, :-1].mT, target[:, 1:])
        return F.cross_entropy(f if classes else f.mT, target)

    return Setting(
        model,
        (*values, target),
        criterion,
        in_double(named(*names, "labels")),
        lambda out: out.logits,
        lambda out: out.loss,
        alone=True,
    )


def _words(kind: str, name: str, *inputs: str, **options: Any) -> Callable[[], Setting]:
    options = {"vocab_size": WORDS, **options}
    return lambda: _own_loss(name + kind, f"{name}Config", *(inputs or ("input_ids",)), **options)


def _pixels(name: str, **options: Any) -> Callable[[], Setting]:
    options = {"num_labels": 3, **options}
    return lambda: _own_loss(
        f"{name}ForImageClassification", f"{name}Config", "pixel_values", **options
    )


_SMALL = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_GPT2 = {
    "n_embd": 8,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 8,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_BERT = dict(**_SMALL, **_NO_DROPOUT, max_position_embeddings=8)
_CLASSES = "ForSequenceClassification"

TRANSFORMERS: dict[str, Callable[[], Setting]] = {
    "GPT-2": _words("LMHeadModel", "GPT2", shift=True, **_GPT2),
    "GPT-2, classifier": _words(_CLASSES, "GPT2", num_labels=3, pad_token_id=0, **_GPT2),
    "BERT": _words(_CLASSES, "Bert", "input_ids", "attention_mask", num_labels=3, **_BERT),
    "BERT, masked words": _words("ForMaskedLM", "Bert", "input_ids", "attention_mask", **_BERT),
    "DistilBERT": _words(
        *(_CLASSES, "DistilBert"),
        dim=8, n_layers=2, n_heads=2, hidden_dim=12, num_labels=3, dropout=0.0,
        attention_dropout=0.0, seq_classif_dropout=0.0, max_position_embeddings=8,
    ),
    "RoBERTa": _words(_CLASSES, "Roberta", num_labels=3, pad_token_id=0, **_BERT),
    "LLaMA": _words("ForCausalLM", "Llama", shift=True, **_SMALL),
    "LLaMA, grouped queries": _words(
        *("ForCausalLM", "Llama"), shift=True, num_key_value_heads=1, tie_word_embeddings=True, **_SMALL
    ),
    "OPT": _words(
        *("ForCausalLM", "OPT"), shift=True, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
        ffn_dim=12, word_embed_proj_dim=8, max_position_embeddings=8, dropout=0.0,
    ),
    "Mixtral": _words(
        *("ForCausalLM", "Mixtral"), shift=True, num_key_value_heads=2, num_local_experts=3,
        num_experts_per_tok=2, experts_implementation="eager", **{**_SMALL, "num_hidden_layers": 1},
    ),
    "ALBERT": _words(_CLASSES, "Albert", num_labels=3, embedding_size=6, **_BERT),
    "ELECTRA": _words(_CLASSES, "Electra", num_labels=3, embedding_size=6, **_BERT),
    "DeBERTa v2": _words(
        *(_CLASSES, "DebertaV2"), num_labels=3, relative_attention=True, max_relative_positions=4,
        pos_att_type=["p2c", "c2p"], position_buckets=4, pooler_hidden_size=8, pooler_dropout=0.0,
        **_BERT,
    ),
    "BigBird": _words(
        _CLASSES, "BigBird", num_labels=3, attention_type="original_full", pad_token_id=0, **_BERT
    ),
    "FNet": _words(
        *(_CLASSES, "FNet"), num_labels=3, hidden_size=8, num_hidden_layers=2, intermediate_size=12,
        hidden_dropout_prob=0.0, max_position_embeddings=8,
    ),
    "XLNet": _words(
        *(_CLASSES, "XLNet"), num_labels=3, d_model=8, n_layer=2, n_head=2, d_inner=12, dropout=0.0,
        summary_last_dropout=0.0,
    ),
    "Funnel": _words(
        *(_CLASSES, "Funnel"), num_labels=3, block_sizes=[1, 1], d_model=8, n_head=2, d_head=4,
        d_inner=12, hidden_dropout=0.0, attention_dropout=0.0, activation_dropout=0.0,
    ),
    "GPT-NeoX": _words("ForCausalLM", "GPTNeoX", shift=True, max_position_embeddings=8, **_SMALL),
    "Gemma 2": _words(
        "ForCausalLM", "Gemma2", shift=True, num_key_value_heads=1, head_dim=4, pad_token_id=0, **_SMALL
    ),
    "Phi": _words("ForCausalLM", "Phi", shift=True, resid_pdrop=0.0, embd_pdrop=0.0, **_SMALL),
    "BLOOM": _words(
        *("ForCausalLM", "Bloom"), shift=True, hidden_size=8, n_layer=2, n_head=2, hidden_dropout=0.0,
        attention_dropout=0.0,
    ),
    "Falcon": _words(
        "ForCausalLM", "Falcon", shift=True, hidden_size=8, num_hidden_layers=2, num_attention_heads=2
    ),
    "Mamba": _words(
        *("ForCausalLM", "Mamba"), shift=True, hidden_size=8, state_size=3, num_hidden_layers=2,
        conv_kernel=3,
    ),
    "Qwen2, experts": _words(
        *("ForCausalLM", "Qwen2Moe"), shift=True, num_key_value_heads=2, moe_intermediate_size=6,
        shared_expert_intermediate_size=6, num_experts=4, num_experts_per_tok=2,
        experts_implementation="eager", **_SMALL,
    ),
    "BART": _words(
        *("ForConditionalGeneration", "Bart"), d_model=8, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=12, decoder_ffn_dim=12,
        max_position_embeddings=8, dropout=0.0, pad_token_id=0, bos_token_id=0, eos_token_id=1,
        decoder_start_token_id=1, forced_eos_token_id=1,
    ),
    "T5": _words(
        *("ForConditionalGeneration", "T5"), d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2,
        dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0,
    ),
    "ViT": _pixels("ViT", image_size=8, patch_size=4, **_SMALL, **_NO_DROPOUT),
    "Swin": _pixels(
        "Swin", embed_dim=4, depths=[2, 2], num_heads=[2, 2], image_size=8, patch_size=1, window_size=4,
        drop_path_rate=0.0, hidden_dropout_prob=0.0,
    ),
    "BEiT": _pixels("Beit", image_size=8, patch_size=4, drop_path_rate=0.0, **_SMALL, **_NO_DROPOUT),
    "DINOv2": _pixels(
        "Dinov2", image_size=8, patch_size=4, drop_path_rate=0.0, **_SMALL, **_NO_DROPOUT
    ),
    "SegFormer": _pixels(
        "Segformer", num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[4, 8],
        patch_sizes=[3, 3], strides=[2, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2],
        drop_path_rate=0.0, classifier_dropout_prob=0.0, **_NO_DROPOUT,
    ),
    "ConvNeXt": _pixels("ConvNext", hidden_sizes=[4, 8], depths=[1, 1], num_stages=2, patch_size=2),
    "ResNet": _pixels(
        "ResNet", embedding_size=4, hidden_sizes=[6, 8], depths=[1, 1], layer_type="basic"
    ),
}  # fmt: skip


def _vision(make: Callable[[Any], nn.Module], size: int = 32) -> Callable[[], Setting]:
    def setting() -> Setting:
        images = _images(size)
        return classifier(_awake(make(torchvision_models()), images), images)

    return setting


def _awake(model: nn.Module, images: Tensor) -> nn.Module:
    """In evaluation mode, with parameters and statistics for which outputs differ between samples.

    Initial ones hide errors: what is scaled by zeros, or by statistics of other data, has no effect.
    """
    for p in model.parameters():
        fan = p[0].numel() if p.dim() > 1 else 1
        if p.dim() > 1 and p.detach().std() < 0.3 / fan**0.5:
            nn.init.normal_(p, 0.0, fan**-0.5)
        elif p.detach().abs().max() < 1e-3:
            nn.init.normal_(p, 0.2, 0.2)
    model.eval()
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for module in norms:
        nn.init.normal_(module.weight, 0.7, 0.5)
        module.train()
        module.momentum = 1.0
    if norms:
        with torch.no_grad():
            model.double()(images)
    return model.eval()


def _bottlenecks(models: Any, **options: Any) -> nn.Module:
    return models.ResNet(models.resnet.Bottleneck, [1, 1, 1, 1], num_classes=3, **options)


def _basic_blocks(models: Any) -> nn.Module:
    model = models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=3)
    model.layer3 = model.layer4 = nn.Identity()
    model.fc = nn.Linear(128, 3)
    return model


def _vgg(models: Any, batch_norm: bool) -> nn.Module:
    layers = models.vgg.make_layers([4, "M", 6, 6, "M"], batch_norm)
    with torch.device("meta"):  # its own head is large, and is replaced
        model = models.VGG(nn.Identity(), 3, init_weights=False)
    model.features, model.avgpool = layers, nn.AdaptiveAvgPool2d(2)
    model.classifier = nn.Sequential(nn.Linear(24, 5), nn.ReLU(True), nn.Dropout(), nn.Linear(5, 3))
    return model


def _thin(kind: Any, by: int) -> type[nn.Module]:
    """A convolution block with fewer channels."""

    class Thin(kind):
        def __init__(self, inputs: int, outputs: int, **options: Any) -> None:
            super().__init__(inputs if inputs == 3 else inputs // by, outputs // by, **options)

    return Thin


def _inception(models: Any) -> nn.Module:
    kind = models.inception
    block = _thin(kind.BasicConv2d, 16)
    names = ("InceptionA", "InceptionB", "InceptionC", "InceptionD", "InceptionE", "InceptionAux")
    blocks = [block, *(partial(getattr(kind, name), conv_block=block) for name in names)]
    model = models.Inception3(3, inception_blocks=blocks, init_weights=False)
    model.AuxLogits.fc, model.fc = nn.Linear(48, 3), nn.Linear(128, 3)
    return model


def _googlenet(models: Any) -> nn.Module:
    kind = import_module("torchvision.models.googlenet")  # its name is also that of a function
    block = _thin(kind.BasicConv2d, 8)
    blocks = [
        block,
        partial(kind.Inception, conv_block=block),
        partial(kind.InceptionAux, conv_block=block),
    ]
    model = models.GoogLeNet(3, True, init_weights=False, blocks=blocks)
    model.fc = nn.Linear(128, 3)
    for head in (model.aux1, model.aux2):
        head.fc1, head.fc2 = nn.Linear(256, 8), nn.Linear(8, 3)
    return model


def _heads(make: Callable[[Any], nn.Module], size: int) -> Callable[[], Setting]:
    """A classifier with auxiliary heads, whose losses are added with less weight."""

    def setting() -> Setting:
        images, target = _images(size), labels()
        model = _awake(make(torchvision_models()), images)
        model.training = True  # this module only: auxiliary heads are used

        def loss(output: Any) -> Tensor:
            first, *others = output
            return F.cross_entropy(first, target) + sum(
                0.3 * F.cross_entropy(f, target) for f in others
            )

        return Setting(
            model,
            (images,),
            lambda f: loss(f.split(3, 1)),
            outputs=lambda output: torch.cat(tuple(output), 1),
            loss=loss,
        )

    return setting


def _squeezenet(models: Any) -> nn.Module:
    model = models.SqueezeNet("1_1", 3)
    for module in model.features[8:]:
        if isinstance(module, models.squeezenet.Fire):
            module.requires_grad_(False)  # large
    return model


def _mobilenet_v3(models: Any) -> nn.Module:
    blocks, last = models.mobilenetv3._mobilenet_v3_conf("mobilenet_v3_small", width_mult=0.2)
    return models.MobileNetV3(blocks, last, num_classes=3)


def _efficientnet(models: Any, version: str) -> nn.Module:
    if version == "b0":
        blocks, last = models.efficientnet._efficientnet_conf(
            "efficientnet_b0", width_mult=0.1, depth_mult=0.1
        )
    else:
        fused, plain = models.efficientnet.FusedMBConvConfig, models.efficientnet.MBConvConfig
        blocks, last = [fused(1, 3, 1, 4, 4, 1), fused(2, 3, 2, 4, 8, 1), plain(2, 3, 2, 8, 8, 2)], 16
    return models.EfficientNet(blocks, 0.0, 0.0, num_classes=3, last_channel=last)


def _regnet(models: Any, se: float | None) -> nn.Module:
    blocks = models.regnet.BlockParams.from_init_params(
        depth=4, w_0=8, w_a=8.0, w_m=2.0, group_width=8, se_ratio=se
    )
    return models.RegNet(blocks, num_classes=3, stem_width=8)


def _convnext(models: Any) -> nn.Module:
    block = models.convnext.CNBlockConfig
    return models.ConvNeXt([block(4, 8, 1), block(8, None, 1)], num_classes=3)


def _swin(models: Any, second: bool) -> nn.Module:
    kind = models.swin_transformer
    options = (
        {"block": kind.SwinTransformerBlockV2, "downsample_layer": kind.PatchMergingV2}
        if second
        else {}
    )
    return models.SwinTransformer(
        *([2, 2], 4, [2, 2], [2, 2], [2, 2]), stochastic_depth_prob=0.0, num_classes=3, **options
    )


def _maxvit(models: Any) -> nn.Module:
    return models.MaxVit((16, 16), 4, 2, [4, 4], [1, 1], 2, 0.0, num_classes=3)


def _mnasnet(models: Any) -> nn.Module:
    model = models.MNASNet(0.1, num_classes=3, dropout=0.0)
    nn.init.normal_(model.classifier[1].weight, 0.0, 0.01)  # else probabilities are zeros and ones
    return model


TORCHVISION: dict[str, Callable[[], Setting]] = {
    "ResNet, basic blocks": _vision(_basic_blocks, 16),
    "ResNet": _vision(partial(_bottlenecks, width_per_group=4)),
    "ResNeXt": _vision(partial(_bottlenecks, groups=2, width_per_group=4)),
    "Wide ResNet": _vision(partial(_bottlenecks, width_per_group=8)),
    "VGG": _vision(partial(_vgg, batch_norm=False), 8),
    "VGG, batch norm": _vision(partial(_vgg, batch_norm=True), 8),
    "DenseNet": _vision(lambda models: models.DenseNet(4, (2, 2), 4, 2, num_classes=3)),
    "MobileNet v2": _vision(lambda models: models.MobileNetV2(3, 0.1)),
    "MobileNet v3": _vision(_mobilenet_v3),
    "EfficientNet": _vision(partial(_efficientnet, version="b0")),
    "EfficientNet v2": _vision(partial(_efficientnet, version="v2")),
    "RegNet X": _vision(partial(_regnet, se=None)),
    "RegNet Y": _vision(partial(_regnet, se=0.25)),
    "ConvNeXt": _vision(_convnext, 16),
    "ViT": _vision(lambda models: models.VisionTransformer(8, 4, 2, 2, 8, 12, num_classes=3), 8),
    "Swin": _vision(partial(_swin, second=False), 8),
    "Swin v2": _vision(partial(_swin, second=True), 8),
    "MaxViT": _vision(_maxvit, 16),
    "ShuffleNet v2": _vision(lambda models: models.ShuffleNetV2([1, 1, 1], [8, 8, 16, 16, 16], 3)),
    "SqueezeNet": _vision(_squeezenet),
    "Inception v3": _vision(_inception, 75),
    "Inception v3, two heads": _heads(_inception, 299),
    "GoogLeNet, three heads": _heads(_googlenet, 32),
    "MNASNet": _vision(_mnasnet),
}


def _timm(name: str, size: int, **options: Any) -> Callable[[], Setting]:
    """A model by its name, or by the module and class it is made from."""

    def setting() -> Setting:
        torchvision_models()  # timm imports it
        import timm

        if "." in name:
            module, kind = name.split(".")
            make = getattr(import_module(f"timm.models.{module}"), kind)
        else:
            make = partial(timm.create_model, name)
        images = _images(size)
        model = _awake(make(num_classes=3, **options), images)
        return classifier(model, images, call=in_double(call))

    return setting


_PATCHES = {"img_size": 8, "patch_size": 4, "embed_dim": 8}
_VIT = dict(**_PATCHES, depth=2, num_heads=2)

TIMM: dict[str, Callable[[], Setting]] = {
    "ViT": _timm("vit_tiny_patch16_224", 8, **_VIT),
    "ViT, averaged, with registers": _timm(
        *("vit_tiny_patch16_224", 8), **_VIT, class_token=False, global_pool="avg", reg_tokens=2,
        init_values=0.5,
    ),
    "DeiT, distilled": _timm("deit_tiny_distilled_patch16_224", 8, **_VIT),
    "BEiT": _timm("beit_base_patch16_224", 8, **_VIT),
    "EVA-02": _timm("eva02_tiny_patch14_224", 8, **_VIT),
    "CaiT": _timm("cait_xxs24_224", 8, **_VIT),
    "XCiT": _timm("xcit_nano_12_p16_224", 16, **{**_VIT, "img_size": 16, "patch_size": 8}),
    "MLP-Mixer": _timm("mlp_mixer.MlpMixer", 8, **_PATCHES, num_blocks=2),
    "PiT": _timm(
        *("pit_ti_224", 16), img_size=16, patch_size=4, stride=4, base_dims=[4, 4], depth=[1, 1],
        heads=[2, 2],
    ),
    "LeViT": _timm(
        "levit_128s", 32, img_size=32, embed_dim=[16, 16], key_dim=4, depth=[1, 1], num_heads=[2, 2]
    ),
    "PVT v2": _timm(
        "pvt_v2_b0", 32, depths=[1, 1, 1, 1], embed_dims=[4, 4, 4, 8], num_heads=[1, 1, 2, 2]
    ),
    "ConvNeXt v2": _timm("convnextv2_atto", 32, depths=[1, 1, 1, 1], dims=[4, 4, 6, 8]),
    "EdgeNeXt": _timm(
        "edgenext_xx_small", 32, depths=[1, 1, 2, 1], dims=[4, 8, 8, 8], heads=[2, 2, 2, 2]
    ),
    "PoolFormer": _timm("metaformer.MetaFormer", 32, depths=[1, 1, 1, 1], dims=[4, 4, 4, 8]),
    "ResNet": _timm("resnet10t", 32, channels=[4, 4, 8, 8], stem_width=4),
    "EfficientViT": _timm(
        *("efficientvit_b0", 32), widths=[4, 4, 8, 8, 8], depths=[1, 1, 1, 1, 1], head_dim=4,
        head_widths=(8, 8),
    ),
    "MobileViT": _timm("mobilevit_xxs", 32),
    "GhostNet": _timm(
        *("ghostnet.GhostNet", 32), width=0.5, drop_rate=0.0,
        cfgs=[[[3, 16, 16, 0, 1]], [[3, 48, 24, 0.25, 2]], [[3, 48, 24, 0, 1]]],
    ),
}  # fmt: skip
