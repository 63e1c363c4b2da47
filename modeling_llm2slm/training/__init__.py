"""Recipes, trainer, optimizer, adapters, memory, distillation."""
