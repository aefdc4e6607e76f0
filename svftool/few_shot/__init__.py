"""Few-shot segmentation: the experiment of the method's paper, with its hosts and data sets."""
