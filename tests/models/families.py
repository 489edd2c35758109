"""Small networks of the families that fine-tuning methods support, from configurations."""

import json

import timm
import torch
import torchvision
import transformers

from fastadv.models.networks import ResNet

SHAPE = (3, 32, 32)
CLASSES = 3


def logits(out):
    """The logits in what a network of any library returns."""
    return getattr(out, "logits", out)


def hf(kind, **options):
    config = transformers.AutoConfig.for_model(kind, **options)
    config.num_labels = CLASSES
    return transformers.AutoModelForImageClassification.from_config(config)


VIT = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
VIT |= {"image_size": 32, "patch_size": 8}
TIMM = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 2, "num_classes": CLASSES}
PLAIN = {
    "timm vit": lambda: timm.create_model("vit_tiny_patch16_224", **TIMM),
    "timm deit": lambda: timm.create_model("deit_tiny_distilled_patch16_224", **TIMM),
    "timm siglip": lambda: timm.create_model("vit_base_patch16_siglip_gap_224", **TIMM),
    "timm dinov2": lambda: timm.create_model("vit_small_patch14_reg4_dinov2", **TIMM),
    "hf vit": lambda: hf("vit", **VIT),
    "hf clip": lambda: hf("clip", vision_config=VIT),
    "hf siglip": lambda: hf("siglip", vision_config=VIT),
    "hf dinov2": lambda: hf("dinov2", **VIT),
}
PREFIX = {"timm deit": 2, "timm siglip": 0, "timm dinov2": 5, "hf siglip": 0}  # tokens before the patches; else 1
OTHERS = {
    "timm swin": lambda: timm.create_model(
        "swin_tiny_patch4_window7_224",
        **{
            "img_size": 32,
            "window_size": 4,
            "embed_dim": 12,
            "depths": (2,),
            "num_heads": (2,),
            "num_classes": CLASSES,
        },
    ),
    "timm convnext": lambda: timm.create_model(
        "convnext_tiny", dims=(8, 8, 8, 8), depths=(1, 1, 1, 1), ls_init_value=0.5, num_classes=CLASSES
    ),
    "timm resnet": lambda: timm.create_model("resnet18", channels=(8, 8, 16, 16), num_classes=CLASSES),
    "hf swin": lambda: hf(
        "swin", image_size=32, patch_size=4, embed_dim=12, depths=[1, 1], num_heads=[2, 2], window_size=4
    ),
    "hf convnext": lambda: hf("convnext", hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], layer_scale_init_value=0.5),
    "hf resnet": lambda: hf("resnet", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="bottleneck"),
    "torchvision resnet": lambda: torchvision.models.ResNet(
        torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=CLASSES
    ),
    "own resnet": lambda: ResNet(3, CLASSES, (8, 8, 16), 1),
}
FAMILIES = PLAIN | OTHERS


def processor_of(folder, kind="ViT", **settings):
    """Write the image processor of a folder of transformers."""
    facts = {"image_processor_type": f"{kind}ImageProcessor", **settings}
    (folder / "preprocessor_config.json").write_text(json.dumps(facts))


def made(name):
    """A network without a zero parameter, and with statistics other than the initial ones."""
    network = FAMILIES[name]()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        for key, buffer in network.named_buffers():
            if key.endswith("running_mean"):
                buffer.normal_(0, 0.05)
            elif key.endswith("running_var"):
                buffer.uniform_(0.05, 0.15)  # about the variance of the inputs, so that no ReLU is dead
    return network.eval()
