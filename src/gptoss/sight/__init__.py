"""Sight: what the model does with each token of a conversation, as a page and as plots."""
