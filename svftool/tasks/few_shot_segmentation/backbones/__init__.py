"""Features of any backbone: which modules give them, how it is run, and at what stride."""

from svftool.tasks.few_shot_segmentation.backbones.dilation import adapt_backbone, dilate
from svftool.tasks.few_shot_segmentation.backbones.names import (
    FeatureNames,
    default_names,
    is_vgg16,
    parse_names,
)
from svftool.tasks.few_shot_segmentation.backbones.plan import (
    FeaturePlan,
    Features,
    State,
    features_of,
    frozen_stages,
    high_of,
    plan_features,
    resized,
    run_stages,
)

__all__ = [
    "FeatureNames",
    "FeaturePlan",
    "Features",
    "State",
    "adapt_backbone",
    "default_names",
    "dilate",
    "features_of",
    "frozen_stages",
    "high_of",
    "is_vgg16",
    "parse_names",
    "plan_features",
    "resized",
    "run_stages",
]
