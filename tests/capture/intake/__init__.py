"""Tests of what arrives from the dataloader."""
