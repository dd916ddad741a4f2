"""Training in stages: published recipes, where a stage starts from, who teaches it."""
