"""Training: one skeleton, and recipes on top of it. ``from gptoss.train.sft import sft``."""
