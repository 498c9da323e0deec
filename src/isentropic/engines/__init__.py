"""Adapters to the engines that generate, train and checkpoint. No algorithm lives here; import the one you use."""
