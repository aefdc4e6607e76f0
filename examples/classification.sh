#!/usr/bin/env bash
# Ten textures that ImageNet does not have, ten images each, on a ResNet-18 up to its third stage.
#
#   examples/classification.sh DATA OUTPUT [options of svftool finetune]
#
# DATA holds
#   checkpoints/resnet18_to_layer3.safetensors  an ImageNet ResNet-18 without its last stage and head,
#                                               such as torchvision's IMAGENET1K_V1 weights
#   models.py                                   resnet18_to_layer3(), which builds that network
#   images/dtd10/CLASS/*.jpg                    ten classes of the Describable Textures Dataset
#                                               (Cimpoi et al., 2014), 80 images each
# Any checkpoint and folder of classes do: without a factory, as --model torchvision:resnet18.
set -euo pipefail
data=$1 output=$2
shift 2

svftool decompose "$data/checkpoints/resnet18_to_layer3.safetensors" -o "$output/factors"

# The network has no classifier: it gets one, which starts from each class's mean feature.
# What the ten shots leave over of the 80 images a class measures the result.
svftool finetune "$output/factors" -o "$output/runs" \
    --data "$data/images/dtd10" --model "$data/models.py:resnet18_to_layer3" \
    --image-size 96 --augment none --shots 10 --regime head,svf "$@"

svftool merge "$output/factors" "$output/runs/svf-seed0.svf.safetensors" \
    -o "$output/merged.safetensors"
