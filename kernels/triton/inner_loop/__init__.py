"""Whole inner loops by one program for each task: what `adapt_mlp` and `meta_loss_mlp` are made of."""
