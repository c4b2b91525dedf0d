"""What the scripts in `training/` share: audio store, recipes, the methods of Table II, the training loop."""
