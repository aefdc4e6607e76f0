#!/usr/bin/env bash
# Eleven classes of street scenes, ten images, on a ResNet-18 up to its third stage.
#
#   examples/segmentation.sh DATA OUTPUT [options of svftool finetune]
#
# DATA holds
#   checkpoints/resnet18_to_layer3.safetensors  an ImageNet ResNet-18 without its last stage and head
#   models.py                                   resnet18_to_layer3(), which builds that network
#   images/camvid/{train,test}/{images,masks}/  street scenes of CamVid (Brostow et al., 2009), maps
#                                               of 11 classes as PNG, 11 where there is no label
# Any backbone and any folders of images and masks do.
set -euo pipefail
data=$1 output=$2
shift 2

svftool decompose "$data/checkpoints/resnet18_to_layer3.safetensors" -o "$output/factors"

# The backbone gets a pointwise convolution on its last feature map, which starts from the mean
# feature of each class's pixels. Label 11 stands for pixels without a class.
svftool finetune "$output/factors" -o "$output/runs" --task segmentation \
    --data "$data/images/camvid/train" --eval "$data/images/camvid/test" --ignore-index 11 \
    --model "$data/models.py:resnet18_to_layer3" \
    --shots 10 --batch-size 4 --regime head,svf "$@"

svftool merge "$output/factors" "$output/runs/svf-seed0.svf.safetensors" \
    -o "$output/merged.safetensors"
