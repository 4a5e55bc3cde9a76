"""The embedded tasks: problems made from a seed, an exact checker for each, and the shipped bases with what made them."""
