"""What the scripts share: options of the command line, comparisons and their rows."""
