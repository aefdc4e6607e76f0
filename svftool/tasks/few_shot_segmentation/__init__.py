"""Few-shot segmentation: the experiment that singular-value fine-tuning was made for."""
