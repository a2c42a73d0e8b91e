"""Right and wrong: layer by layer, by teacher forcing, and of engines that are not ours."""
