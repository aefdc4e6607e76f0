"""The former place of few-shot segmentation, for specs that name its networks."""
