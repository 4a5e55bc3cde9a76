"""The embedded tasks: problems made from a seed, an exact checker for each, the shipped bases."""
