"""Methods other than SSync, one folder each: losses, parts of a model, and a slow reference."""
