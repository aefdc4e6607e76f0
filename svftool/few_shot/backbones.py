"""Features of any backbone: which modules give them, how it is run, and at what stride."""

from svftool.few_shot.dilation import adapt_backbone, dilate
from svftool.few_shot.features import (
    FeatureNames,
    FeaturePlan,
    Features,
    State,
    default_names,
    features_of,
    frozen_stages,
    high_of,
    is_vgg16,
    parse_names,
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
