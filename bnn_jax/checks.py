"""Checks of arguments: each refuses a value with one sentence that names it, the rule and the way out."""
